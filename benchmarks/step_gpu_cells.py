"""The cells of `step_gpu.py`: ways of running a step, and models and a batch for one of them."""

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import step
import torch
from torch import Tensor
from transformers import TrainingArguments

from switchkd.losses import dbild_loss
from switchkd.losses.objective import Objective
from switchkd.losses.selection import use_kernels
from switchkd.models.components import language_model_of
from switchkd.models.packing import layout, pack_rows
from switchkd.models.packing_probe import enable_packing_in
from switchkd.pipelines.stored_teacher import StoredHidden
from switchkd.pipelines.training.cost_model import CostModel, Work
from switchkd.pipelines.training.live.teacher_source import LiveTeacher
from switchkd.pipelines.training.step_ways import experimental
from switchkd.pipelines.training.step_ways.fp8_teacher import to_fp8
from switchkd.pipelines.training.step_ways.half_copies import HalfCopies
from switchkd.pipelines.training.trainer import SwitchTrainer

TINY = step.Scale(step.small_text(64, 2), step.small_text(64, 2), step.vision_config(32, 2, 2, 64, 32, 8), 4, 8, (2, 6))
SCALES = {"real": step.SCALES["cuda"], "tiny": TINY}
ROW_TOKENS = 1 << 20  # one row holds a batch
LIVE, LLAVA_KD = "live teacher", "LLaVA-KD's manner"
KERNELS = ("varlen-attention", "triton-selection", "fp8-teacher")  # that are compared with their references


@dataclass(frozen=True)
class Way:
    """How a step runs; the words are those of `switchkd train`'s options."""

    name: str
    packed: bool = False
    varlen: bool = False
    copies: bool = False
    triton: bool = False
    compiled: bool = False
    fp8: bool = False  # the teacher's layers, where a step runs them

    def fits(self, objective: str) -> bool:
        """Whether a step of this objective differs from that of another way."""
        return objective == "with" or not self.fp8


BEFORE = Way("as before")
BEST = Way("packed, varlen, copies, triton", True, True, True, True)
FP8_BEST = Way("packed, varlen, copies, triton, fp8 teacher", True, True, True, True, fp8=True)
WAYS = (
    BEFORE,
    Way("packed, loop", True),
    Way("packed, varlen", True, True),
    Way("packed, varlen, copies", True, True, True),
    BEST,
    Way("packed, varlen, copies, triton, compiled", True, True, True, True, True),
    FP8_BEST,
)
OBJECTIVES = ("with", "without", "SFT")  # the switch pathway


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    kind: str  # "peak", "kernels", "step", "profile", "live teacher", "LLaVA-KD's manner"
    way: Way = BEFORE
    objective: str = "with"
    batch: int = 16

    @property
    def key(self) -> str:
        """Name in the file of results."""
        return f"{self.kind}; {self.way.name}; {self.objective}; {self.batch}"


def cells(batches: tuple[int, ...]) -> list[Cell]:
    """Return all cells, the most telling first."""
    first, *others = batches
    found = [Cell("peak"), Cell("kernels")]
    found += [Cell("step", way, objective, first) for way in (BEFORE, BEST) for objective in OBJECTIVES]
    found += [Cell("profile", way, "with", first) for way in (BEFORE, BEST)]
    found += [
        Cell(kind, BEST if kind == LIVE else BEFORE, o, b)
        for kind in (LLAVA_KD, LIVE)
        for b in batches
        for o in OBJECTIVES[:2]
    ]
    found += [Cell("step", BEST, objective, batch) for batch in others for objective in OBJECTIVES]
    found += [Cell("step", FP8_BEST, "with", first)]
    others_of = [way for way in WAYS if way not in (BEFORE, BEST, FP8_BEST)]
    found += [Cell("step", way, objective, first) for way in others_of for objective in OBJECTIVES]
    found += [Cell("step", BEFORE, objective, batch) for batch in others for objective in OBJECTIVES]
    return found


class Bench:
    """Models and a batch of one cell, on their device.

    Args:
        scale: sizes. device: "cuda" or "cpu".
    """

    def __init__(self, cell: Cell, scale: step.Scale, device: str) -> None:
        torch.manual_seed(0)
        self.cell, self.device = cell, device
        self.scale = scale = replace(scale, samples=cell.batch)
        live = cell.kind in (LIVE, LLAVA_KD)
        kind = step.LlavaForConditionalGeneration if live else step.LlavaWithoutVision
        with torch.device(device):
            self.student = step.make_llava(scale.vision, scale.student, step.LlavaForConditionalGeneration).train()
            self.teacher = step.freeze(step.make_llava(scale.vision, scale.teacher, kind).bfloat16())
        self.teacher.lm_head.weight.data.mul_(8)  # random weights of the usual size say nothing
        self.batch = {name: column.to(device) for name, column in self._batch().items()}
        way = cell.way
        use_kernels("triton" if way.triton and device == "cuda" else "torch")
        if way.packed:
            for model in (self.student, self.teacher):
                enable_packing_in(model, "the benchmark's", varlen=way.varlen)
        if way.fp8:
            to_fp8(language_model_of(self.teacher))
        if way.compiled:
            experimental.compile_layers(self.student, self.teacher)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-6, fused=True)
        self.copies = HalfCopies(self.student, self.optimizer) if way.copies else None
        self.objective = (
            Objective(switch=cell.objective == "with") if cell.objective != "SFT" else Objective("sft", switch=False)
        )
        self.trainer = self._trainer(live)

    def _batch(self) -> dict[str, Tensor]:
        """Make the collator's columns: `step.make_batch`, stored states, and layouts of rows."""
        batch = step.make_batch(self.scale)
        shown, text = batch["has_image"], batch["attention_mask"].sum(-1)
        positions = int((batch["labels"][:, 1:] != step.IGNORED).sum())
        width = self.scale.teacher.hidden_size
        batch["teacher_hidden"] = torch.randn(positions, width, generator=torch.Generator().manual_seed(1)) * 2
        if self.cell.way.packed:
            lengths, order = text.tolist(), range(len(text))
            room = {"input_ids": 0, "attention_mask": 0, "labels": step.IGNORED}
            batch |= {name: torch.nn.functional.pad(batch[name], (0, 1), value=value) for name, value in room.items()}
            width = batch["input_ids"].shape[1]
            # The samples stay in order, so that positions and images do.
            assert len(pack_rows(lengths, ROW_TOKENS)) == 1
            batch["packing"] = layout([list(order)], lengths, width)
            seen = text[shown].tolist()
            batch["switch_packing"] = layout([list(range(len(seen)))], seen, width)
        return batch

    def _trainer(self, live: bool) -> SwitchTrainer:
        rows = self.scale.student.vocab_size
        source: Any = None
        if self.objective.needs_teacher:
            head = self.teacher.lm_head.weight
            source = LiveTeacher(self.teacher, rows) if live else StoredHidden(head, rows, exact_knee=False)
        arguments = TrainingArguments(
            tempfile.mkdtemp(), use_cpu=self.device == "cpu", report_to="none", remove_unused_columns=False
        )
        teacher = self.teacher if self.objective.switch else None
        return SwitchTrainer(
            objective=self.objective, source=source, teacher=teacher, model=self.student, args=arguments
        )

    def loss(self) -> Tensor:
        """Return the loss of the batch, with graph."""
        if self.cell.kind != LLAVA_KD:
            found: Tensor = self.trainer.compute_loss(self.student, dict(self.batch))
            return found
        old = step.Bench.__new__(step.Bench)  # its way of a live teacher, with these models
        old.student, old.teacher, old.batch, old.vocabulary = (
            self.student,
            self.teacher,
            self.batch,
            self.scale.student.vocab_size,
        )
        old.rows = step.predicting_rows(self.batch["labels"])
        return old.live(partial(dbild_loss, reduction="sum"), self.objective.switch)

    def step(self, timed: Callable[[str], Any] = lambda part: nullcontext()) -> None:
        """Forward, backward, update; `timed(part)` encloses each part."""
        self.optimizer.zero_grad()
        with self.copies.in_place() if self.copies is not None else nullcontext():
            with timed("forward"), torch.autocast(self.device, torch.bfloat16, enabled=self.copies is None):
                loss = self.loss()
            with timed("backward"):
                loss.backward()
        with timed("optimizer"):
            self.optimizer.step()

    def flops(self) -> float:
        """Return the FLOP of a step, without padding."""
        lengths, shown = self.batch["attention_mask"].sum(-1).double(), self.batch["has_image"]
        positions = (self.batch["labels"] != step.IGNORED).sum(-1).double()
        sums = [lengths, lengths**2, shown.double(), lengths[shown], lengths[shown] ** 2, positions, positions[shown]]
        needs = self.objective.needs_teacher
        live = self.teacher if self.cell.kind in (LIVE, LLAVA_KD) and needs else None
        head = self.teacher.lm_head.weight.numel() if needs and live is None else 0
        model = CostModel(
            self.student, self.teacher if self.objective.switch else None, live, head, self.scale.image_tokens
        )
        return model.flops(Work(*(float(each.sum()) for each in sums)))
