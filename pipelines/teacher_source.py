"""Where a training run has the teacher's word from: a store's top-k logits, a store's hidden states, or the teacher itself."""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from switchkd.packing import out_of_rows, text_inputs
from switchkd.pipelines.training_data import as_teacher_reads
from switchkd.positions import predicting_rows
from switchkd.signals import HiddenSignal, SparseSignal, TailPolicy, TeacherSignal


class TeacherSource(Protocol):
    """Gives the teacher's signal at a batch's P positions."""

    def signal(self, batch: dict[str, Any]) -> TeacherSignal:
        """Return the signal; `batch` is what `training_data.Collator` made."""
        ...

    def to(self, device: torch.device) -> None:
        """Move what it holds."""
        ...


class StoredTopK:
    """Payload `topk`: sparse."""

    def __init__(self, vocab_rows: int, tail: TailPolicy) -> None:
        self.vocab_rows, self.tail = vocab_rows, tail

    def signal(self, batch: dict[str, Any]) -> TeacherSignal:
        """See `TeacherSource.signal`."""
        return SparseSignal(
            ids=batch["teacher_ids"],
            logits=batch["teacher_logits"],
            tail_logsumexp=batch["teacher_tail"],
            knee=batch["teacher_knee"],
            vocab_rows=self.vocab_rows,
            tail=self.tail,
        )

    def to(self, device: torch.device) -> None:
        """Nothing to move."""


class StoredHidden:
    """Payload `hidden`: the teacher's LM head turns stored states into its whole rows, about 1 % of its forward pass.

    Args:
        head: the LM head's weight, [V, d].
    """

    def __init__(self, head: Tensor, vocab_rows: int) -> None:
        self.head = head[:vocab_rows]

    def signal(self, batch: dict[str, Any]) -> TeacherSignal:
        """See `TeacherSource.signal`."""
        return HiddenSignal(batch["teacher_hidden"], self.head)

    def to(self, device: torch.device) -> None:
        """Move the LM head."""
        self.head = self.head.to(device)


class LiveTeacher:
    """The standard pathway run online (paper, eq. 2): the reference that a cached run must equal."""

    def __init__(self, teacher: LlavaForConditionalGeneration, vocab_rows: int) -> None:
        self.teacher, self.vocab_rows = teacher, vocab_rows

    @torch.no_grad()
    def signal(self, batch: dict[str, Any]) -> TeacherSignal:
        """See `TeacherSource.signal`."""
        pixels, read = batch.get("pixel_values"), as_teacher_reads(batch)
        source = batch.get("teacher_packing", batch.get("packing"))
        states = self.teacher.model(
            **text_inputs(read["input_ids"], read["attention_mask"], source),
            pixel_values=None if pixels is None else pixels.to(self.teacher.dtype),
            use_cache=False,
        ).last_hidden_state
        rows = predicting_rows(read["labels"])
        found = states[rows] if source is None else out_of_rows(states, source, rows)
        return HiddenSignal(found, self.teacher.lm_head.weight[: self.vocab_rows])

    def to(self, device: torch.device) -> None:
        """Move the teacher."""
        self.teacher.to(device)
