"""Options of `switchkd ablate`."""

from pathlib import Path

from switchkd.pipelines.options import option, options_class


@options_class
class AblateOptions:
    """The options of `switchkd ablate`."""

    recipe: str = option(hidden=True, help="A shipped recipe's name, or a file.")
    workdir: Path = option(
        default=Path("ablations"),
        help="Where everything goes: stores, runs, tables. Recipes in one folder share what is the same.",
    )
    settings: dict[str, str] = option(
        default={},
        flag="--set",
        multiple=True,
        metavar="NAME=VALUE",
        help="A variable of the recipe; may be repeated.",
    )
    # The command that starts `switchkd`, to which its arguments are appended; () trains in this process.
    launch: tuple[str, ...] = option(
        default=(),
        metavar="COMMAND",
        help='Start every training run with this, as "torchrun --nproc-per-node 8 --no-python".',
        unset="in this process",
    )
    minutes: float | None = option(
        default=None,
        above=0,
        help="Begin no further cell after so many minutes; the same command goes on.",
        unset="until all are done",
    )
    # For the teacher and evaluation only; training selects its devices itself.
    device: str = option(default="cpu", help="Of teacher and evaluation.", unset="cuda if there is one")
