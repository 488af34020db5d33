"""Everything that one step of training hands to the objective, in small: for tests of the fused loss on any device."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from switchkd.losses import LMHead
from switchkd.losses.fused import SwitchStates
from switchkd.losses.objective import Objective
from switchkd.losses.signals import DenseSignal, HiddenSignal, SparseSignal

P, V, N, WIDTH, TEACHER_WIDTH = 7, 33, 29, 5, 6  # both vocabularies are padded beyond N


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@dataclass
class Case:
    """Everything that a step has at hand."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_head: torch.Tensor
    switch_hidden: torch.Tensor | None
    on_image: torch.Tensor

    @classmethod
    def make(cls, dtype=torch.float64, positions=P, bias=True, switch=True):
        on_image = torch.arange(positions) % 3 != 1
        return cls(
            normal(1, positions, WIDTH, dtype=dtype).requires_grad_(),
            normal(2, V, WIDTH, dtype=dtype).mul_(2).requires_grad_(),
            normal(3, V, dtype=dtype).requires_grad_() if bias else None,
            torch.arange(positions) * 5 % V,
            normal(4, positions, TEACHER_WIDTH, dtype=dtype),
            normal(5, V + 2, TEACHER_WIDTH, dtype=dtype) * 2,
            normal(6, int(on_image.sum()), TEACHER_WIDTH, dtype=dtype).requires_grad_() if switch else None,
            on_image,
        )

    @property
    def teacher_logits(self):
        return F.linear(self.teacher_hidden, self.teacher_head[:N])

    def signal(self, kind="hidden"):
        """The teacher as a source gives it."""
        if kind == "hidden":
            return HiddenSignal(self.teacher_hidden, self.teacher_head[:N])
        if kind == "logits":
            return DenseSignal(self.teacher_logits)
        ordered, ids = self.teacher_logits.sort(dim=-1, descending=True)
        knee = torch.full((len(ids),), 9)
        return SparseSignal(ids[:, :6], ordered[:, :6], ordered[:, 6:].logsumexp(-1), knee, N)

    def inputs(self):
        return [x for x in (self.hidden, self.weight, self.bias, self.switch_hidden) if x is not None]

    def fused(self, objective, signal, chunk=None, weights=None):
        switch = None
        if self.switch_hidden is not None:
            switch = SwitchStates(self.switch_hidden, LMHead(self.teacher_head), self.on_image)
        head = LMHead(self.weight, self.bias)
        return objective.fused(self.hidden, head, self.targets, signal, switch, weights, chunk_positions=chunk)

    def whole(self, objective, signal, weights=None):
        logits = F.linear(self.hidden, self.weight, self.bias)
        switch = None if self.switch_hidden is None else F.linear(self.switch_hidden, self.teacher_head)
        return objective.terms(logits, self.targets, signal, switch, self.on_image, weights)


def objective(name="dbild-rkl", switch=True, **options):
    return Objective(name, switch and name != "sft", align_weight=0.7, vsd_weight=1.3, **options)
