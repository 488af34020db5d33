"""`switchkd demo`."""

from pathlib import Path

import click

from switchkd.cli.common import PATH, quiet_libraries


@click.command("demo")
@click.option(
    "--workdir",
    type=PATH,
    default=Path("demo-run"),
    show_default=True,
    help="Where everything goes; a demo that was interrupted goes on there.",
)
@click.option("--train-teacher", is_flag=True, help="Train the teacher here instead of taking the weights that ship.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the students' first weights and data order.")
def command(workdir: Path, train_teacher: bool, seed: int) -> None:
    """See the whole method work on easy-VQA: cache a teacher, train two students, compare them.

    Takes a few minutes on two cores; nothing is downloaded.
    """
    quiet_libraries()
    from switchkd.pipelines.demo.demo import DemoOptions, demo

    done = demo(DemoOptions(workdir, train_teacher, seed))
    click.echo(done.table)
    click.echo(f"\nreport: {done.report}\npicture: {done.picture}\ntime: {done.seconds:,.0f} s")
