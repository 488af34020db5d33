"""Files in the folder of a run or an evaluation: their names, the record of the options, and atomic writing."""

import os
import shutil
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from switchkd.errors import ConfigError

RECORD = "run.yaml"
SUMMARY = "summary.json"  # of a training run, written last: a run that contains it is finished
BEST = "best.json"  # in the folder of a run's best student
PREDICTIONS = "predictions.jsonl"
SCORES = "scores.json"


def to_plain(options: Any) -> dict[str, Any]:
    """Return an options dataclass as YAML data; paths as text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}


def free_bytes(place: Path) -> int:
    """Return the free bytes of the file system that a path is on, or will be on."""
    there = next(folder for folder in (place, *place.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def read_record(folder: Path) -> dict[str, Any]:
    """Return the options that a run was started with; empty if it is new. Raises ConfigError if the record is damaged."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        before = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not isinstance(before, dict):
        raise ConfigError(f"{path} is damaged: it should hold options by name")
    return before


def check_record(
    folder: Path, options: dict[str, Any], free: Collection[str] = (), later: Collection[str] = ()
) -> None:
    """Check resolved options against those that a run was started with, if it has a record.

    Args:
        folder: the run's output. options: name → YAML value. free: options that may differ when the run is resumed.
        later: names that the record of an earlier version may lack.

    Raises:
        ConfigError: the run was started with other options; names them.
    """
    before = read_record(folder)
    if not before:
        return
    known = [name for name in options if name not in free and (name in before or name not in later)]
    names = [name for name in known if before.get(name) != options[name]]
    if names:
        lines = "\n  ".join(line for name in names for line in _differing(name, before.get(name), options[name]))
        raise ConfigError(f"{folder} was begun with other options:\n  {lines}\nRepeat those, or pass another --output")


def _differing(name: str, before: Any, now: Any) -> list[str]:
    """Return a line for each difference of a value; of a dict of dicts (the entries of a mixture) only what differs."""
    if not (
        isinstance(before, dict) and isinstance(now, dict) and all(map(_is_dict, (*before.values(), *now.values())))
    ):
        return [f"{name}: run {before!r}, now {now!r}"]
    lines = []
    if list(before) != list(now):
        lines.append(f"{name}: run has {', '.join(before)}, now {', '.join(now)}")
    for key in before.keys() & now.keys():
        lines += [
            f"{name}, {key}: {part} {before[key].get(part)!r}, now {now[key].get(part)!r}"
            for part in dict.fromkeys((*before[key], *now[key]))
            if before[key].get(part) != now[key].get(part)
        ]
    return lines


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def record(folder: Path, options: dict[str, Any], free: Collection[str] = (), later: Collection[str] = ()) -> None:
    """Write the resolved options into a run's folder, or check them against those that it was started with.

    Arguments and errors are those of `check_record`.
    """
    check_record(folder, options, free, later)
    if not read_record(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / RECORD, yaml.safe_dump(options, sort_keys=False))


def write_atomically(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Write a file atomically: it exists either completely or not at all; several processes may write the same file.

    Args:
        durable: also after a crash of the machine, and not before everything that was synced earlier.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        if durable:
            sync(unfinished)
        unfinished.rename(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until a folder with everything below it is on the disk. Raises OSError."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)
