"""Random reads from a store beside raw memory maps of the same arrays, in one run.

    python benchmarks/read.py

Two made-up stores with samples of 16 to 240 positions: 2,000 samples of payload `topk`, k = 128, logits shaped like a language
model's (V = 49,152, a steep head and a long tail over frequent ids); 600 of payload `hidden`, d = 576, steps of a size that gives
the bytes of real states at the default error. Beside it are raw memory maps, neither compressed nor with checksums: of the store's
own arrays, unpacked by the same code, sample by sample as a data set of a map does, and again with all rows of a batch joined first
and unpacked at once, as the store does; and of what they are unpacked to, ids (int32), logits, hidden states and statistics
(float32).

All sides do the same final work, the trainer's: a DataLoader takes samples in random order, 32 a batch, and joins them into the
tensors that a training step gets (`teacher_columns`), in this process or in 1 or 2 workers that hand them over in shared memory.

*First epoch*: nothing is kept, every chunk is unpacked again for every sample; with the files in memory, and with the operating
system's cache emptied of them first. *Second epoch*: the store has kept the chunks that its process read in the first. Figures are
medians of `REPEATS` interleaved rounds, counted from the first batch on, so without the workers' start.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from switchkd.pipelines.stored_teacher import teacher_columns
from switchkd.stores import Manifest, PartArrays, Payload, StoreTables, StoreWriter, TeacherStore, layout
from switchkd.stores.check_manifest import TEACHER_FIELDS
from switchkd.stores.codec import HiddenSteps, ranks_by_frequency
from switchkd.stores.part import read_whole
from switchkd.stores.payload import empty_payload

SAMPLES = {"topk": 2000, "hidden": 600}
PART, TOP_K, WIDTH, VOCAB_ROWS = 250, 128, 576, 49_152
REPEATS, BATCH = 5, 32
SPREAD, STEP = 2.0, 0.054  # of a state, and its quantisation step: 7.3 bits a feature, as SmolLM2's states have at 0.02

Read = Callable[[Sequence[int]], Payload]


def make_topk(random: np.random.Generator, positions: int) -> Payload:
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


def make_hidden(random: np.random.Generator, positions: int) -> Payload:
    """Draw states and statistics."""
    states = random.normal(scale=SPREAD, size=(positions, WIDTH)).astype(np.float32)
    return Payload(make_topk(random, positions).stats, hidden=states)


def write_store(path: Path, counts: np.ndarray, payload: Payload) -> None:
    """Write the store, PART samples a part."""
    topk = payload.ids is not None
    manifest = Manifest(
        payload="topk" if topk else "hidden", top_k=TOP_K * topk, fine=0.004 * topk, coarse=0.125 * topk,
        hidden_dtype="" if topk else "steps", hidden_width=0 if topk else WIDTH, vocab_rows=VOCAB_ROWS, samples=len(counts),
        part_size=PART, teacher=dict.fromkeys(TEACHER_FIELDS, ""), tokenizer="", template={"name": ""}, image_processor="",
        image_tokens=0, max_length=1 << 20,
        max_image_pixels=0, data="", statuses={"0": "ok"}, written_by={}, hidden_error=0.0 if topk else 0.02,
        stats_dtype=layout.STATS_DTYPE,
    )  # fmt: skip
    frequent = payload.ids if topk else np.arange(VOCAB_ROWS)[None]
    steps = None if topk else HiddenSteps(np.full(WIDTH, STEP, np.float32), np.zeros(WIDTH, np.float32))
    tables = StoreTables(ranks_by_frequency(frequent[:1000], VOCAB_ROWS), steps)
    writer = StoreWriter(path, manifest, lambda: tables)
    begin = 0
    for part in range(manifest.part_count):
        mine = counts[part * PART : (part + 1) * PART]
        arrays = payload.slice(begin, begin + int(mine.sum()))
        begin += int(mine.sum())
        zeros = np.zeros(len(mine), np.uint8)
        writer.write_part(part, PartArrays(zeros, np.ones((len(mine), 3), np.uint64), mine, arrays))


class Indices(Dataset[int]):
    """The numbers of the samples; a batch of them is read when it is joined."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> int:
        return index


class FromMaps:
    """Takes samples' rows out of raw memory maps and makes a payload of them.

    Args:
        unpack: makes it of rows. at_once: of all rows of a batch, joined first; else of each sample's, joined afterwards.
    """

    def __init__(
        self,
        folder: Path,
        arrays: dict[str, np.ndarray],
        counts: np.ndarray,
        unpack: Callable[[dict[str, np.ndarray]], Payload],
        at_once: bool = False,
    ) -> None:
        self.unpack, self.at_once = unpack, at_once
        self.offset = np.concatenate([[0], np.cumsum(counts)])
        self.maps = {}
        folder.mkdir()
        for number, (name, array) in enumerate(arrays.items()):
            array.tofile(folder / str(number))
            mapped = np.memmap(folder / str(number), array.dtype, "r", shape=array.shape)
            self.maps[name] = np.asarray(mapped)  # slices of the subclass take longer

    def __call__(self, indices: Sequence[int]) -> Payload:
        spans = [slice(self.offset[index], self.offset[index + 1]) for index in indices]
        rows = [{name: array[span] for name, array in self.maps.items()} for span in spans]
        if self.at_once:
            return self.unpack({name: np.concatenate([each[name] for each in rows]) for name in self.maps})
        return Payload.concatenate([self.unpack(each) for each in rows])


def stored_arrays(store: TeacherStore) -> dict[str, np.ndarray]:
    """Return a store's arrays as they are before its codecs, all parts joined."""
    parts = [store._part(part).arrays for part in store.parts()]
    names = store.manifest.position_arrays
    return {name: np.concatenate(read_whole(store.storage, [arrays[name] for arrays in parts])) for name in names}


def unpack(store: TeacherStore, rows: dict[str, np.ndarray]) -> Payload:
    """Unpack rows of a store's arrays as the store does."""
    found = empty_payload(store.manifest, len(rows[layout.STATS]))
    store._unpack(rows, [0], found)
    return found


class FromStore:
    """Reads samples from a store."""

    def __init__(self, path: Path, cache_bytes: int) -> None:
        self.store = TeacherStore(path, cache_bytes)

    def __call__(self, indices: Sequence[int]) -> Payload:
        return self.store.payload(indices)


class Columns:
    """Makes of a batch's samples what the trainer makes of them."""

    def __init__(self, read: Read) -> None:
        self.read = read

    def __call__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return teacher_columns(self.read(indices))


def forget(folder: Path) -> None:
    """Have the operating system drop every file below a folder from its cache."""
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def rate(read: Read, order: np.ndarray, workers: int, epochs: int) -> float:
    """Return samples/s of the last epoch."""
    loader = DataLoader(
        Indices(len(order)),
        BATCH,
        sampler=order.tolist(),
        num_workers=workers,
        collate_fn=Columns(read),
        persistent_workers=workers > 0,
    )
    for _ in range(epochs):
        batches = iter(loader)
        next(batches)
        start, counted = time.perf_counter(), sum(1 for _ in batches) * BATCH
        seconds = time.perf_counter() - start
    return counted / seconds


def measure(name: str, folder: Path) -> None:
    """Make a store and its memory map, and read both."""
    random = np.random.default_rng(0)
    counts = random.integers(16, 241, SAMPLES[name])
    payload = {"topk": make_topk, "hidden": make_hidden}[name](random, int(counts.sum()))
    order = random.permutation(len(counts))[: len(counts) // BATCH * BATCH]
    path = folder / "s.zarr"
    write_store(path, counts, payload)
    store = TeacherStore(path)
    stored = stored_arrays(store), counts, partial(unpack, store)
    maps = {
        "map": FromMaps(folder / "stored", *stored),
        "batches": FromMaps(folder / "batches", *stored, at_once=True),
        "unpacked": FromMaps(folder / "unpacked", payload.arrays(), counts, lambda arrays: Payload(**arrays)),
    }
    raw_bytes = sum(array.nbytes for array in payload.arrays().values()) / len(payload)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / len(payload)
    print(
        f"{name}: {len(counts):,} samples, {len(payload):,} positions; {size:.0f} bytes a position, {raw_bytes:.0f} raw"
    )
    print("\n| samples/s | store | positions/s | map | ratio | map, by batches | ratio | map, unpacked | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for workers in (0, 1, 2):
        for what in ("first epoch, files on disk", "first epoch, files in memory", "second epoch"):
            found: dict[str, list[float]] = {side: [] for side in ("store", *maps)}
            epochs, cache_bytes = (2, 1 << 30) if what == "second epoch" else (1, 0)
            for _ in range(REPEATS):
                for side, read in {"store": FromStore(path, cache_bytes), **maps}.items():
                    if what.endswith("disk"):
                        forget(folder)
                    found[side].append(rate(read, order, workers, epochs))
            ours, *others = (statistics.median(rates) for rates in found.values())
            where = f"{workers} worker{'s' * (workers > 1)}" if workers else "in this process"
            beside = " | ".join(f"{other:,.0f} | {ours / other:.0%}" for other in others)
            print(f"| {where}, {what} | {ours:,.0f} | {ours * counts.mean():,.0f} | {beside} |", flush=True)


def main() -> None:
    """Measure both payloads."""
    torch.set_num_threads(1)
    for name in SAMPLES:
        with tempfile.TemporaryDirectory(dir=".") as place:  # not in memory, as /tmp may be
            measure(name, Path(place))
        print()


if __name__ == "__main__":
    main()
