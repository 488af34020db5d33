"""What a run's folder says about its progress, read without torch: checkpoints, and whether the run is finished."""

import json
from dataclasses import dataclass
from pathlib import Path

from switchkd.pipelines.run_folder import SUMMARY, check_record, to_plain
from switchkd.pipelines.training.options import RESUMABLE_CHANGES, TrainOptions

PREFIX = "checkpoint-"


@dataclass(frozen=True)
class TrainSummary:
    """The result of a run."""

    output: Path
    steps: int
    samples: int  # usable
    skipped: dict[str, int]  # by reason
    losses: dict[str, float]  # mean over the last logged interval, nats per position
    already_finished: bool


def checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, whatever is in them, the newest first."""
    found = [path for path in run.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=step_of, reverse=True)


def has_begun(run: Path) -> bool:
    """Whether a run has saved something that other options could contradict."""
    return (run / SUMMARY).is_file() or bool(checkpoints(run))


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix(PREFIX))


def finished(options: TrainOptions) -> TrainSummary | None:
    """Return the result of a finished run; None if it is not finished.

    Args:
        options: with batch sizes as numbers, see `batches.resolve_batches`.

    Raises:
        ConfigError: the run was begun with other options.
    """
    run = options.output
    if not (run / SUMMARY).is_file():
        return None
    check_record(run, to_plain(options), RESUMABLE_CHANGES)
    found = json.loads((run / SUMMARY).read_text())
    return TrainSummary(run, found["steps"], found["samples"], found["skipped"], found["losses"], already_finished=True)
