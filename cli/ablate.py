"""`switchkd ablate`."""

import shlex
import sys
from pathlib import Path

import click

from switchkd.cli.common import default_device, echo, importing, quiet_libraries
from switchkd.cli.options import options_of
from switchkd.counting import counted
from switchkd.pipelines.ablation.options import AblateOptions


@click.command("ablate")
@click.argument("recipe", required=False)
@click.option("--list", "show", is_flag=True, help="Show the recipes that come with switchkd.")
@options_of(AblateOptions)
def command(
    recipe: str | None,
    show: bool,
    workdir: Path,
    settings: tuple[str, ...],
    launch: str | None,
    minutes: float | None,
    device: str | None,
) -> None:
    """Train and evaluate every cell of a RECIPE: objective × switch × scheme × teacher × student × seed.

    RECIPE is a YAML file or the name of a shipped one (--list). Each teacher is cached once, cells share the runs that they have
    in common, and the same command again does what is missing. The table, with mean and spread over seeds, is written as
    Markdown, CSV and a plot into the working folder.
    """
    if show:
        from switchkd.pipelines.ablation.recipe import shipped_recipes

        for name, title in shipped_recipes().items():
            echo(f"{name:<14} {title}")
        return
    if recipe is None:
        raise click.UsageError("name a recipe, or pass --list to see those that come with switchkd")
    wrong = [text for text in settings if "=" not in text]
    if wrong:
        raise click.BadParameter(f"{wrong[0]!r} should be NAME=VALUE", param_hint="--set")
    variables = dict(text.split("=", 1) for text in settings)
    quiet_libraries()
    from switchkd.pipelines.ablation.recipe import read_recipe

    read_recipe(recipe, variables, workdir)  # without torch: an error in it is told at once
    with importing():
        from switchkd.pipelines.ablation.ablate import ablate

    program = [sys.executable, "-c", "from switchkd.cli.main import main; main()"]
    done = ablate(
        AblateOptions(
            recipe=recipe,
            workdir=workdir,
            settings=variables,
            minutes=minutes,
            device=device or default_device(),
            launch=(*shlex.split(launch), *program) if launch else (),
        )
    )
    echo(done.table)
    echo("\n".join(f"written: {path}" for path in done.files))
    echo(f"{counted(done.cells, 'cell')}, {done.done_before} done before")
    if done.left > done.elsewhere:
        left = counted(done.left - done.elsewhere, "cell")
        echo(f"left: {left}, since --minutes were over: run the same command again")
    if done.elsewhere:
        echo(
            f"left to other processes: {counted(done.elsewhere, 'cell')}; when they are done, run the same command again"
        )
