"""`switchkd new`."""

from pathlib import Path
from typing import Any

import click

from switchkd.cli.common import PATH, echo, quiet_libraries
from switchkd.cli.options import options_of
from switchkd.pipelines.project.options import NewOptions


@click.command("new")
@click.argument("out", type=PATH, metavar="DIR")
@options_of(NewOptions)
def command(out: Path, **options: Any) -> None:
    """Write a project folder for a pair of models: configurations, the commands in order, Slurm files, a README.

    The two models are compared first, and train.yaml gets the settings that they need, with the reason. Nothing is run.
    """
    quiet_libraries()
    from switchkd.pipelines.project.project import new_project

    made = new_project(NewOptions(out=out, **options))
    echo(f"{made.out}: {', '.join(made.files)}")
    echo(made.pathway.meaning + (f"\nThe reason: {made.pathway.reason}" if made.pathway.reason else ""))
    echo(f"Next: read {made.out / 'README.md'}, then `make estimate` and `make all` in that folder")
