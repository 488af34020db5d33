"""A whole training step, side by side: the teacher live as in LLaVA-KD's trainer, and ours from a store's `hidden` and `topk`.

    python benchmarks/step.py            # writes docs/step-table.md (make bench-step)

Models have the sizes of Qwen2.5-3B, Qwen2.5-0.5B and SigLIP-SO400M to each other, in small: language models of 7.9 and 1.0
million parameters (2.77 : 0.36), vision towers of 1.2 million, LM heads in proportion; random weights. A batch has 16 samples, one
of text alone, 144 image tokens each behind a system prompt of 12, answers of 8 to 64 tokens. Float32, one thread; a step is
forward, backward and AdamW. How time and memory are measured: side_by_side.py.

Live: whole teacher with its vision tower, whole logits of all rows of both models, DBiLD from all pairs or in linear time; whole
logits of the switch pathway too. Bare: what must run and nothing else, that is student forward and backward, the switch pathway's
forward and backward on image samples behind the system prompt, LM heads at supervised positions, with a sum for a loss; then AdamW.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from side_by_side import dbild_of_pairs, measure, peak_bytes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig, TrainingArguments

from switchkd.losses import dbild_loss
from switchkd.objective import Objective
from switchkd.pipelines.capture import pack_logits, unpack
from switchkd.pipelines.teacher_source import StoredHidden, StoredTopK
from switchkd.pipelines.trainer import SwitchTrainer
from switchkd.pipelines.training_data import teacher_columns
from switchkd.positions import IGNORED, predicting_rows
from switchkd.switch import KnownText, switch_states
from switchkd.vlm import LlavaWithoutVision, capture_vision_features, freeze

VOCABULARY, IMAGE_TOKEN, IMAGE_TOKENS, PROMPT = 3072, 1, 144, 24
SAMPLES, TOP_K = 16, 128


def make_model(width: int, layers: int, kind: type[LlavaForConditionalGeneration]) -> LlavaForConditionalGeneration:
    """Make a Llava whose language model has about 12 · width² · layers parameters."""
    vision = SiglipVisionConfig(
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=96,
        patch_size=8,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 128),
        intermediate_size=3 * width,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    return kind(config)


def make_batch() -> dict[str, Tensor]:
    """Make one batch as the collator does, without the teacher's columns."""
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(8, 65, (SAMPLES,), generator=generator).tolist()
    length = IMAGE_TOKENS + PROMPT + max(answers)
    ids = torch.zeros(SAMPLES, length, dtype=torch.long)
    system = torch.randint(2, VOCABULARY, (PROMPT // 2,), generator=generator)
    labels = torch.full((SAMPLES, length), IGNORED)
    mask = torch.zeros(SAMPLES, length, dtype=torch.long)
    for row, answer in enumerate(answers):
        image = IMAGE_TOKENS if row else 0
        end = image + PROMPT + answer
        ids[row, :end] = torch.randint(2, VOCABULARY, (end,), generator=generator)
        ids[row, : PROMPT // 2] = system
        ids[row, PROMPT // 2 : PROMPT // 2 + image] = IMAGE_TOKEN
        mask[row, :end] = 1
        labels[row, end - answer : end] = ids[row, end - answer : end]
    has_image = torch.arange(SAMPLES) > 0
    pixels = torch.randn(SAMPLES - 1, 3, 96, 96, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "has_image": has_image, "pixel_values": pixels}


class Bench:
    """Models, batch and what a store would hold of it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.student = make_model(128, 5, LlavaForConditionalGeneration).train()
        self.teacher = make_model(256, 10, LlavaForConditionalGeneration)
        self.teacher.lm_head.weight.data.mul_(8)  # random weights of the usual size say nothing
        freeze(self.teacher)
        self.blind = make_model(256, 10, LlavaWithoutVision)
        self.blind.load_state_dict(self.teacher.state_dict(), strict=False)
        freeze(self.blind)
        self.optimizer = torch.optim.AdamW([p for p in self.student.parameters() if p.requires_grad], lr=1e-4)
        self.batch, self.known = make_batch(), KnownText()
        self.rows = predicting_rows(self.batch["labels"])
        with torch.no_grad():
            hidden = self.teacher.model(**self.inputs()).last_hidden_state[self.rows]
            packed = unpack(pack_logits(self.teacher.lm_head(hidden), TOP_K, hidden), TOP_K)
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
        self, teacher: LlavaForConditionalGeneration, features: Tensor, rows: Tensor, known: KnownText | None = None
    ) -> Tensor:
        """Return the switch pathway's final states on image samples at `rows` [B, L]."""
        on = self.batch["has_image"]
        ids, mask = self.batch["input_ids"][on], self.batch["attention_mask"][on]
        return switch_states(teacher, features, ids, mask, rows[on], known=known)

    def live(self, distance: Callable[[Tensor, Tensor], Tensor], switch: bool) -> Tensor:
        """The loss with the whole teacher run beside the student, whole logits of both."""
        with capture_vision_features(self.student) as features:
            logits = self.student(**self.inputs()).logits  # [B, L, V]
        with torch.no_grad():
            of_teacher = self.teacher(**self.inputs()).logits
        ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), self.batch["labels"][:, 1:].flatten(), reduction="sum")
        loss = ce + distance(logits[self.rows], of_teacher[self.rows])
        if switch:
            on = self.batch["has_image"]
            everywhere = torch.ones_like(self.rows)
            z = self.teacher.lm_head(self.switched(self.teacher, features[0], everywhere))
            z = z.view(int(on.sum()), -1, VOCABULARY)
            loss = loss + distance(z[self.rows[on]], of_teacher[on][self.rows[on]])
        return loss / self.rows.sum()

    def ours(self, payload: str, switch: bool) -> Callable[[], Tensor]:
        """The trainer's own loss from a store's columns."""
        head = self.blind.lm_head.weight
        source = StoredHidden(head, VOCABULARY) if payload == "hidden" else StoredTopK(VOCABULARY, "student")
        arguments = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none", remove_unused_columns=False)
        trainer = SwitchTrainer(
            objective=Objective(switch=switch),
            source=source,
            teacher=self.blind if switch else None,
            model=self.student,
            args=arguments,
        )
        return partial(trainer.compute_loss, self.student, self.batch)

    def bare(self, switch: bool) -> Tensor:
        """Only what must run."""
        with capture_vision_features(self.student) as features:
            logits = self.student(**self.inputs(), logits_to_keep=self.rows).logits
        with torch.no_grad():
            of_teacher = F.linear(self.batch["teacher_hidden"], self.blind.lm_head.weight)
        loss = logits.sum() + of_teacher.sum()
        if switch:
            loss = loss + self.blind.lm_head(self.switched(self.blind, features[0], self.rows, self.known)).sum()
        return loss / self.rows.sum()


def table(bench: Bench, switch: bool, repeats: int, steps: int) -> list[str]:
    """Measure all ways of making a step, in turns."""
    linear = partial(dbild_loss, reduction="sum")
    losses: dict[str, Callable[[], Tensor]] = {
        "(a) live, all pairs": partial(bench.live, dbild_of_pairs, switch),
        "(a') live, linear time": partial(bench.live, linear, switch),
        "(b) ours from `hidden`": bench.ours("hidden", switch),
        "(c) ours from `topk`": bench.ours("topk", switch),
        "bare": partial(bench.bare, switch),
    }
    times: dict[str, list[float]] = {name: [] for name in losses}
    flops = {}
    for name, loss in losses.items():
        with FlopCounterMode(display=False) as counter:
            loss().backward()
        flops[name] = counter.get_total_flops()
    for _ in range(repeats):
        for name, loss in losses.items():
            times[name].append(measure(partial(bench.step, loss), warm_ups=1, repeats=steps))
    peaks = {name: peak_bytes(partial(bench.step, loss)) for name, loss in losses.items()}
    middle = {name: statistics.median(found) for name, found in times.items()}
    base, floor = middle["(a) live, all pairs"], middle["bare"]
    return [
        f"| {'with' if switch else 'without'} | {name} | {middle[name] * 1e3:,.0f} | {base / middle[name]:.2f} | "
        f"{middle[name] / floor:.2f} | {flops[name] / 1e9:,.1f} | {flops[name] / flops['bare']:.2f} | {peaks[name] / 1e6:,.0f} |"
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
    lines = [
        f"Float32, one thread, {SAMPLES} samples, {int(bench.rows.sum())} positions, padding {padding:.0%}; medians of "
        f"{options.repeats} processes, CPU time; made by `make bench-step`.",
        "",
        "| switch | step | ms | times as fast as (a) | time / bare | GFLOP | FLOP / bare | peak, MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for switch in (True, False):
        lines += table(bench, switch, options.repeats, options.steps)
        print("\n".join(lines), flush=True)
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
