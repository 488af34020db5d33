"""Synthetic teacher stores: manifests and part arrays from seeds, no model. Spawned workers import this: no torch."""

import os
import re
import signal
import sys
from pathlib import Path

import numpy as np

from switchkd.stores import Manifest, PartArrays, Payload, StoreTables, StoreWriter
from switchkd.stores.codec import HiddenSteps, round_stats

# Positions of a sample: none, one, some, and runs that end on, before and behind the border of a chunk of 256.
LENGTHS = (0, 1, 3, 40, 216, 255, 256, 257, 600)


def manifest(**changed) -> Manifest:
    fields = {
        "payload": "topk",
        "top_k": 6,
        "fine": 1 / 64,
        "coarse": 1 / 16,
        "hidden_dtype": "",
        "hidden_width": 0,
        "vocab_rows": 50,
        "samples": 18,
        "part_size": 4,
        "teacher": {"config": "c0", "vision": "v0", "projector": "p0", "language": "l0", "dtype": "float32"},
        "tokenizer": "t0",
        "template": {"name": "qa", "system": ""},
        "image_processor": "i0",
        "image_tokens": 4,
        "max_length": 1024,
        "max_image_pixels": 1000,
        "data": "d0",
        "statuses": {"0": "ok", "1": "image_missing", "2": "too_long"},
        "written_by": {"backend": "synthetic"},
    }
    return Manifest(**(fields | changed))


def id_of_rank(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).permutation(rows).astype(np.uint32)


def tables(of: Manifest) -> StoreTables:
    random = np.random.default_rng(of.hidden_width)
    step = random.uniform(0.01, 0.02, of.hidden_width).astype(np.float32)
    steps = HiddenSteps(step, random.normal(size=of.hidden_width).astype(np.float32))
    return StoreTables(id_of_rank(of.vocab_rows), steps if of.hidden_dtype == "steps" else None)


def part_arrays(of: Manifest, part: int, lengths=LENGTHS) -> PartArrays:
    """Make what a capture would hand over; the same manifest and part give the same arrays in every process."""
    random = np.random.default_rng(part)
    samples = len(of.part_samples(part))
    positions = random.choice(lengths, samples).astype(np.int64)
    status = np.where(positions == 0, random.integers(1, len(of.statuses), samples), 0).astype(np.uint8)
    digest = random.integers(0, 1 << 64, (samples, 3), dtype=np.uint64) * (status == 0)[:, None]
    z = random.normal(scale=4, size=(positions.sum(), of.vocab_rows)).astype(np.float32)  # [P, N]
    ids = np.argsort(-z, axis=-1)
    ordered = np.take_along_axis(z, ids, -1).astype(np.float64)
    with np.errstate(divide="ignore"):  # no tail if K = N: log 0
        tail = np.log(np.exp(ordered[:, of.top_k :]).sum(-1))
    columns = {
        "z_max": ordered[:, 0],
        "z_min": ordered[:, -1],
        "logsumexp": np.log(np.exp(ordered).sum(-1)),
        "tail_logsumexp": tail,
        "knee": random.integers(2, of.vocab_rows + 1, len(z)),
    }
    stats = round_stats(np.stack(list(columns.values()), -1))  # so that what is read equals what was handed over
    return PartArrays(
        status=status,
        digest=digest,
        positions=positions,
        tokens=((positions + 5) * (status == 0)).astype(np.uint32),
        payload=Payload(
            stats=stats,
            ids=ids[:, : of.top_k].astype(np.int32) if of.has_topk else None,
            logits=ordered[:, : of.top_k].astype(np.float32) if of.has_topk else None,
            hidden=random.normal(size=(len(z), of.hidden_width)).astype(np.float32) if of.has_hidden else None,
        ),
    )


def sample_arrays(of: Manifest, index: int, lengths=LENGTHS) -> dict:
    """What was handed over for one sample: status, digest, ids, logits, stats."""
    part, row = divmod(index, of.part_size)
    arrays = part_arrays(of, part, lengths)
    end = int(arrays.positions[: row + 1].sum())
    rows = slice(end - int(arrays.positions[row]), end)
    return {
        "status": int(arrays.status[row]),
        "digest": tuple(int(value) for value in arrays.digest[row]),
        **arrays.payload.slice(rows.start, rows.stop).arrays(),
    }


def open_writer(path: Path, of: Manifest) -> StoreWriter:
    return StoreWriter(path, of, lambda: tables(of))


def fill(path: Path, of: Manifest, shard=(0, 1), lengths=LENGTHS, barrier=None, die_at=None) -> Path:
    """Open or create a store and write what is missing; with `die_at`, SIGKILL this process at that file system act."""
    if die_at is not None:
        _die_at(die_at, path.parent)
    if barrier is not None:
        barrier.wait(60)
    writer = open_writer(path, of)
    for part in writer.missing_parts(shard):
        writer.write_part(part, part_arrays(of, part, lengths))
    return path


def _die_at(act: int, below: Path) -> None:
    """An act is the opening, making, renaming or removing of a file or folder below `below`."""
    acts = iter(range(1, act))

    def count(event, arguments):
        counted = event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir")
        if counted and str(arguments[0]).startswith(str(below)) and next(acts, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a store, by its path inside it."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def without_writer(files: dict[str, bytes]) -> dict[str, bytes]:
    """Take out who wrote each part and when: the only bytes that may differ between two stores of one identity."""
    return {
        name: re.sub(rb'"written": \{[^}]*\}', b"", data) if name.endswith("zarr.json") else data
        for name, data in files.items()
    }


def assert_same_store(found: Path, expected: Path) -> None:
    a, b = without_writer(contents(found)), without_writer(contents(expected))
    assert sorted(a) == sorted(b)
    assert [name for name in a if a[name] != b[name]] == []
