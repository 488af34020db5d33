"""The loggers that a run's metrics are sent to (`--log-to`): checked first, told what the run is made of, closed when it ends.

transformers' callbacks send the metrics of every log. Here each logger gets the run's name, its options, and the fingerprints of
data, teacher and store, and a resumed run goes on in the logger's run that it began.
"""

import importlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from switchkd.errors import ConfigError, RunError
from switchkd.pipelines.run_folder import write_atomically
from switchkd.settings import LoggerName

PROJECT = "switchkd"  # in W&B and Trackio, unless the environment or `trainer: project` names another
RUN_ID = "logger.json"  # in a run's folder: the name under which its loggers know it
# What each one imports; torch's module compares versions of TensorBoard.
_MODULES: dict[LoggerName, tuple[str, ...]] = {
    "tensorboard": ("tensorboard", "torch.utils.tensorboard"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
}
_WITHOUT_ACCOUNT = ("offline", "disabled", "dryrun")  # W&B's modes


def require_loggers(names: Sequence[LoggerName]) -> None:
    """Check that the packages of loggers can be imported, and that W&B has an account if it needs one.

    Raises:
        ConfigError: a package is missing, with the command that installs it, or W&B has no key.
    """
    for name in names:
        try:
            for module in _MODULES[name]:
                importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(
                f"--log-to {name} needs the package {name}, which cannot be imported ({error}): pip install 'switchkd[loggers]'"
            ) from None
    if "wandb" in names and os.environ.get("RANK", "0") == "0":  # the first process alone sends metrics
        _require_account()


def _require_account() -> None:
    import wandb

    if wandb.setup().settings.mode in _WITHOUT_ACCOUNT:
        return
    try:
        known = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        raise ConfigError(f"--log-to wandb: {error}") from None
    if not known:
        raise ConfigError(
            "--log-to wandb needs an account: run `wandb login`, or set WANDB_API_KEY; WANDB_MODE=offline keeps the metrics on "
            "this disk, and `wandb sync` sends them later"
        )


@contextmanager
def open_loggers(
    names: Sequence[LoggerName],
    run: Path,
    arguments: TrainingArguments,
    about: Mapping[str, Any],
    resumed_at: int | None,
) -> Iterator[list[TrainerCallback]]:
    """Open loggers in the first process of a run, and close them when the block ends, however it ends.

    Args:
        names: of the loggers; none in the other processes. run: its folder, where TensorBoard's and W&B's files are written.
        arguments: receive the run's name, which Trackio reads from them.
        about: the run's options and the fingerprints of what it is made of, as plain data.
        resumed_at: the step that a resumed run goes on from; None for a new one, which gets a name of its own.

    Returns:
        The callbacks of the Trainer that send the metrics.

    Raises:
        RunError: a service cannot be reached.
    """
    with ExitStack() as stack:
        if not names:
            yield []
            return
        identity = _identity(run, new=resumed_at is None)
        arguments.run_name = arguments.run_name or f"{run.resolve().name}-{identity}"
        callbacks: list[TrainerCallback] = []
        if "tensorboard" in names:
            callbacks.append(_tensorboard(stack, run, about, resumed_at))
        if "wandb" in names:
            callbacks.append(_wandb(stack, run, arguments.run_name, identity, about))
        if "trackio" in names:
            callbacks.append(_trackio(stack, about))
        yield callbacks


def _identity(run: Path, new: bool) -> str:
    """Return the identity under which a run's loggers know it, eight hex digits; kept in its folder."""
    path = run / RUN_ID
    if not new and path.is_file():
        return str(json.loads(path.read_text())["id"])
    identity = secrets.token_hex(4)
    run.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"id": identity}))
    return identity


def _tensorboard(stack: ExitStack, run: Path, about: Mapping[str, Any], resumed_at: int | None) -> TrainerCallback:
    """Write event files below RUN/tensorboard; steps that are trained again after an interruption replace the first ones."""
    from torch.utils.tensorboard import SummaryWriter

    folder = os.environ.get("TENSORBOARD_LOGGING_DIR") or run / "tensorboard"
    again = None if resumed_at is None else resumed_at + 1
    writer: Any = SummaryWriter(folder, purge_step=again)  # type: ignore[no-untyped-call]
    stack.callback(writer.close)
    told = yaml.safe_dump(_plain(about), sort_keys=False, allow_unicode=True)
    writer.add_text("switchkd", "\n".join(f"    {line}" for line in told.splitlines()))  # a code block of Markdown
    callback: TrainerCallback = TensorBoardCallback(writer)
    return callback


def _wandb(stack: ExitStack, run: Path, name: str, identity: str, about: Mapping[str, Any]) -> TrainerCallback:
    """Begin or resume a run of W&B; its files lie below RUN/wandb, unless WANDB_DIR names another folder."""
    import wandb

    try:
        begun = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", name),
            id=os.environ.get("WANDB_RUN_ID", identity),
            dir=os.environ.get("WANDB_DIR", str(run)),
            resume="allow",
            config={"switchkd": _plain(about)},
        )
    except wandb.errors.Error as error:
        raise RunError(f"--log-to wandb: {error}; WANDB_MODE=offline keeps the metrics on this disk") from error
    stack.push(lambda kind, *_: begun.finish(exit_code=int(kind is not None)))
    callback: TrainerCallback = WandbCallback()
    return callback


def _trackio(stack: ExitStack, about: Mapping[str, Any]) -> TrainerCallback:
    """Begin or resume a run of Trackio, in the folder that TRACKIO_DIR names."""

    class WithAbout(TrackioCallback):  # type: ignore[misc]
        def setup(self, args: Any, state: Any, model: Any, **more: Any) -> None:
            super().setup(args, state, model, **more)
            self._trackio.config.update({"switchkd": _plain(about)})

    callback: Any = WithAbout()
    stack.callback(lambda: callback._trackio.finish() if callback._initialized else None)
    return callback  # type: ignore[no-any-return]


def _plain(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain data: tuples as lists, whatever else is not JSON as text."""
    plain: dict[str, Any] = json.loads(json.dumps(about, default=str))
    return plain
