"""`switchkd export`."""

from pathlib import Path
from typing import Any

import click

from switchkd.cli.common import PATH, echo, importing, quiet_libraries
from switchkd.cli.options import options_of
from switchkd.pipelines.release.options import ExportOptions


@click.command("export")
@click.argument("run", type=PATH)
@click.argument("out", type=PATH)
@options_of(ExportOptions)
def command(run: Path, out: Path, **options: Any) -> None:
    """Write a finished run's student to OUT: weights, processor, chat template, generation settings, model card.

    The folder opens in plain transformers and answers as `chat` and `eval` do. Nothing leaves this machine without --push-to.
    """
    quiet_libraries()
    with importing():
        from switchkd.pipelines.release.export import export

    made = export(ExportOptions(run=run, out=out, **options))
    echo(f"{made}: written" + (f", pushed to {options['push_to']}" if options["push_to"] else ""))
