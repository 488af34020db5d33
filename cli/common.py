"""Helpers of several commands: option types, the configuration file, and logging without the libraries' messages."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from switchkd.pipelines.shipped import PREFIX, recipe_path
from switchkd.printable import printable
from switchkd.waits import Waiting

PATH = click.Path(path_type=Path)


class _StorePath(click.ParamType):  # type: ignore[type-arg]
    """A folder as a Path; the URL of an object store as text, since a Path would lose one of its slashes."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        text = str(value)
        return text if "://" in text else Path(text)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Complete files and folders in the shell."""
        return [CompletionItem(incomplete, type="file")]


STORE = _StorePath()


def config_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--config FILE.yaml`: its keys are option names; the command line wins over the file, the file over defaults.

    `switchkd:NAME` is a file that comes with the package, see `shipped.py`.
    """
    return click.option(
        "--config",
        type=PATH,
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="YAML file with options of this command by name, or switchkd:NAME, a recipe that comes with switchkd (docs/scale.md); "
        "the command line wins.",
    )(command)


def _read_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    import yaml

    if str(path).startswith(PREFIX):
        path = recipe_path(str(ctx.command.name), str(path).removeprefix(PREFIX))
        if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun started, only this one prints
            echo(f"options from {path}, where each is explained; change a copy of it, passed as --config", err=True)

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise click.BadParameter(f"{path} should hold options by name, found {type(content).__name__}")
    content = {str(name).replace("-", "_"): value for name, value in content.items()}
    several = {parameter.name for parameter in ctx.command.params if parameter.multiple or parameter.nargs != 1}
    content |= {name: [value] for name, value in content.items() if name in several and isinstance(value, str)}
    known = {str(parameter.name) for parameter in ctx.command.params} | {"trainer"}
    if unknown := sorted(content.keys() - known):
        raise click.BadParameter(f"{path} has unknown options {', '.join(unknown)}")
    trainer = content.pop("trainer", None)
    ctx.obj = {"trainer": {} if trainer is None else trainer}
    ctx.default_map = content


def quiet_libraries() -> None:
    """Print switchkd's log lines to standard error, without the progress bars of libraries."""
    # transformers imports torchao if it is installed, which logs every kernel that this machine cannot use.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
    else:  # its import takes half a second, and a command may not need it
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logger = logging.getLogger("switchkd")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)


def importing() -> Waiting:
    """Return a context for the imports of a command that needs torch: they take seconds, more on a network file system."""
    return Waiting("importing torch and transformers")


class _Formatter(logging.Formatter):
    """Formats a line of the log with its control characters escaped: it may quote the data."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def echo(text: object = "", *, nl: bool = True, err: bool = False) -> None:
    """Print text of the data, of a model or of a file's name; see `printable`."""
    click.echo(printable(text), nl=nl, err=err)


def default_device() -> str:
    """Return "cuda" if a CUDA device exists, under torchrun that of this process; else "cpu"."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    # A launcher may also have shown each process one device alone.
    return f"cuda:{rank}" if 0 < rank < torch.cuda.device_count() else "cuda"


def lines_of(counts: dict[str, int]) -> str:
    """Return counts as words: "3 image_missing, 1 too_long", or "none"."""
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())) or "none"


def gigabytes(size: float) -> str:
    """Return bytes as GB, or as MB below ten of them."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e7 else f"{size / 1e6:,.2f} MB"
