"""`switchkd export`."""

from pathlib import Path
from typing import Any

import click

from switchkd.cli.common import PATH, quiet_libraries


@click.command("export")
@click.argument("run", type=PATH)
@click.argument("out", type=PATH)
@click.option(
    "--scores",
    type=PATH,
    multiple=True,
    help="Folder of `switchkd eval` for the card (repeatable).  [default: those in RUN]",
)
@click.option("--template", help="What the student was trained with: a name or a JSON file.  [default: the run's]")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the weights; auto keeps the run's.",
)
@click.option("--push-to", metavar="REPO", help="Upload the folder to this repository of the Hugging Face hub.")
@click.option("--private", is_flag=True, help="Make that repository private if it is new.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the checkpoint.")
def command(run: Path, out: Path, **options: Any) -> None:
    """Write a finished run's student to OUT: weights, processor, chat template, generation settings, model card.

    The folder opens in plain transformers and answers as `chat` and `eval` do. Nothing leaves this machine without --push-to.
    """
    quiet_libraries()
    from switchkd.pipelines.release.export import ExportOptions, export

    made = export(ExportOptions(run, out, **options))
    click.echo(f"{made}: written" + (f", pushed to {options['push_to']}" if options["push_to"] else ""))
