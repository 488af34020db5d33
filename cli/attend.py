"""`switchkd attend`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from switchkd.cli.common import PATH, default_device, echo, importing, quiet_libraries
from switchkd.cli.options import options_of
from switchkd.counting import counted
from switchkd.pipelines.reporting.options import AttendOptions

if TYPE_CHECKING:
    from switchkd.pipelines.reporting.attend import Row


@click.command("attend")
@click.option("--image", "images", type=PATH, required=True, multiple=True, help="An image file.")
@click.option("--question", "questions", required=True, multiple=True, help="What is asked about the image before it.")
@options_of(AttendOptions)
def command(images: tuple[Path, ...], questions: tuple[str, ...], device: str | None, **options: Any) -> None:
    """Show the attention maps of teacher, baseline and student for the same questions, side by side.

    Attention from the answer to the image's patches, mean over layers, heads and the answer's tokens, drawn over the image as
    each model sees it. Several questions give several rows: repeat `--image` and `--question` in pairs.
    """
    if len(images) != len(questions):
        raise click.UsageError(
            f"each --question goes with an --image: {counted(len(images), 'image')}, {counted(len(questions), 'question')}"
        )
    quiet_libraries()
    with importing():
        from switchkd.pipelines.reporting.attend import attend

    asked = tuple(zip(images, questions, strict=True))
    resolved = AttendOptions(asked=asked, device=device or default_device(), **options)
    for line in _format_report(resolved, attend(resolved)):
        echo(line)


def _format_report(options: AttendOptions, rows: Sequence["Row"]) -> Iterator[str]:
    from switchkd.pipelines.reporting.attend import PAGE, PICTURE

    for row in rows:
        yield f"{row.image}, {row.question!r}"
        for panel in row.panels:
            yield f"  {panel.name:<9} {panel.attention.answer!r}: {panel.figures}"
    yield f"drawn: {options.out / PICTURE}, {options.out / PAGE}"
