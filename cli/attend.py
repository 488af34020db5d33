"""`switchkd attend`."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from switchkd.cli.common import PATH, default_device, quiet_libraries

if TYPE_CHECKING:
    from switchkd.pipelines.reporting.attend import AttendOptions, Row


@click.command("attend")
@click.option("--model", type=PATH, required=True, help="Checkpoint folder of the student.")
@click.option("--teacher", type=PATH, help="Checkpoint folder of the teacher, to compare with.")
@click.option("--baseline", type=PATH, help="Checkpoint folder of another student, to compare with.")
@click.option("--image", "images", type=PATH, required=True, multiple=True, help="An image file.")
@click.option("--question", "questions", required=True, multiple=True, help="What is asked about the image before it.")
@click.option("--answer", help="Read the attention of this answer.  [default: each model's own]")
@click.option(
    "--template", default="qwen2_base", show_default=True, help="Conversation template: a name or a JSON file."
)
@click.option(
    "--layer",
    "layers",
    type=int,
    multiple=True,
    help="A layer of the language model, from 0, or from the end with -1.  [default: all]",
)
@click.option(
    "--out", type=PATH, default=Path("attend"), show_default=True, help="Folder for attend.png and attend.html."
)
@click.option("--max-new-tokens", type=click.IntRange(1), default=32, show_default=True, help="An answer is cut there.")
@click.option("--device", help="cpu, cuda, cuda:1, …  [default: cuda if there is one]")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="What the models run in; auto is a checkpoint's own.",
)
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a checkpoint.")
def command(images: tuple[Path, ...], questions: tuple[str, ...], device: str | None, **options: Any) -> None:
    """Show what teacher, baseline and student look at while they answer, side by side.

    Attention from the answer to the image's patches, mean over layers, heads and the answer's tokens, drawn over the image as
    each model sees it. Several questions give several rows: repeat `--image` and `--question` in pairs.
    """
    if len(images) != len(questions):
        raise click.UsageError(
            f"each --question goes with an --image: {len(images)} images, {len(questions)} questions"
        )
    quiet_libraries()
    from switchkd.pipelines.reporting.attend import AttendOptions, attend

    asked = list(zip(images, questions, strict=True))
    resolved = AttendOptions(asked=asked, device=device or default_device(), **options)
    for line in _format_report(resolved, attend(resolved)):
        click.echo(line)


def _format_report(options: "AttendOptions", rows: Sequence["Row"]) -> Iterator[str]:
    from switchkd.pipelines.reporting.attend import PAGE, PICTURE

    for row in rows:
        yield f"{row.image}, {row.question!r}"
        for panel in row.panels:
            yield f"  {panel.name:<9} {panel.caption}"
    yield f"drawn: {options.out / PICTURE}, {options.out / PAGE}"
