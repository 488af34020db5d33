"""A small mixture: two data files cut from one, and their stores."""

import json
from pathlib import Path

import tiny
import yaml

from switchkd.pipelines.capture.mixture import cache_mixture
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.mixture import read_mixture

FIRST = 7  # of 12 rows are those of the first file


def write(folder: Path, name="mixture.yaml", **settings) -> Path:
    """Write a mixture of a.json and b.json of a folder; `a` and `b` are further keys of their entries."""
    entries = [{"data": str(folder / f"{of}.json"), **settings.get(of, {})} for of in "ab"]
    path = folder / name
    path.write_text(yaml.safe_dump(entries))
    return path


def cut(folder: Path) -> Path:
    """Write 12 rows as data.json, and cut into a.json and b.json; returns the mixture."""
    rows = tiny.rows(12, text_only=(3,), two_turns=(5, 9))
    tiny.data(folder, rows)
    (folder / "a.json").write_text(json.dumps(rows[:FIRST]))
    (folder / "b.json").write_text(json.dumps(rows[FIRST:]))
    return write(folder)


def cache_options(teacher: Path, folder: Path, **changed) -> CacheOptions:
    """The options of a capture whose payload is all logits of a small vocabulary."""
    settings = {"template": "qa", "part_size": 5, "payload": "topk", "fine": 1 / 4096, "coarse": 1 / 4096}
    given = {"data": folder / "mixture.yaml", "out": folder / "stores"} | settings | changed
    return CacheOptions(teacher=teacher, images=folder / "images", **given)


def cache(teacher: Path, folder: Path, **changed):
    """Cache the mixture of a folder; returns entry → result."""
    options = cache_options(teacher, folder, **changed)
    return cache_mixture(read_mixture(options.data), options)
