"""`switchkd data …`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from switchkd.cli.common import PATH, default_device, echo, quiet_libraries
from switchkd.cli.options import options_of
from switchkd.counting import counted
from switchkd.pipelines.emoji_vqa.options import EmojiVQAOptions
from switchkd.pipelines.mixture import Mixture, mixture_at
from switchkd.pipelines.preflight.options import CheckOptions, ShowOptions
from switchkd.printable import printable
from switchkd.settings import MAX_SKIPPED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from switchkd.pipelines.preflight.data_check import DataCheck

FIRST_ROWS = 5  # listed for each reason
BINS = 16
QUANTILES = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
BAR_WIDTH = 40  # characters of the longest bar


@click.group("data")
def command() -> None:
    """Check a data file, print samples, or build a data set, before a model is run over it."""


@command.command("check")
@click.argument("data", type=PATH)
@options_of(CheckOptions)
@click.option("--strict", is_flag=True, help="Exit 1 if a row would be skipped.")
@click.pass_context
def check(ctx: click.Context, /, strict: bool, data: Path, device: str | None, **options: Any) -> None:
    """Report the contents of a data file, or of every data file of a mixture: kinds, lengths, and what would be skipped and why."""
    quiet_libraries()
    from switchkd.pipelines.preflight.data_check import check_data, check_mixture

    if device is None and options["visual_advantage"]:
        device = default_device()
    asked = CheckOptions(data=data, device=device or "cpu", **options)
    mixture = mixture_at(data)
    found = {str(data): check_data(asked)} if mixture is None else check_mixture(mixture, asked)
    for name, check in found.items():
        echo(f"{name}: " + "\n".join(format_check(check)) + ("" if mixture is None else "\n"))
    if mixture is not None:
        echo("\n".join(format_mixture(mixture, found)))
    if strict and any(check.skipped for check in found.values()):
        ctx.exit(1)


@command.command("show")
@click.argument("data", type=PATH)
@options_of(ShowOptions)
@click.option("--plain", is_flag=True, help="Brackets instead of colours.  [default: where the output is no terminal]")
def show(data: Path, plain: bool, **options: Any) -> None:
    """Print the exact text of samples, with supervised text marked: in green, or in [[brackets]]."""
    quiet_libraries()
    from rich.console import Console
    from rich.text import Text

    from switchkd.pipelines.preflight.data_show import show_data, show_mixture

    console = Console(soft_wrap=True, highlight=False)
    in_colour = console.is_terminal and not console.no_color and not plain
    styles = {"prompt": "", "supervised": "bold green", "image": "cyan"}
    asked = ShowOptions(data=data, **options)
    mixture = mixture_at(data)
    shown = (("", sample) for sample in show_data(asked)) if mixture is None else show_mixture(mixture, asked)
    for name, sample in shown:
        about = printable(
            f"{name and name + ', '}row {sample.row}, id {sample.id}, {sample.image or 'no image'}: ", 500
        )
        of = "a made-up image (pass --images: their number depends on the image)" if sample.stands_in else "the image"
        total = counted(sample.tokens(), "token")
        counts = f"{total}, {sample.tokens('image'):,} of {of}, {sample.tokens('supervised'):,} supervised"
        console.print(Text(about + printable(sample.problem or counts), "bold"))
        text, tokens = Text(), Text("  ")
        for span in sample.spans:
            marked = not in_colour and span.kind == "supervised"
            words = f"<image ×{span.tokens}>" if span.kind == "image" else printable(span.text)
            pieces = [f"{id}:{printable(piece)}" for id, piece in zip(span.ids, span.pieces, strict=True)]
            pieces = [f"{pieces[0]}×{span.tokens}"] if span.kind == "image" else pieces
            for line, content in ((text, words), (tokens, " ".join(pieces))):
                line.append(f"[[{content}]]" if marked else content, styles[span.kind])
            tokens.append(" ")
        console.print(text)
        if sample.spans:
            tokens.rstrip()
            console.print(tokens, end="\n\n")


@command.command("emoji-vqa")
@options_of(EmojiVQAOptions)
def emoji_vqa(**options: Any) -> None:
    """Build EmojiVQA, a suite of small images and questions that asks for seeing, from pinned packages, in about a minute."""
    quiet_libraries()
    from switchkd.pipelines.emoji_vqa.build import build, lines_of

    built = build(EmojiVQAOptions(**options))
    echo("\n".join(lines_of(built)))
    echo(f"suite: {built.folder}")


def format_check(check: "DataCheck") -> list[str]:
    """Return a check as lines of text."""
    import numpy as np

    from switchkd.data.samples import Status
    from switchkd.pipelines.preflight.skip_limit import allowed_skips

    out = [counted(check.rows, "row"), "", "rows that can be read"]
    out += [f"  {kind:<28}{count:>10,}" for kind, count in sorted(check.kinds.items())]
    out += ["", f"would be skipped: {check.skipped:,} ({check.skipped / check.rows:.2%})"]
    if check.skipped > (allowed := allowed_skips(check.rows, MAX_SKIPPED)):
        out.append(f"  more than --max-skipped {MAX_SKIPPED:g} allows ({allowed:,}): cache-teacher would stop")
    for status in Status:
        rows = np.flatnonzero(check.survey.status == status)
        if status is not Status.OK and len(rows):
            first = next(iter(rows))
            out.append(f"  {status.label:<28}{len(rows):>10,}  {_rows(rows)}; {check.survey.details[int(first)]}")
    if check.survey.notes:
        out += ["", "odd, and used"]
        out += [
            f"  {note:<28}{len(rows):>10,}  {_rows(np.array(rows))}"
            for note, rows in sorted(check.survey.notes.items())
        ]
    if check.survey.conversions:
        out += ["", "images converted to RGB"]
        out += [
            f"  {kind:<44}{len(rows):>10,}  {_rows(np.array(rows))}"
            for kind, rows in sorted(check.survey.conversions.items())
        ]
    if not check.images_read:
        out += ["", "images were not read: pass --images"]
    out += ["", *histogram(check.lengths, check.unit, check.limit)]
    if check.looking is not None:
        from switchkd.pipelines.visual_advantage import lines_of

        out += ["", *lines_of(check.looking)]
    return out


def format_mixture(mixture: Mixture, checks: "dict[str, DataCheck]") -> list[str]:
    """Return what an epoch of a mixture takes of each data file, as lines of text."""
    drawn = {entry.name: entry.drawn(checks[entry.name].rows - checks[entry.name].skipped) for entry in mixture.entries}
    total = sum(drawn.values())
    out = [f"{mixture.path}: {counted(total, 'sample')} an epoch"]
    for entry in mixture.entries:
        check, share = checks[entry.name], entry.share()
        usable = f"of {check.rows - check.skipped:,} usable" + (f", {share}" if share else "")
        out.append(f"  {entry.name:<28}{drawn[entry.name]:>10,}  {drawn[entry.name] / max(total, 1):.1%}, {usable}")
    return out


def _rows(rows: "NDArray[Any]") -> str:
    return "rows " + ", ".join(map(str, rows[:FIRST_ROWS])) + (", …" if len(rows) > FIRST_ROWS else "")


def histogram(lengths: "NDArray[Any]", unit: str, limit: int | None) -> list[str]:
    """Draw lengths as bars of text.

    Args:
        lengths: [n]. unit: of the lengths. limit: longer samples have a separate line, below bins up to the limit; if there are
            none, or no limit, the bins end with the longest sample.
    """
    import numpy as np

    if not len(lengths):
        return [f"{unit} a sample: none is known"]
    marks = ", ".join(f"{name} {np.quantile(lengths, share, method='higher'):,}" for name, share in QUANTILES.items())
    end = int(lengths.max())
    end = min(end, limit or end)
    step = max(1, -(-end // BINS))
    counts = [int(((lengths > low) & (lengths <= min(low + step, end))).sum()) for low in range(0, end, step)]
    names = [f"{low + 1:,} to {min(low + step, end):,}" for low in range(0, end, step)]
    out = [f"{unit} a sample: {marks}"]
    longer = int((lengths > end).sum())
    for name, count in [*zip(names, counts, strict=True), *([(f"over {end:,}", longer)] if longer else [])]:
        bar = "█" * -(-count * BAR_WIDTH // max(*counts, longer, 1))
        out.append(f"  {name:>16} {count:>9,} {bar}".rstrip())
    return out
