"""`switchkd demo`."""

from pathlib import Path

import click

from switchkd.cli.common import echo, quiet_libraries
from switchkd.cli.options import options_of
from switchkd.pipelines.demo.options import DemoOptions


@click.command("demo")
@options_of(DemoOptions)
def command(workdir: Path, train_teacher: bool, seed: int) -> None:
    """Run the whole method on easy-VQA: cache a teacher, train three students, compare them.

    Takes a few minutes on two cores; nothing is downloaded.
    """
    quiet_libraries()
    from switchkd.pipelines.demo.demo import demo

    done = demo(DemoOptions(workdir=workdir, train_teacher=train_teacher, seed=seed))
    echo(done.table)
    click.echo(f"\nreport: {done.report}\npicture: {done.picture}\ntime: {done.seconds:,.0f} s")
