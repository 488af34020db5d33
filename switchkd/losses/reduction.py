"""What all losses on logits share: positions reduced to one number, logits as signals, float32 at least."""

from typing import Literal

import torch
from torch import Tensor

from switchkd.losses.signals import DenseSignal, TeacherSignal

Reduction = Literal["mean", "sum", "none"]


def reduce_positions(per_position: Tensor, reduction: Reduction) -> Tensor:
    """Reduce [T] by "mean" (0 if T = 0), "sum" or "none". Raises ValueError for another word."""
    if reduction == "none":
        return per_position
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    total = per_position.sum()
    return total / max(per_position.shape[0], 1) if reduction == "mean" else total


def as_signal(student_logits: Tensor, teacher: Tensor | TeacherSignal) -> TeacherSignal:
    """Wrap plain teacher logits and check that both sides speak of the same T positions and N rows (else ValueError)."""
    signal: TeacherSignal = DenseSignal(teacher) if isinstance(teacher, Tensor) else teacher
    expected, found = tuple(student_logits.shape), (signal.positions, signal.vocab_rows)
    if expected != found:
        raise ValueError(f"student logits are {expected} (positions, rows) but the teacher speaks of {found}")
    return signal


def at_least_float32(x: Tensor) -> Tensor:
    """Raise half precisions to float32, leave float64 alone."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
