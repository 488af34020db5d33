"""Random reads from a store beside a raw memory map of the same arrays, in one run.

    python benchmarks/read.py [--zarrs]      # --zarrs: zarr's Rust pipeline (extra `fast`)

A store of 2,000 samples of 16 to 240 positions, k = 128, logits shaped like a language model's (V = 49,152, a steep head and a
long tail over frequent ids). Every sample is read once in random order: cold with no cache, warm a second time with the default
cache. The memory map holds ids (int32), logits and statistics (float32) as they are and copies the sample's rows.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr

from switchkd.stores import Manifest, PartArrays, Payload, StoreWriter, TeacherStore
from switchkd.stores.codec import ranks_by_frequency

SAMPLES, PART, TOP_K, VOCAB_ROWS = 2000, 250, 128, 49_152


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


def measure(name: str, read: Callable[[int], int], order: np.ndarray) -> float:
    """Print and return samples/s."""
    start = time.perf_counter()
    positions = sum(read(int(index)) for index in order)
    seconds = time.perf_counter() - start
    print(f"{name:<34}{len(order) / seconds:>12,.0f} samples/s{positions / seconds:>14,.0f} positions/s")
    return len(order) / seconds


def main() -> None:
    """Make both, read both."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--zarrs", action="store_true")
    if arguments.parse_args().zarrs:
        import zarrs  # noqa: F401

        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    random = np.random.default_rng(0)
    counts = random.integers(16, 241, SAMPLES)
    offset = np.concatenate([[0], np.cumsum(counts)])
    payload = make_payload(random, int(offset[-1]))
    order = random.permutation(SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.zarr"
        write_store(path, counts, payload)
        maps = {}
        for name, array in payload.arrays().items():
            array.tofile(Path(folder) / name)
            maps[name] = np.memmap(Path(folder) / name, array.dtype, "r", shape=array.shape)

        def from_maps(index: int) -> int:
            begin, end = offset[index], offset[index + 1]
            copies = [np.array(array[begin:end]) for array in maps.values()]
            return len(copies[0])

        raw_bytes = sum(array.nbytes for array in payload.arrays().values()) / len(payload)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / len(payload)
        print(
            f"{SAMPLES:,} samples, {len(payload):,} positions; {size:.0f} bytes a position against {raw_bytes:.0f} raw"
        )
        measure("raw memory map, first", from_maps, order)
        raw = measure("raw memory map, again", from_maps, order)
        cold, warm = TeacherStore(path, cache_bytes=0), TeacherStore(path, cache_bytes=1 << 30)
        first = measure("store, no cache", lambda i: len(cold[i].payload), order)
        measure("store, filling the cache", lambda i: len(warm[i].payload), order)
        again = measure("store, from the cache", lambda i: len(warm[i].payload), order)
        print(f"of the memory map's speed: {first / raw:.1%} without a cache, {again / raw:.1%} from it")


if __name__ == "__main__":
    main()
