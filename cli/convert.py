"""`switchkd convert`."""

from typing import Any

import click

from switchkd.cli.common import PATH, echo, quiet_libraries
from switchkd.cli.options import options_of
from switchkd.counting import counted
from switchkd.pipelines.checkpoints.options import ConvertOptions


@click.command("convert")
@click.argument("source", type=PATH)
@click.argument("target", type=PATH)
@options_of(ConvertOptions)
def command(**options: Any) -> None:
    """Rewrite the checkpoint in folder SOURCE in another layout, in the new folder TARGET.

    The model's outputs stay the same; an unknown or missing tensor is an error.
    """
    quiet_libraries()
    from switchkd.pipelines.checkpoints.convert import convert

    done = convert(ConvertOptions(**options))
    echo(
        f"{done.target}: {done.layout} to {options['to']}, {counted(done.tensors, 'tensor')}, "
        f"{counted(done.parameters, 'parameter')}; "
        f"{counted(done.from_tower, 'tensor')} from the tower's folder, {counted(done.new_rows, 'new row')} for <image>"
    )
    if done.dropped:
        echo(f"left out, since they are computed: {', '.join(done.dropped)}")
