"""What capture adds to the time of vLLM's engine and of transformers' forward pass, at a published model's width and vocabularies.

    make bench-vllm               # python benchmarks/backends.py in vLLM's environment; writes docs/backends-table.md

A Llava of random weights whose LLM has SmolLM2-135M's shape (576-d, 30 layers), with SmolLM2's vocabulary and with one as large as
Qwen2.5's; float32, one thread of a CPU. Samples of two shapes: *short*, and those of LLaVA-Mix-665K as docs/cluster.md assumes
them. Encoding is done before. Both backends run in one process and its CPU time is taken, so that other work on the machine
disturbs little; rounds alternate between the ways of a backend. The least of the rounds is taken, since other work can only add.

*The engine alone* gets the same requests for no position: no LM head, no selection, nothing returned; *the forward pass alone* is
the teacher's body. The *LM head* makes the logits of the supervised positions, which no way of reading a teacher can do without.
*Packing* is selection, knee and statistics of them.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import tiny  # tests/helpers, on PYTHONPATH
import torch
from torch import Tensor
from transformers import LlamaConfig

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported: the engine runs in this process

from switchkd.data.encoded import EncodedSample, collate
from switchkd.models.vlm import states_at_positions
from switchkd.pipelines.capture.backends.base import Backend
from switchkd.pipelines.capture.backends.packed_rows import pack
from switchkd.pipelines.capture.backends.transformers_backend import TransformersBackend
from switchkd.pipelines.capture.backends.vllm_backend import VllmBackend
from switchkd.pipelines.capture.manifest import with_payload
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.capture.worker import CaptureWorker
from switchkd.stores import Manifest

BATCH = 16
VOCABULARIES = (49_152, 152_064)
PAYLOADS = ("topk", "hidden")
ALONE = {"vLLM": "the engine alone", "transformers": "the forward pass alone"}


@dataclass(frozen=True)
class Shape:
    """The samples of a measurement."""

    samples: int
    image_side: int  # in patches; that squared is the number of image tokens
    question: tuple[int, int]  # words, from and below
    answer: tuple[int, int]
    max_length: int = 1024


SHAPES = {
    "short": Shape(16, 8, (20, 60), (10, 50)),
    "LLaVA-Mix-665K": Shape(4, 27, (105, 106), (88, 89)),
}


def write_data(folder: Path, shape: Shape) -> Path:
    """Write a data file of samples with one image each."""
    random = np.random.default_rng(0)
    rows = tiny.rows(shape.samples)
    for index, row in enumerate(rows):
        row["image"] = f"{index:03d}.png"
        question, answer = (
            " ".join(f"w{i}" for i in random.integers(0, 7900, random.integers(*words)))
            for words in (shape.question, shape.answer)
        )
        row["conversations"] = tiny.conversation((f"<image>\n{question}", answer))
    return tiny.data(folder, rows)


def open_worker(teacher: Path, data: Path, shape: Shape) -> CaptureWorker:
    """Return what encodes and describes the capture of a data file, of both payloads."""
    return CaptureWorker(
        CacheOptions(
            teacher=teacher,
            data=data,
            out=data.parent / "s.zarr",
            images=data.parent / "images",
            template="qa",
            payload="both",
            max_length=shape.max_length,
        )
    )


def in_batches(backend: Backend, samples: Sequence[EncodedSample], manifest: Manifest) -> None:
    """Capture as `cache-teacher` does with transformers."""
    for first in range(0, len(samples), BATCH):
        backend.capture(samples[first : first + BATCH], manifest)


@torch.inference_mode()
def forward_alone(backend: TransformersBackend, samples: Sequence[EncodedSample]) -> None:
    """Run the teacher's body over the same batches, without LM head and selection."""
    for first in range(0, len(samples), BATCH):
        states_at_positions(backend.model, collate(samples[first : first + BATCH], backend.pad_id))


def with_vllm(backend: VllmBackend, samples: Sequence[EncodedSample], manifest: Manifest) -> None:
    """Capture as `cache-teacher` does with vLLM, with empty caches, which the round before has filled."""
    backend.engine.reset_prefix_cache()
    backend.engine.reset_encoder_cache()
    backend.capture(samples, manifest)


def engine_alone(backend: VllmBackend, samples: Sequence[EncodedSample], manifest: Manifest) -> None:
    """Run the engine over the same requests for no position."""
    backend.engine.reset_prefix_cache()
    backend.engine.reset_encoder_cache()
    with patch("switchkd.pipelines.capture.backends.vllm_backend.predicting_runs", lambda supervised: []):
        requests, _ = backend.start(samples, manifest)
    for sample, name in requests:
        backend._wait(name, sample)


class PackingTimer:
    """Takes the place of `pack` in both backends; adds up the CPU seconds of the LM head and of all of it."""

    def __init__(self) -> None:
        self.head = self.whole = 0.0

    def __call__(self, states: Tensor, lm_head: Callable[[Tensor], Tensor], *how: object) -> Tensor:
        """Do what `pack` does."""

        def timed(chunk: Tensor) -> Tensor:
            start = time.process_time()
            logits = lm_head(chunk)
            self.head += time.process_time() - start
            return logits

        start = time.process_time()
        packed: Tensor = pack(states, timed, *how)  # type: ignore[arg-type]
        self.whole += time.process_time() - start
        return packed


def measure(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, tuple[float, float, float]]:
    """Return the least (CPU seconds, those of the LM head, those of packing) of each way; the first round is not counted."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            timer = PackingTimer()
            with ExitStack() as stack:
                for module in ("vllm_pooler", "transformers_backend"):
                    stack.enter_context(patch(f"switchkd.pipelines.capture.backends.{module}.pack", timer))
                start = time.process_time()
                run()
                found[name].append((time.process_time() - start, timer.head, timer.whole - timer.head))
    return {
        name: tuple(min(each) for each in zip(*runs[1:], strict=True))  # type: ignore[misc]
        for name, runs in found.items()
    }


def smollm2(vocabulary: int) -> LlamaConfig:
    """Return a config of SmolLM2-135M's shape with another vocabulary."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def rows_of(vocabulary: int, name: str, shape: Shape, rounds: int) -> list[str]:
    """Measure one vocabulary and shape of samples; returns the table's rows."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        words = tiny.WORDS + [f"w{i}" for i in range(vocabulary - len(tiny.WORDS))]
        vision = tiny.vision_config(size=8 * shape.image_side, patch=8, layers=4)
        teacher = tiny.checkpoint(folder / "teacher", 0, language=smollm2(vocabulary), words=words, vision=vision)
        worker = open_worker(teacher, write_data(folder / "data", shape), shape)
        samples = [worker.encoder.encode(sample) for sample in worker.samples]
        manifests = {payload: with_payload(worker.manifest, payload) for payload in PAYLOADS}
        vllm = VllmBackend(worker.checkpoint, "float32", shape.max_length)
        found = {
            "vLLM": measure(
                {payload: partial(with_vllm, vllm, samples, manifest) for payload, manifest in manifests.items()}
                | {ALONE["vLLM"]: partial(engine_alone, vllm, samples, manifests["topk"])},
                rounds,
            )
        }
        vllm.engine.engine_core.shutdown()
        plain = TransformersBackend(worker.checkpoint, "cpu", "float32")
        found["transformers"] = measure(
            {payload: partial(in_batches, plain, samples, manifest) for payload, manifest in manifests.items()}
            | {ALONE["transformers"]: partial(forward_alone, plain, samples)},
            rounds,
        )
    positions = np.mean([sample.positions for sample in samples])
    tokens = np.mean([len(sample.input_ids) for sample in samples])
    rows = []
    for backend, ways in found.items():
        alone = ways.pop(ALONE[backend])[0]
        for payload, (seconds, head, packing) in ways.items():
            each = 1e3 * alone / len(samples)
            rows.append(
                f"| {vocabulary:,} | {name}: {positions:.0f} of {tokens:.0f} | {backend} | `{payload}` | {each:,.0f} ms | "
                f"{head / alone:.1%} | {packing / alone:.1%} | {seconds / alone - 1:.1%} |"
            )
    return rows


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs/backends-table.md")
    asked = parser.parse_args()
    lines = [
        "What capture adds to a teacher's own time. LLM of SmolLM2-135M's shape with random weights, float32, one thread of a CPU; "
        f"CPU time, the least of {asked.rounds} rounds; made by `make bench-vllm`. *Alone* is vLLM's engine without a position to "
        "return, or transformers' forward pass without LM head.",
        "",
        "| V | samples: positions of tokens | backend | payload | alone, a sample | LM head | packing | added in all |",
        "| ---: | --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(lines), flush=True)
    for vocabulary in asked.vocabulary:
        for name in asked.shape:
            rows = rows_of(vocabulary, name, SHAPES[name], asked.rounds)
            print("\n".join(rows), flush=True)
            lines += rows
    asked.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
