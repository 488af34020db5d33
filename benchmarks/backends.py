"""Capture with vLLM beside capture with transformers, and vLLM's engine without capture: same data, same teacher, one run.

    make bench-vllm                              # python benchmarks/backends.py in vLLM's environment

A Llava of random weights (LM 256-d, 4 layers, V = 8,000; 64 tokens an image; float32), 96 samples of about 140 tokens with about
30 supervised ones, payload topk, k = 128. Encoding is done before. Rounds alternate between the ways; medians of samples/s.

*The engine alone* gets the same requests for no position: no LM head, no selection, nothing returned. What capture adds to it is
the overhead. *One image, eight questions* asks about 12 images only, with the prefix cache and, to compare, told not to read it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import tiny  # tests/helpers, on PYTHONPATH

from switchkd.data.encoded import EncodedSample
from switchkd.pipelines.capture.backends.base import Backend
from switchkd.pipelines.capture.backends.transformers_backend import TransformersBackend
from switchkd.pipelines.capture.backends.vllm_backend import VllmBackend
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.capture.worker import CaptureWorker
from switchkd.stores import Manifest

SAMPLES, QUESTIONS_AN_IMAGE, BATCH = 96, 8, 16
PLAIN, VLLM, ENGINE = "transformers", "vLLM", "vLLM's engine alone"


def write_data(folder: Path, images: int) -> Path:
    """Write questions of 20 to 60 words and answers of 10 to 50 about `images` images."""
    random = np.random.default_rng(0)
    rows = tiny.rows(SAMPLES)
    for index, row in enumerate(rows):
        row["image"] = f"{index % images:03d}.png"
        question, answer = (
            " ".join(f"w{i}" for i in random.integers(0, 7900, n)) for n in random.integers((20, 10), (60, 50))
        )
        row["conversations"] = tiny.conversation((f"<image>\n{question}", answer))
    return tiny.data(folder, rows)


def open_worker(teacher: Path, data: Path) -> CaptureWorker:
    """Return what encodes and describes the capture of a data file."""
    return CaptureWorker(
        CacheOptions(
            teacher=teacher, data=data, out=data.parent / "s.zarr", images=data.parent / "images", template="qa"
        )
    )


def in_batches(backend: Backend, samples: Sequence[EncodedSample], manifest: Manifest) -> None:
    """Capture as `cache-teacher` does with transformers."""
    for first in range(0, len(samples), BATCH):
        backend.capture(samples[first : first + BATCH], manifest)


def forget(backend: VllmBackend) -> None:
    """Empty the engine's caches, which the round before has filled."""
    backend.engine.reset_prefix_cache()
    backend.engine.reset_encoder_cache()


def with_vllm(backend: VllmBackend, samples: Sequence[EncodedSample], manifest: Manifest) -> None:
    """Capture as `cache-teacher` does with vLLM."""
    forget(backend)
    backend.capture(samples, manifest)


def without_prefix_cache(backend: VllmBackend, samples: Sequence[EncodedSample], manifest: Manifest) -> None:
    """Capture, but compute every prefix."""
    forget(backend)
    names = [backend._add(sample, manifest, cached_prefix=False) for sample in samples]
    for name, sample in zip(names, samples, strict=True):
        backend._wait(name, sample)


def engine_alone(backend: VllmBackend, samples: Sequence[EncodedSample], manifest: Manifest) -> None:
    """Run the engine over the same requests for no position."""
    forget(backend)
    with patch("switchkd.pipelines.capture.backends.vllm_backend.predicting_runs", lambda supervised: []):
        requests, _ = backend.start(samples, manifest)
    for sample, name in requests:
        backend._wait(name, sample)


def rates(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the median samples/s of each way; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: SAMPLES / statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = tiny.WORDS + [f"w{i}" for i in range(8000 - len(tiny.WORDS))]
        vision = tiny.vision_config(size=64, patch=8, layers=4)
        teacher = tiny.checkpoint(folder / "teacher", 0, width=256, layers=4, words=words, vision=vision)
        apart = open_worker(teacher, write_data(folder / "apart", SAMPLES))
        alike = open_worker(teacher, write_data(folder / "alike", SAMPLES // QUESTIONS_AN_IMAGE))
        plain = TransformersBackend(apart.checkpoint, "cpu", "float32")
        vllm = VllmBackend(apart.checkpoint, "float32", 256)
        samples, others = ([w.encoder.encode(sample) for sample in w.samples] for w in (apart, alike))
        manifest = apart.manifest
        found = rates(
            {
                PLAIN: partial(in_batches, plain, samples, manifest),
                VLLM: partial(with_vllm, vllm, samples, manifest),
                ENGINE: partial(engine_alone, vllm, samples, manifest),
                "one image, eight questions: transformers": partial(in_batches, plain, others, manifest),
                "one image, eight questions: vLLM": partial(with_vllm, vllm, others, manifest),
                "… without reading the prefix cache": partial(without_prefix_cache, vllm, others, manifest),
            },
            rounds,
        )
        tokens = np.mean([len(sample.input_ids) for sample in samples])
        positions = np.mean([sample.positions for sample in samples])
        print(f"{SAMPLES} samples of {tokens:.0f} tokens, {positions:.0f} positions; medians of {rounds} rounds")
        for way, rate in found.items():
            print(f"{way:<44}{rate:>8.1f} samples/s")
        print(f"vLLM / transformers: {found[VLLM] / found[PLAIN]:.2f}")
        added = 1 / found[VLLM] - 1 / found[ENGINE]  # seconds a sample
        print(
            f"capture adds {100 * added * found[ENGINE]:.0f} % to the engine's time, {1e3 * added / positions:.2f} ms a position"
        )


if __name__ == "__main__":
    main()
