"""Helpers shared by all losses on logits: reduction over positions, conversion of logits to signals, float32 promotion."""

from typing import Literal

import torch
from torch import Tensor

from switchkd.errors import NonFiniteLogits
from switchkd.losses.signals import DenseSignal, TeacherSignal

Reduction = Literal["mean", "sum", "none"]


def reduce_positions(per_position: Tensor, reduction: Reduction) -> Tensor:
    """Reduce [T] by "mean" (0 if T = 0), "sum" or "none". Raises ValueError for any other value."""
    if reduction == "none":
        return per_position
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    total = per_position.sum()
    return total / max(per_position.shape[0], 1) if reduction == "mean" else total


def as_signal(student_logits: Tensor, teacher: Tensor | TeacherSignal) -> TeacherSignal:
    """Wrap plain teacher logits and check that both sides cover the same T positions and N rows (else ValueError)."""
    signal: TeacherSignal = DenseSignal(teacher) if isinstance(teacher, Tensor) else teacher
    expected, found = tuple(student_logits.shape), (signal.positions, signal.vocab_rows)
    if expected != found:
        raise ValueError(f"student logits are {expected} (positions, rows) but the teacher covers {found}")
    return signal


def check_logits(logits: Tensor, whose: str) -> None:
    """Refuse logits of which no loss can be computed; -inf marks a masked column and is valid. Compiled programs skip the check.

    Args:
        logits: [T, N]. whose: "student" or "teacher", for the message.

    Raises:
        NonFiniteLogits: NaN or +inf, or a row of -inf alone; names the first position.
    """
    if torch.compiler.is_compiling() or not logits.numel():
        return
    largest = logits.detach().amax(-1)  # torch orders NaN above every number
    if len(bad := (~largest.isfinite()).nonzero()):
        position = int(bad[0])
        raise NonFiniteLogits(
            f"the {whose}'s logits at position {position} of {len(largest)} are not finite: "
            f"the largest is {float(largest[position])}"
        )


def at_least_float32(x: Tensor) -> Tensor:
    """Raise half precisions to float32, leave float64 unchanged."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
