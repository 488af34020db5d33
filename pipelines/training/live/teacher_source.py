"""The live teacher as a source of signals: the standard pathway, run online without a store."""

from typing import Any

import torch

from switchkd.losses.signals import HiddenSignal, TeacherSignal
from switchkd.models.components import lm_head_of
from switchkd.models.features import final_states, states_at
from switchkd.pipelines.batch import Batch
from switchkd.positions import predicting_rows


class LiveTeacher:
    """The standard pathway run online (paper, eq. 2): the reference that a cached run must equal."""

    def __init__(self, teacher: Any, vocab_rows: int) -> None:
        self.teacher, self.vocab_rows = teacher, vocab_rows

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        """See `TeacherSource.signal`."""
        read = batch.teacher_inputs
        states = final_states(
            self.teacher, read.input_ids, read.attention_mask, read.labels, batch.media_of_teacher, read.packing
        )
        found = states_at(states, read.packing, predicting_rows(read.labels))
        head = lm_head_of(self.teacher)
        return HiddenSignal(found, head.weight[: self.vocab_rows], logit_map=head.logit_map)

    def to(self, device: torch.device) -> None:
        """Move the teacher to a device."""
        self.teacher.to(device)
