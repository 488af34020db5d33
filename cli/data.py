"""`switchkd data …`."""

from pathlib import Path
from typing import Any

import click

from switchkd.cli.common import PATH, quiet_libraries


@click.group("data")
def command() -> None:
    """Look at a data file before a model is run over it."""


@command.command("check")
@click.argument("data", type=PATH)
@click.option("--images", type=PATH, help="Folder that the data file's image paths start from; each image is decoded.")
@click.option(
    "--model", type=PATH, help="Checkpoint folder: its tokenizer tells lengths.  [default: words are counted]"
)
@click.option(
    "--template",
    default="qwen2_base",
    show_default=True,
    help="Conversation template: a name, a JSON file, or chat, the checkpoint's own.",
)
@click.option(
    "--max-length", type=click.IntRange(2), default=2048, show_default=True, help="In tokens with image tokens."
)
@click.option(
    "--max-image-pixels", type=click.IntRange(1), default=1 << 26, show_default=True, help="Larger images are skipped."
)
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that look at samples.")
@click.option("--report", type=PATH, help="Write a JSON line for each row that would be skipped.")
@click.option("--strict", is_flag=True, help="Exit 1 if a row would be skipped.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a checkpoint.")
@click.pass_context
def check(ctx: click.Context, /, strict: bool, data: Path, **options: Any) -> None:
    """Tell what a data file holds: kinds, lengths, and what would be skipped and why."""
    quiet_libraries()
    from switchkd.pipelines.data_check import CheckOptions, check_data, lines

    found = check_data(CheckOptions(data=data, **options))
    click.echo(f"{data}: " + "\n".join(lines(found)))
    if strict and found.skipped:
        ctx.exit(1)


@command.command("show")
@click.argument("data", type=PATH)
@click.option("--model", type=PATH, required=True, help="Checkpoint folder, for its tokenizer.")
@click.option(
    "--template",
    default="qwen2_base",
    show_default=True,
    help="Conversation template: a name, a JSON file, or chat, the checkpoint's own.",
)
@click.option("-n", "--n", type=click.IntRange(1), default=3, show_default=True, help="Samples.")
@click.option("--start", type=click.IntRange(0), default=0, show_default=True, help="The first one's row.")
@click.option(
    "--max-length", type=click.IntRange(2), default=2048, show_default=True, help="In tokens with image tokens."
)
@click.option("--plain", is_flag=True, help="Brackets instead of colours.  [default: where the output is no terminal]")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with a checkpoint.")
def show(data: Path, plain: bool, **options: Any) -> None:
    """Print the exact text of samples, what is supervised marked: in green, or in [[brackets]]."""
    quiet_libraries()
    from rich.console import Console
    from rich.text import Text

    from switchkd.pipelines.data_show import ShowOptions, show_data

    console = Console(soft_wrap=True, highlight=False)
    in_colour = console.is_terminal and not console.no_color and not plain
    styles = {"prompt": "", "supervised": "bold green", "image": "cyan"}
    for sample in show_data(ShowOptions(data, **options)):
        about = f"row {sample.row}, id {sample.id}, {sample.image or 'no image'}: "
        counts = f"{sample.tokens():,} tokens, {sample.tokens('image'):,} of the image, {sample.tokens('supervised'):,} supervised"
        console.print(Text(about + (sample.problem or counts), "bold"))
        text = Text()
        for span in sample.spans:
            words = f"<image ×{span.tokens}>" if span.kind == "image" else span.text
            text.append(words if in_colour or span.kind != "supervised" else f"[[{words}]]", styles[span.kind])
        console.print(text, end="\n\n" if sample.spans else "\n")
