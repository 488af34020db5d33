"""The inputs of a report: training runs, evaluations and stores, recognised by the files in a folder."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from switchkd.errors import ConfigError, DataError
from switchkd.pipelines.run_folder import RECORD, SCORES, SUMMARY
from switchkd.pipelines.training.lifecycle.sealed import last_checkpoint
from switchkd.settings import StoreLocation
from switchkd.stores import TeacherStore
from switchkd.stores.storage.open import open_storage

T = TypeVar("T")
STATE = "trainer_state.json"  # of a checkpoint; contains the history of an unfinished run
ITS_TEACHER = "its teacher"  # label of the curve beside a run's own
DEPTH = 3  # levels of folders below a given one that are searched
_NOT_RUNS = ("checkpoint-", ".")


@dataclass(frozen=True)
class TrainRun:
    """A folder that `switchkd train` wrote."""

    label: str
    path: Path
    options: dict[str, Any]  # its run.yaml
    history: list[dict[str, Any]]  # entries with loss parts, one per logging interval
    summary: dict[str, Any] | None  # None: not finished
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # entries with metrics of held-out samples


@dataclass(frozen=True)
class EvalRun:
    """A folder that `switchkd eval` wrote."""

    label: str
    path: Path
    options: dict[str, Any]
    scores: dict[str, Any]

    @property
    def on_benchmarks(self) -> bool:
        """Whether it contains benchmark results, rather than exact match on a data file."""
        return "benchmarks" in self.scores


@dataclass(frozen=True)
class Inputs:
    """Everything that was found below the given folders, in their order."""

    trains: list[TrainRun] = field(default_factory=list)
    evals: list[EvalRun] = field(default_factory=list)
    stores: list[tuple[str, TeacherStore]] = field(default_factory=list)

    @property
    def series(self) -> dict[str, int]:
        """Label → number of its colour: a run and the evaluation of its student share one."""
        labels = dict.fromkeys(run.label for runs in (self.trains, self.evals) for run in runs)
        return {label: number for number, label in enumerate(labels)}


def find_inputs(given: Sequence[tuple[str | None, StoreLocation]]) -> Inputs:
    """Find runs, evaluations and stores at, or up to three folders below, each given place.

    Args:
        given: (label or None, folder or URL of a store). A label names what is found there; without one the folder's name is used,
            with as much of its path as distinguishes it from others of its kind.

    Raises:
        DataError: nothing at or below a place, or a damaged file. StoreError: a damaged store.
    """
    found = Inputs()
    trains: list[tuple[str | None, StoreLocation]] = []
    evals: list[tuple[str | None, StoreLocation]] = []
    stores: list[tuple[str | None, StoreLocation]] = []
    for label, place in given:
        folders = [place] if isinstance(place, str) else [Path(path) for path in _folders(place)]
        if not folders:
            raise DataError(
                f"{place} holds no training run (a folder with {RECORD} and {SUMMARY}), no evaluation ({SCORES}) and no store "
                "(a folder with a zarr.json)"
            )
        for folder in folders:
            if isinstance(folder, str) or _is_store(folder):
                stores.append((label, folder))
            else:
                (evals if (folder / SCORES).is_file() else trains).append((label, folder))
    for (_, path), name in zip(trains, _labels(trains), strict=True):
        found.trains.append(_read_train(name, Path(path)))
    for (_, path), name in zip(evals, _labels(evals), strict=True):
        found.evals.append(EvalRun(name, Path(path), _yaml(Path(path) / RECORD), _json(Path(path) / SCORES)))
    for (_, location), name in zip(stores, _labels(stores), strict=True):
        found.stores.extend((name, TeacherStore.open(store)) for store in open_storage(location).stores())
    return found


def named(name: str, given: Iterable[tuple[str, T]], option: str, what: str) -> T:
    """Return the input with a label.

    Args:
        given: (label, input). option: that asks for it. what: kind of input, in words.

    Raises:
        ConfigError: no input, or more than one, has that label.
    """
    labelled = list(given)
    found = [one for label, one in labelled if label == name]
    if len(found) != 1:
        there = ", ".join(dict.fromkeys(label for label, _ in labelled)) or "none"
        how = "no" if not found else f"{len(found)} times the"
        raise ConfigError(f"{option} {name}: there is {how} {what} of that name among those given; there are: {there}")
    return found[0]


def _folders(place: Path) -> Iterator[Path]:
    """Yield the folders of runs and stores at or below a place, by name."""
    pending = [(place, 0)]
    while pending:
        folder, depth = pending.pop(0)
        if _is_store(folder) or (folder / SCORES).is_file() or _is_train(folder):
            yield folder
        elif depth < DEPTH and folder.is_dir():
            below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(_NOT_RUNS))
            pending += [(path, depth + 1) for path in below]


def _is_store(folder: Path) -> bool:
    return (folder / "zarr.json").is_file()


def _is_train(folder: Path) -> bool:
    return (folder / RECORD).is_file() and ((folder / SUMMARY).is_file() or last_checkpoint(folder) is not None)


def _read_train(label: str, folder: Path) -> TrainRun:
    summary = _json(folder / SUMMARY) if (folder / SUMMARY).is_file() else None
    if summary is None:
        checkpoint = last_checkpoint(folder)
        assert checkpoint is not None
        history = _json(checkpoint / STATE)["log_history"]
    else:
        history = summary["history"]
    logged, evaluated = ([entry for entry in history if key in entry] for key in ("loss_ce", "eval_loss_ce"))
    return TrainRun(label, folder, _yaml(folder / RECORD), logged, summary, evaluated)


def _labels(given: Sequence[tuple[str | None, StoreLocation]]) -> list[str]:
    """Name every place by the fewest last folders that make the names differ; a given label is kept if it is given once."""
    once = [label for label, count in Counter(label for label, _ in given).items() if label is not None and count == 1]
    parts = [str(place).rstrip("/").split("/") for _, place in given]
    unnamed = [words for (label, _), words in zip(given, parts, strict=True) if label not in once]
    count = 1
    while count < max(map(len, unnamed), default=1) and len({tuple(p[-count:]) for p in unnamed}) < len(unnamed):
        count += 1
    names = []
    for (label, _), words in zip(given, parts, strict=True):
        name = "/".join(words[-count:])
        names.append(label if label in once else " ".join(filter(None, (label, name))))
    return names


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return found


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}
