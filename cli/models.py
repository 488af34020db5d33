"""`switchkd models`."""

import click

from switchkd.cli.common import echo, quiet_libraries


@click.command("models")
def command() -> None:
    """List the model families that can teach and learn, and what each supports.

    A checkpoint's family is the model_type in its config.json. Of a teacher and a student of one family, VSD also needs the same
    number of vision features for an image; `train` compares them before it loads a model.
    """
    quiet_libraries()
    from switchkd.models.family_table import COLUMNS, family_rows, switch_notes

    lines = [COLUMNS, *family_rows()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    echo()
    for name, note in switch_notes().items():
        echo(f"{name}: VSD is off by default, since {note}.")
