"""Capture with vLLM beside capture with transformers, and vLLM's engine without capture: same data, same teacher, one run.

    make bench-vllm                              # python benchmarks/backends.py in vLLM's environment
    make bench-vllm-real                         # the same with --real: the width, depth and vocabularies of published models

A Llava of random weights (LM 256-d, 4 layers, V = 8,000; 64 tokens an image; float32), 96 samples of about 140 tokens with about
30 supervised ones, payload topk, k = 128. Encoding is done before. Rounds alternate between the ways; medians of samples/s.

With --real the LLM has SmolLM2-135M's shape (576-d, 30 layers) and V = 49,152, then V = 151,936; 16 samples; both payloads.

*The engine alone* gets the same requests for no position: no LM head, no selection, nothing returned. What capture adds to it is
the overhead. *One image, eight questions* asks about 12 images only, with the prefix cache and, to compare, told not to read it.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import tiny  # tests/helpers, on PYTHONPATH
import torch
from transformers import LlamaConfig

from switchkd.data.encoded import EncodedSample, collate
from switchkd.models.vlm import states_at_positions
from switchkd.pipelines.capture.backends.base import Backend
from switchkd.pipelines.capture.backends.transformers_backend import TransformersBackend
from switchkd.pipelines.capture.backends.vllm_backend import VllmBackend
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.capture.worker import CaptureWorker
from switchkd.stores import Manifest

SAMPLES, QUESTIONS_AN_IMAGE, BATCH = 96, 8, 16
PLAIN, VLLM, ENGINE = "transformers", "vLLM", "vLLM's engine alone"


def write_data(folder: Path, images: int, samples: int = SAMPLES) -> Path:
    """Write questions of 20 to 60 words and answers of 10 to 50 about `images` images."""
    random = np.random.default_rng(0)
    rows = tiny.rows(samples)
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


def rates(ways: dict[str, Callable[[], None]], rounds: int, samples: int = SAMPLES) -> dict[str, float]:
    """Return the median samples/s of each way; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: samples / statistics.median(times[1:]) for name, times in seconds.items()}


def smollm2(vocabulary: int) -> LlamaConfig:
    """Return a config of SmolLM2-135M's shape with another vocabulary."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def real(vocabulary: int, rounds: int) -> None:
    """Print what capture adds to each backend at a published model's width and vocabulary."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = tiny.WORDS + [f"w{i}" for i in range(vocabulary - len(tiny.WORDS))]
        vision = tiny.vision_config(size=64, patch=8, layers=4)
        teacher = tiny.checkpoint(folder / "teacher", 0, language=smollm2(vocabulary), words=words, vision=vision)
        worker = open_worker(teacher, write_data(folder / "data", 16, 16))
        samples = [worker.encoder.encode(sample) for sample in worker.samples]
        topk, hidden = (replace(worker.manifest, payload=payload) for payload in ("topk", "hidden"))
        hidden = replace(hidden, top_k=0, fine=0.0, coarse=0.0)
        vllm = VllmBackend(worker.checkpoint, "float32", 256)
        found = rates(
            {
                "vLLM, topk": partial(with_vllm, vllm, samples, topk),
                "vLLM, hidden": partial(with_vllm, vllm, samples, hidden),
                ENGINE: partial(engine_alone, vllm, samples, topk),
            },
            rounds,
            len(samples),
        )
        vllm.engine.engine_core.shutdown()
        plain = TransformersBackend(worker.checkpoint, "cpu", "float32")
        found |= rates(
            {
                "transformers, topk": partial(in_batches, plain, samples, topk),
                "transformers, hidden": partial(in_batches, plain, samples, hidden),
                "transformers, its forward pass alone": partial(forward_alone, plain, samples),
            },
            rounds,
            len(samples),
        )
        positions = np.mean([sample.positions for sample in samples])
        tokens = np.mean([len(sample.input_ids) for sample in samples])
        print(f"V = {vocabulary:,}: {len(samples)} samples of {tokens:.0f} tokens, {positions:.0f} positions")
        for way, rate in found.items():
            alone = found[ENGINE if "vLLM" in way else "transformers, its forward pass alone"]
            print(f"{way:<44}{rate:>8.2f} samples/s, {alone / rate:.3f} of the time without capture")


@torch.inference_mode()
def forward_alone(backend: TransformersBackend, samples: Sequence[EncodedSample]) -> None:
    """Run the teacher's body over the same batches, without LM head and selection."""
    for first in range(0, len(samples), BATCH):
        states_at_positions(backend.model, collate(samples[first : first + BATCH], backend.pad_id))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--real", action="store_true", help="SmolLM2's width, V = 49,152 and 151,936")
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49_152, 151_936], help="with --real")
    asked = parser.parse_args()
    rounds = asked.rounds
    if asked.real:
        for vocabulary in asked.vocabulary:
            real(vocabulary, rounds)
        return
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
