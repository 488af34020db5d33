"""Random reads from a store beside a raw memory map of the same arrays, in one run.

    python benchmarks/read.py

A store of 2,000 samples of 16 to 240 positions, k = 128, logits shaped like a language model's (V = 49,152, a steep head and a
long tail over frequent ids). Every sample is read in random order: in this process, and by 1 and 2 DataLoader workers in batches
of 32; with the files in memory, and with the operating system's cache emptied of them first. The memory map holds ids (int32),
logits and statistics (float32) as they are and copies the sample's rows. Figures are medians of `REPEATS` interleaved rounds.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from switchkd.stores import Manifest, PartArrays, Payload, StoreWriter, TeacherStore
from switchkd.stores.codec import ranks_by_frequency

SAMPLES, PART, TOP_K, VOCAB_ROWS = 2000, 250, 128, 49_152
REPEATS, BATCH = 3, 32


def make_payload(random: np.random.Generator, positions: int) -> Payload:
    """Draw distinct ids, frequent ones more often, and logits that fall steeply."""
    ids = np.empty((positions, TOP_K), np.int32)
    for row in ids:
        drawn = np.unique((VOCAB_ROWS * random.random(3 * TOP_K) ** 4).astype(np.int32))
        row[:] = random.permutation(drawn)[:TOP_K]
    logits = (18 - 2.2 * np.log1p(np.arange(TOP_K)) + random.normal(scale=0.3, size=(positions, TOP_K))).astype(
        np.float32
    )
    logits = -np.sort(-logits, axis=-1)
    logsumexp = np.log(np.exp(logits.astype(np.float64)).sum(-1)) + 0.05
    knee = random.integers(1500, 4500, positions)
    stats = np.stack([logits[:, 0], logits[:, -1] - 15, logsumexp, logsumexp - 3, knee], -1).astype(np.float32)
    return Payload(stats, ids, logits)


def write_store(path: Path, counts: np.ndarray, payload: Payload) -> None:
    """Write the store, PART samples a part."""
    manifest = Manifest(
        payload="topk", top_k=TOP_K, fine=0.004, coarse=0.125, hidden_dtype="", hidden_width=0, vocab_rows=VOCAB_ROWS,
        samples=SAMPLES, part_size=PART, teacher={}, tokenizer="", template={"name": ""}, image_processor="", image_tokens=0,
        max_length=0, max_image_pixels=0, data="", statuses={"0": "ok"}, written_by={},
    )  # fmt: skip
    writer = StoreWriter(path, manifest, lambda: ranks_by_frequency(payload.ids[:1000], VOCAB_ROWS))
    begin = 0
    for part in range(manifest.part_count):
        mine = counts[part * PART : (part + 1) * PART]
        arrays = payload.slice(begin, begin + int(mine.sum()))
        begin += int(mine.sum())
        zeros = np.zeros(len(mine), np.uint8)
        writer.write_part(part, PartArrays(zeros, np.ones((len(mine), 3), np.uint64), mine, arrays))


class Samples(Dataset[dict[str, np.ndarray]]):
    """The arrays of each sample, however they are read."""

    def __init__(self, read: Callable[[int], dict[str, np.ndarray]]) -> None:
        self.read = read

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.read(index)


class FromMaps:
    """Copies a sample's rows out of raw memory maps."""

    def __init__(self, folder: Path, payload: Payload, counts: np.ndarray) -> None:
        self.offset = np.concatenate([[0], np.cumsum(counts)])
        self.maps = {}
        for name, array in payload.arrays().items():
            array.tofile(folder / name)
            self.maps[name] = np.memmap(folder / name, array.dtype, "r", shape=array.shape)

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        begin, end = self.offset[index], self.offset[index + 1]
        return {name: np.array(array[begin:end]) for name, array in self.maps.items()}


class FromStore:
    """Reads a sample from a store."""

    def __init__(self, path: Path, cache_bytes: int) -> None:
        self.store = TeacherStore(path, cache_bytes)

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        return self.store[index].payload.arrays()


def forget(folder: Path) -> None:
    """Have the operating system drop every file below a folder from its cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def rate(read: Callable[[int], Any], order: np.ndarray, workers: int) -> float:
    """Return samples/s."""
    if workers == 0:
        start = time.perf_counter()
        for index in order:
            read(int(index))
        return len(order) / (time.perf_counter() - start)
    loader = DataLoader(Samples(read), BATCH, sampler=order.tolist(), num_workers=workers, collate_fn=list)
    start, counted = 0.0, 0
    for batch in loader:  # from the first batch on, so that the workers' start is not counted
        if not start:
            start = time.perf_counter()
            continue
        counted += len(batch)
    return counted / (time.perf_counter() - start)


def main() -> None:
    """Make both, read both."""
    random = np.random.default_rng(0)
    counts = random.integers(16, 241, SAMPLES)
    payload = make_payload(random, int(counts.sum()))
    order = random.permutation(SAMPLES)
    with tempfile.TemporaryDirectory(dir=".") as place:  # not in memory, as /tmp may be
        folder = Path(place)
        write_store(folder / "s.zarr", counts, payload)
        raw = FromMaps(folder, payload, counts)
        raw_bytes = sum(array.nbytes for array in payload.arrays().values()) / len(payload)
        size = sum(file.stat().st_size for file in (folder / "s.zarr").rglob("*") if file.is_file()) / len(payload)
        print(f"{SAMPLES:,} samples, {len(payload):,} positions; {size:.0f} bytes a position, {raw_bytes:.0f} raw")
        kept = FromStore(folder / "s.zarr", 1 << 30)
        rate(kept, order, 0)
        print(f"{'':<44}{'memory map':>12}{'store':>12}{'ratio':>8}   samples/s, medians of {REPEATS}")
        for workers in (0, 1, 2):
            for where in ("decoded before", "files in memory", "files on disk"):
                if where == "decoded before" and workers:
                    continue  # each worker would fill a cache of its own first
                found: dict[str, list[float]] = {"raw": [], "store": []}
                for _ in range(REPEATS):
                    store = kept if where == "decoded before" else FromStore(folder / "s.zarr", 0)
                    for name, read in (("raw", raw), ("store", store)):
                        if where == "files on disk":
                            forget(folder)
                        found[name].append(rate(read, order, workers))
                a, b = (statistics.median(found[name]) for name in ("raw", "store"))
                line = f"{workers} workers, {where}" if workers else f"in this process, {where}"
                print(f"{line:<44}{a:>12,.0f}{b:>12,.0f}{b / a:>8.1%}")


if __name__ == "__main__":
    main()
