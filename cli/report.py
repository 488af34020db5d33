"""`switchkd report`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from switchkd.cli.common import PATH, STORE, default_device, quiet_libraries

if TYPE_CHECKING:
    from switchkd.pipelines.reporting.report import Report


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN…")
@click.option(
    "--out", type=PATH, default=Path("report"), show_default=True, help="Folder for report.html and its pictures."
)
@click.option(
    "--samples", type=click.IntRange(0), default=8, show_default=True, help="Questions shown with every model's answer."
)
@click.option(
    "--knees",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Run finished students on this many random samples of the store, and show their knees beside the teacher's.",
)
@click.option("--device", help="cpu, cuda, cuda:1, …  [default: cuda if there is one]")
def command(runs: tuple[str, ...], out: Path, samples: int, knees: int, device: str | None) -> None:
    """Write one HTML page, and PNGs, about training runs, evaluations and stores.

    RUN is a folder that `train`, `eval` or `cache-teacher` wrote, or one that holds several of them, such as demo-run; or
    LABEL=RUN. The page needs no other file and no network. What the runs do not hold is left out, with a line that says
    what would bring it.
    """
    quiet_libraries()
    from switchkd.pipelines.reporting.report import ReportOptions, report

    options = ReportOptions(
        [_labelled(run) for run in runs], out, samples, knees, (device or default_device()) if knees else "cpu"
    )
    for line in _format_report(report(options)):
        click.echo(line)


def _labelled(text: str) -> tuple[str | None, Path | str]:
    """Split LABEL=RUN; a "=" after a slash belongs to the path."""
    label, equals, place = text.partition("=")
    if not equals or "/" in label:
        label, place = "", text
    return label or None, STORE.convert(place, None, None)


def _format_report(done: "Report") -> Iterator[str]:
    """Yield what the command line prints."""
    yield f"{done.page}: {len(done.pictures)} pictures beside it"
    for line in done.missing:
        yield f"  {line}"
