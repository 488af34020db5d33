"""Padding and speed of training by how samples are grouped and packed, on lengths like those of LLaVA's Mix-665K.

    python benchmarks/padding.py            # the share of padding; seconds
    python benchmarks/padding.py --steps    # also whole training steps, a quarter of an hour on one core

Lengths are drawn, not read: 94 % of the samples have an image of 576 tokens and short text (log-normal, median 100 tokens), 6 % are
text alone and long (median 500, cut at 2,048), as in the published mixture of 665,298 rows with 40,688 of text alone. The order
is made, as the trainer makes it, from characters: 4 a token on average, between 3 and 5.

Steps are forward and backward passes of the trainer's own loss from a store's hidden states, with the switch pathway, on the
models of step.py; float32, one thread, CPU time, and the most that torch held at once. Everything is a quarter as long there
(images of 144 tokens), which keeps shares as they are. Each way takes the same 192 samples in twelve batches of 16, and all ways
take turns. Plain attention of rows is measured both ways, in blocks and with masks: the latter stands for models whose attention
is not plain.
"""

import argparse
import statistics
import tempfile
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from side_by_side import measure, peak_bytes
from step import IMAGE_TOKEN, VOCABULARY, make_model
from transformers import LlavaForConditionalGeneration, TrainingArguments

from switchkd.data.encoded import EncodedSample
from switchkd.fingerprints import SampleDigest
from switchkd.losses.objective import Objective
from switchkd.models.block_attention import NAME, enable_packing
from switchkd.models.packing import pack_rows
from switchkd.models.vlm import LlavaWithoutVision, freeze
from switchkd.pipelines.stored_teacher import StoredHidden
from switchkd.pipelines.training.batches.collator import Collator
from switchkd.pipelines.training.batches.dataset import CHARACTERS_PER_TOKEN
from switchkd.pipelines.training.batches.sampler import GROUPINGS, EpochOrder, padding_share
from switchkd.pipelines.training.trainer import SwitchTrainer
from switchkd.positions import count_positions

IMAGE_TOKENS, LIMIT = 576, 2048
TEXT_ONLY = 40_688 / 665_298
MEDIAN_TOKENS = {True: 100, False: 500}  # of the text, with an image and without
ROWS = (2048, 4096, 32768)
SHORTER, SAMPLES, BATCH = 4, 192, 16  # of the steps


class Drawn(NamedTuple):
    """Samples by their lengths, [n] each."""

    tokens: NDArray[np.int64]
    estimated: NDArray[np.int64]
    has_image: NDArray[np.bool_]

    def epoch(self, grouping: str, global_batch: int) -> NDArray[np.int64]:
        """Return the order of the first epoch."""
        count = len(self.tokens)
        return EpochOrder(grouping, 0, count, self.estimated, self.has_image, global_batch).epoch(0)


def draw(samples: int) -> Drawn:
    """Draw samples."""
    random = np.random.default_rng(0)
    has_image = random.random(samples) >= TEXT_ONLY
    text = np.where(has_image, MEDIAN_TOKENS[True], MEDIAN_TOKENS[False]) * random.lognormal(0, 0.8, samples)
    text = np.clip(text, 8, LIMIT - IMAGE_TOKENS * has_image).astype(np.int64)
    characters = text * random.uniform(3, 5, samples)
    image = IMAGE_TOKENS * has_image
    return Drawn(text + image, characters.astype(np.int64) // CHARACTERS_PER_TOKEN + image, has_image)


def packed_share(order: NDArray[np.int64], tokens: NDArray[np.int64], batch: int, row_tokens: int) -> float:
    """Return the share of padding where samples of a batch share rows; see `padding_share`."""
    padded = 0
    for start in range(0, len(order), batch):
        lengths = tokens[order[start : start + batch]].tolist()
        rows = pack_rows(lengths, row_tokens)
        padded += len(rows) * max(sum(lengths[sample] for sample in row) for row in rows)
    return 1 - int(tokens.sum()) / padded


def shares(devices: int = 8) -> None:
    """Print the share of padding, for `devices` x batch samples a step."""
    batches, drawn, fewer = (4, 16, 32), draw(100_000), draw(10_000)
    print("| options | " + " | ".join(f"batch {batch}" for batch in batches) + " |\n| --- |" + " ---: |" * len(batches))
    for grouping in GROUPINGS:
        found = [padding_share(drawn.epoch(grouping, batch * devices), drawn.tokens, batch) for batch in batches]
        print(f"| `--group-by {grouping}` | " + " | ".join(f"{share:.1%}" for share in found) + " |")
    for row_tokens in ROWS:
        found = [
            packed_share(fewer.epoch("none", batch * devices), fewer.tokens, batch, row_tokens) for batch in batches
        ]
        print(f"| `--packing {row_tokens}` | " + " | ".join(f"{share:.1%}" for share in found) + " |")


def encoded(drawn: Drawn) -> list[EncodedSample]:
    """Make samples of the drawn lengths, `SHORTER` times as short; the second half of the text is supervised."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length, shown in zip((drawn.tokens // SHORTER).tolist(), drawn.has_image.tolist(), strict=True):
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator, dtype=torch.int32).numpy()
        image = IMAGE_TOKENS // SHORTER if shown else 0
        ids[:image] = IMAGE_TOKEN
        supervised = np.arange(length) >= image + (length - image) // 2
        media = {"pixel_values": torch.randn(1, 3, 96, 96, generator=generator)} if shown else None
        found.append(EncodedSample(ids, supervised, media, SampleDigest(0, 0, 0)))
    return found


class Steps:
    """An epoch of steps, in several ways."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.drawn = draw(SAMPLES)
        self.samples = encoded(self.drawn)
        self.student = make_model(128, 5, LlavaForConditionalGeneration).train()
        self.teacher = make_model(256, 10, LlavaWithoutVision)
        self.teacher.lm_head.weight.data.mul_(8)
        freeze(self.teacher)
        arguments = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none", remove_unused_columns=False)
        self.trainer = SwitchTrainer(
            objective=Objective(),
            source=StoredHidden(self.teacher.lm_head.weight, VOCABULARY, exact_knee=False),
            teacher=self.teacher,
            model=self.student,
            args=arguments,
        )

    def batches(self, grouping: str, row_tokens: int | None) -> list[dict[str, Any]]:
        """Make the batches of an epoch."""
        order = self.drawn.epoch(grouping, BATCH)
        collator = Collator(0, row_tokens=row_tokens)
        found = []
        for start in range(0, SAMPLES, BATCH):
            batch = collator([(self.samples[sample], sample) for sample in order[start : start + BATCH]])
            batch["teacher_hidden"] = torch.randn(int(count_positions(batch["labels"]).sum()), 256)
            found.append(batch)
        return found

    def run(self, batches: list[dict[str, Any]], blocks: bool) -> None:
        """Run an epoch."""
        for model in (self.student, self.teacher):
            if blocks:
                enable_packing(model.model.language_model, "the benchmark's model")
            model.model.language_model.set_attn_implementation(NAME if blocks else "sdpa")
        for batch in batches:
            self.student.zero_grad()
            self.trainer.compute_loss(self.student, batch).backward()


def steps(rounds: int = 3) -> None:
    """Print samples per second of every way, and the peak of memory."""
    ways: dict[str, tuple[str, int | None, bool]] = {
        "`--group-by none`": ("none", None, False),
        "`--group-by length`": ("length", None, False),
        "`--packing 2048`, masks": ("none", 2048, False),
        "`--packing 2048`": ("none", 2048, True),
        "`--packing 32768`, masks": ("none", 32768, False),
        "`--packing 32768`": ("none", 32768, True),
        "`--packing 32768 --group-by length`": ("length", 32768, True),
    }
    bench = Steps()
    runs = {
        name: partial(bench.run, bench.batches(grouping, rows and rows // SHORTER), blocks)
        for name, (grouping, rows, blocks) in ways.items()
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(measure(run))
            print(name, times[name], flush=True)
    peaks = {name: peak_bytes(run) for name, run in runs.items()}
    middle = {name: statistics.median(found) for name, found in times.items()}
    base = middle["`--group-by none`"]
    print("\n| options | samples/s | times as many | peak, MB |\n| --- | ---: | ---: | ---: |")
    for name, seconds in middle.items():
        print(f"| {name} | {SAMPLES / seconds:.2f} | {base / seconds:.2f} | {peaks[name] / 1e6:,.0f} |")


def main() -> None:
    """Print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", action="store_true", help="also run training steps")
    options = arguments.parse_args()
    shares()
    if options.steps:
        torch.set_num_threads(1)
        steps()


if __name__ == "__main__":
    main()
