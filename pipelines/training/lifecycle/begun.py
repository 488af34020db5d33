"""What a run's folder says about its progress, read without torch: its checkpoints, and whether it has saved anything."""

from pathlib import Path

from switchkd.pipelines.run_folder import SUMMARY

PREFIX = "checkpoint-"


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
