"""The best student of a run, beside the last one: a folder that is replaced as a whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from switchkd.errors import ConfigError
from switchkd.pipelines.run_folder import BEST, sync, sync_tree, write_atomically
from switchkd.pipelines.training.lifecycle.sealed import UNFINISHED
from switchkd.pipelines.training.option_groups.held_out import Metric

FOLDER = "best"
OLD = "best-before"
NAMES: dict[Metric, str] = {
    "loss": "eval_loss",
    "ce": "eval_loss_ce",
    "align": "eval_loss_align",
    "vsd": "eval_loss_vsd",
    "exact-match": "eval_exact_match",
}


class BestStudent:
    """Keeps the student with the best value of a metric so far: the largest exact match, the smallest loss; the first of equals.

    Args:
        run: the run's folder. metric: see `Metric`. identity: what the metric is made of.
        about: recorded with the student.

    Raises:
        ConfigError: the folder holds the best by another metric, or of other held-out samples.
    """

    def __init__(self, run: Path, metric: Metric, identity: str, about: dict[str, Any]) -> None:
        self.run, self.metric, self.identity, self.about = run, metric, identity, about
        kept = read_best(run)
        if kept is not None and (kept["metric"], kept["held_out"]) != (metric, identity):
            raise ConfigError(
                f"{run / FOLDER} is the best by {kept['metric']} of {kept['held_out']}; now it is {metric} of {identity}. Repeat "
                "the options that it was kept with, or move it away"
            )
        self.value: float | None = None if kept is None else kept["value"]

    def improves(self, metrics: dict[str, float]) -> bool:
        """Whether an evaluation is better than all before it."""
        value = metrics.get(NAMES[self.metric])
        if value is None or value != value:  # no answer, or NaN
            return False
        if self.value is None:
            return True
        return value > self.value if self.metric == "exact-match" else value < self.value

    def keep(self, step: int, metrics: dict[str, float], save: Callable[[Path], None], first: bool) -> None:
        """Write the student of a step in place of the one before; every process calls it.

        Args:
            save: writes the student into a folder, in all processes. first: whether this process writes.

        Raises:
            OSError: the one before is still there.
        """
        self.value = metrics[NAMES[self.metric]]
        unfinished = self.run / UNFINISHED / FOLDER
        if first:
            shutil.rmtree(unfinished, ignore_errors=True)
        save(unfinished)
        if not first:
            return
        about = {
            "metric": self.metric,
            "value": self.value,
            "step": step,
            "held_out": self.identity,
            "metrics": metrics,
        }
        write_atomically(unfinished / BEST, json.dumps(about | self.about, indent=1))
        sync_tree(unfinished)
        if (self.run / FOLDER).exists():
            shutil.rmtree(self.run / UNFINISHED / OLD, ignore_errors=True)
            (self.run / FOLDER).rename(self.run / UNFINISHED / OLD)
        unfinished.rename(self.run / FOLDER)
        sync(self.run)
        shutil.rmtree(self.run / UNFINISHED / OLD, ignore_errors=True)


def read_best(run: Path) -> dict[str, Any] | None:
    """Return what a run's best student records; None without one. Raises ConfigError if the record is damaged."""
    path = run / FOLDER / BEST
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found["metric"], found["value"], found["held_out"]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged: {error!r}; move {path.parent} away") from None
    return found


def recover_best(run: Path) -> None:
    """Finish what a run that was killed between two renames left; call it before a run goes on."""
    for name in (FOLDER, OLD):
        kept = run / UNFINISHED / name
        if not (run / FOLDER).exists() and (kept / BEST).is_file():
            kept.rename(run / FOLDER)
