"""`switchkd convert`."""

from typing import Any

import click

from switchkd.cli.common import PATH, quiet_libraries


@click.command("convert")
@click.argument("source", type=PATH)
@click.argument("target", type=PATH)
@click.option(
    "--to",
    type=click.Choice(["hf", "tinyllava", "llava"]),
    default="hf",
    show_default=True,
    help="Layout of TARGET: transformers' and switchkd's, TinyLLaVA's and LLaVA-KD's, or original LLaVA's.",
)
@click.option(
    "--vision",
    type=PATH,
    help="Folder of the vision tower, where SOURCE only names it.  [default: SOURCE/vision_tower, if it is there]",
)
@click.option("--tokenizer", type=PATH, help="Folder of the tokenizer.  [default: SOURCE]")
@click.option(
    "--strategy",
    type=click.Choice(["default", "full"]),
    help="default drops an image's first feature, full keeps all.  [default: what SOURCE says]",
)
def command(**options: Any) -> None:
    """Rewrite the checkpoint in folder SOURCE in another layout, in the new folder TARGET.

    What it computes stays the same; every tensor is accounted for, and one that is unknown or missing is an error.
    """
    quiet_libraries()
    from switchkd.pipelines.checkpoints.convert import ConvertOptions, convert

    done = convert(ConvertOptions(**options))
    click.echo(
        f"{done.target}: {done.layout} to {options['to']}, {done.tensors} tensors, {done.parameters:,} parameters; "
        f"{done.from_tower} tensors from the tower's folder, {done.new_rows} new rows for <image>"
    )
    if done.dropped:
        click.echo(f"left out, since they are computed: {', '.join(done.dropped)}")
