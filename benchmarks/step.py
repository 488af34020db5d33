"""A whole training step, side by side: the teacher live as in LLaVA-KD's trainer, and ours from a store's `hidden` and `topk`.

    python benchmarks/step.py      # on a CPU; writes docs/step-table.md (make bench-step); on a GPU: step_gpu.py

Models have the sizes of Qwen2.5-3B, Qwen2.5-0.5B and SigLIP-SO400M to each other, in small: language models of 7.9 and 1.0
million parameters (2.77 : 0.36), vision towers of 1.2 million, LM heads in proportion. A batch has 16 samples, one of text alone,
144 image tokens each behind a system prompt of 12, answers of 8 to 64 tokens. Float32, one thread; a step is forward, backward and
AdamW. How time and memory are measured: side_by_side.py. Weights are random.

Live: whole teacher with its vision tower, whole logits of all rows of both models, DBiLD from all pairs or in linear time; whole
logits of the switch pathway too. Bare: what must run and nothing else, that is student forward and backward, the switch pathway's
forward and backward on image samples behind the system prompt, LM heads at supervised positions, with a sum for a loss; then AdamW.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from side_by_side import dbild_of_pairs, measure, peak_bytes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig, TrainingArguments

from switchkd.losses import dbild_loss
from switchkd.losses.objective import Objective
from switchkd.models.features import Features, capture_features
from switchkd.models.prefix_cache import SharedPrefixCache
from switchkd.models.switch import switch_states
from switchkd.models.vlm import LlavaWithoutVision, freeze
from switchkd.pipelines.capture.backends.packed_rows import pack_logits, unpack
from switchkd.pipelines.stored_teacher import StoredHidden, StoredTopK, teacher_columns
from switchkd.pipelines.training.trainer import SwitchTrainer
from switchkd.positions import IGNORED, predicting_rows

VOCABULARY, IMAGE_TOKEN = 3072, 1  # of the small models
TOP_K = 128


def text_config(width: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> Qwen2Config:
    """Make a language model's config."""
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )


def small_text(width: int, layers: int) -> Qwen2Config:
    """Make the config of a language model with about 12 · width² · layers parameters."""
    return text_config(width, layers, width // 32, max(1, width // 128), 3 * width, VOCABULARY)


def vision_config(
    width: int, layers: int, heads: int, inner: int, image_size: int, patch_size: int
) -> SiglipVisionConfig:
    """Make a vision tower's config."""
    return SiglipVisionConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        image_size=image_size,
        patch_size=patch_size,
        vision_use_head=False,
    )


SMALL_VISION = vision_config(128, 6, 4, 512, 96, 8)


def make_llava(
    vision: SiglipVisionConfig, text: Qwen2Config, kind: type[LlavaForConditionalGeneration]
) -> LlavaForConditionalGeneration:
    """Make a Llava with random weights."""
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    return kind(config)


def make_model(width: int, layers: int, kind: type[LlavaForConditionalGeneration]) -> LlavaForConditionalGeneration:
    """Make a small Llava."""
    return make_llava(SMALL_VISION, small_text(width, layers), kind)


@dataclass(frozen=True)
class Scale:
    """Sizes of models and batch."""

    student: Qwen2Config
    teacher: Qwen2Config
    vision: SiglipVisionConfig
    samples: int
    prompt: int  # tokens, the first half of them of the system
    answers: tuple[int, int]  # tokens, from and up to

    @property
    def image_tokens(self) -> int:
        """One a patch."""
        return (self.vision.image_size // self.vision.patch_size) ** 2


SCALES = {
    "cpu": Scale(small_text(128, 5), small_text(256, 10), SMALL_VISION, 16, 24, (8, 64)),
    "cuda": Scale(
        text_config(896, 24, 14, 2, 4864, 151_936),
        text_config(2048, 36, 16, 2, 11_008, 151_936),
        vision_config(1152, 27, 16, 4304, 384, 14),
        16,
        60,
        (16, 192),
    ),
}


def make_batch(scale: Scale) -> dict[str, Tensor]:
    """Make one batch as the collator does, without the teacher's columns."""
    generator = torch.Generator().manual_seed(0)
    least, most = scale.answers
    answers = torch.randint(least, most + 1, (scale.samples,), generator=generator).tolist()
    length, vocabulary, system_tokens = (
        scale.image_tokens + scale.prompt + max(answers),
        scale.student.vocab_size,
        scale.prompt // 2,
    )
    ids = torch.zeros(scale.samples, length, dtype=torch.long)
    system = torch.randint(2, vocabulary, (system_tokens,), generator=generator)
    labels = torch.full((scale.samples, length), IGNORED)
    mask = torch.zeros(scale.samples, length, dtype=torch.long)
    for row, answer in enumerate(answers):
        image = scale.image_tokens if row else 0
        end = image + scale.prompt + answer
        ids[row, :end] = torch.randint(2, vocabulary, (end,), generator=generator)
        ids[row, :system_tokens] = system
        ids[row, system_tokens : system_tokens + image] = IMAGE_TOKEN
        mask[row, :end] = 1
        labels[row, end - answer : end] = ids[row, end - answer : end]
    has_image = torch.arange(scale.samples) > 0
    pixels = torch.randn(scale.samples - 1, 3, scale.vision.image_size, scale.vision.image_size, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "has_image": has_image, "pixel_values": pixels}


class Bench:
    """Models, batch and what a store would hold of it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        scale = SCALES["cpu"]
        self.vocabulary = scale.student.vocab_size
        self.student = make_llava(scale.vision, scale.student, LlavaForConditionalGeneration).train()
        self.teacher = make_llava(scale.vision, scale.teacher, LlavaForConditionalGeneration)
        self.blind = make_llava(scale.vision, scale.teacher, LlavaWithoutVision)
        self.teacher.lm_head.weight.data.mul_(8)  # random weights of the usual size say nothing
        freeze(self.teacher)
        self.blind.load_state_dict(self.teacher.state_dict(), strict=False)
        freeze(self.blind)
        self.optimizer = torch.optim.AdamW([p for p in self.student.parameters() if p.requires_grad], lr=1e-4)
        self.batch = make_batch(scale)
        self.prefix_cache = SharedPrefixCache()
        self.rows = predicting_rows(self.batch["labels"])
        with torch.no_grad():
            hidden = self.teacher.model(**self.inputs()).last_hidden_state[self.rows]
            packed = unpack(pack_logits(self.teacher.lm_head(hidden).float(), TOP_K, hidden.float()), TOP_K)
        self.batch |= teacher_columns(packed)

    def inputs(self) -> dict[str, Tensor]:
        """Return what a Llava's forward takes of the batch."""
        return {name: self.batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}

    def step(self, loss: Callable[[], Tensor]) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad()
        loss().backward()
        self.optimizer.step()

    def switched(
        self,
        teacher: LlavaForConditionalGeneration,
        features: Features,
        rows: Tensor,
        prefix_cache: SharedPrefixCache | None = None,
    ) -> Tensor:
        """Return the switch pathway's final states on image samples at `rows` [B, L]."""
        on = self.batch["has_image"]
        ids, mask = self.batch["input_ids"][on], self.batch["attention_mask"][on]
        return switch_states(teacher, features, ids, mask, rows[on], prefix_cache=prefix_cache)

    def live(self, distance: Callable[[Tensor, Tensor], Tensor], switch: bool) -> Tensor:
        """The loss with the whole teacher run beside the student, whole logits of both."""
        with capture_features(self.student) as features:
            logits = self.student(**self.inputs()).logits  # [B, L, V]
        with torch.no_grad():
            of_teacher = self.teacher(**self.inputs()).logits
        ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), self.batch["labels"][:, 1:].flatten(), reduction="sum")
        loss = ce + distance(logits[self.rows], of_teacher[self.rows])
        if switch:
            on = self.batch["has_image"]
            everywhere = torch.ones_like(self.rows)
            z = self.teacher.lm_head(self.switched(self.teacher, features, everywhere))
            z = z.view(int(on.sum()), -1, self.vocabulary)
            loss = loss + distance(z[self.rows[on]], of_teacher[on][self.rows[on]])
        return loss / self.rows.sum()

    def ours(self, payload: str, switch: bool) -> Callable[[], Tensor]:
        """The trainer's own loss from a store's columns."""
        sources = {
            "hidden": StoredHidden(self.blind.lm_head.weight, self.vocabulary, exact_knee=True),
            "topk": StoredTopK(self.vocabulary, "student"),
        }
        arguments = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none", remove_unused_columns=False)
        trainer = SwitchTrainer(
            objective=Objective(switch=switch),
            source=sources[payload],
            teacher=self.blind if switch else None,
            model=self.student,
            args=arguments,
        )
        return partial(trainer.compute_loss, self.student, self.batch)

    def bare(self, switch: bool) -> Tensor:
        """Only what must run."""
        with capture_features(self.student) as features:
            logits = self.student(**self.inputs(), logits_to_keep=self.rows).logits
        with torch.no_grad():
            head = self.blind.lm_head.weight
            of_teacher = F.linear(self.batch["teacher_hidden"].to(head.dtype), head)
        loss = logits.sum() + of_teacher.sum()
        if switch:
            loss = loss + self.blind.lm_head(self.switched(self.blind, features, self.rows, self.prefix_cache)).sum()
        return loss / self.rows.sum()


def measured(bench: Bench, losses: dict[str, Callable[[], Tensor]], repeats: int, steps: int) -> tuple[dict, dict]:
    """Make steps of each kind in turns: median seconds, and the peak of bytes, by name."""
    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(repeats):
        for name, loss in losses.items():
            times[name].append(measure(partial(bench.step, loss), warm_ups=1, repeats=steps))
    peaks = {name: peak_bytes(partial(bench.step, loss)) for name, loss in losses.items()}
    return {name: statistics.median(found) for name, found in times.items()}, peaks


def table(bench: Bench, switch: bool, repeats: int, steps: int) -> list[str]:
    """Measure all ways of making a step."""
    linear = partial(dbild_loss, reduction="sum")
    losses: dict[str, Callable[[], Tensor]] = {
        "(a) live, all pairs": partial(bench.live, dbild_of_pairs, switch),
        "(a') live, linear time": partial(bench.live, linear, switch),
        "(b) ours from `hidden`": bench.ours("hidden", switch),
        "(c) ours from `topk`": bench.ours("topk", switch),
        "bare": partial(bench.bare, switch),
    }
    flops = {}
    for name, loss in losses.items():
        with FlopCounterMode(display=False) as counter:
            loss().backward()
        flops[name] = counter.get_total_flops()
    middle, peaks = measured(bench, losses, repeats, steps)
    base, floor = next(iter(middle.values())), middle["bare"]
    return [
        f"| {'with' if switch else 'without'} | {name} | {middle[name] * 1e3:,.0f} | {base / middle[name]:.2f} | "
        f"{middle[name] / floor:.2f} | {peaks[name] / 1e6:,.0f} |"
        f" {flops[name] / 1e9:,.1f} | {flops[name] / flops['bare']:.2f} |"
        for name in losses
    ]


def main() -> None:
    """Run everything and write the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--repeats", type=int, default=3, help="processes of each kind")
    arguments.add_argument("--steps", type=int, default=2, help="timed steps of a process")
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs/step-table.md")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    bench = Bench()
    padding = 1 - bench.batch["attention_mask"].float().mean().item()
    knee = bench.batch["teacher_knee"].float().median()
    samples, positions = SCALES["cpu"].samples, int(bench.rows.sum())
    lines = [
        f"Float32, one thread, {samples} samples, {positions} positions, padding {padding:.0%}, median knee {knee:,.0f}; "
        f"medians of {options.repeats} processes, CPU time; made by `make bench-step`.",
        "",
        "| switch | step | ms | times as fast as (a) | time / bare | peak, MB | GFLOP | FLOP / bare |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for switch in (True, False):
        lines += table(bench, switch, options.repeats, options.steps)
        print("\n".join(lines), flush=True)
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
