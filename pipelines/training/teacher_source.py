"""The live teacher as a source of signals: the standard pathway, run online without a store."""

import torch
from transformers import LlavaForConditionalGeneration

from switchkd.losses.signals import HiddenSignal, TeacherSignal
from switchkd.models.packing import out_of_rows, text_inputs
from switchkd.pipelines.batch import Batch
from switchkd.positions import predicting_rows


class LiveTeacher:
    """The standard pathway run online (paper, eq. 2): the reference that a cached run must equal."""

    def __init__(self, teacher: LlavaForConditionalGeneration, vocab_rows: int) -> None:
        self.teacher, self.vocab_rows = teacher, vocab_rows

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        """See `TeacherSource.signal`."""
        pixels, read = batch.pixel_values, batch.teacher_inputs
        states = self.teacher.model(
            **text_inputs(read.input_ids, read.attention_mask, read.packing),
            pixel_values=None if pixels is None else pixels.to(self.teacher.dtype),
            use_cache=False,
        ).last_hidden_state
        rows = predicting_rows(read.labels)
        found = states[rows] if read.packing is None else out_of_rows(states, read.packing, rows)
        return HiddenSignal(found, self.teacher.lm_head.weight[: self.vocab_rows])

    def to(self, device: torch.device) -> None:
        """Move the teacher to a device."""
        self.teacher.to(device)
