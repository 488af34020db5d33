"""Kullback-Leibler divergence between next-token distributions: the FKL and RKL rows of the paper's Table 4."""

from typing import Literal

import torch
from torch import Tensor

from switchkd.losses.reduction import Reduction, as_signal, at_least_float32, check_logits, reduce_positions
from switchkd.losses.signals import TeacherSignal


def kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TeacherSignal,
    *,
    direction: Literal["forward", "reverse"] = "forward",
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """KL between the full next-token distributions of teacher and student.

    Args:
        student_logits: [T, N]; -inf is a masked column, whose probability is 0.
        teacher_logits: [T, N] or a `TeacherSignal`; receives no gradient.
        direction: "forward" is KL(teacher ‖ student) (Hinton et al. 2015), "reverse" KL(student ‖ teacher) (MiniLLM).
        temperature: divides both logits; no temperature² factor.
        reduction: see `dbild_loss`.

    Returns:
        Nats: a scalar, or [T] with reduction "none".

    Raises:
        ValueError: shapes disagree, unknown direction or reduction, or a temperature that is not positive.
        NonFiniteLogits: NaN or +inf; names the position.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    signal = as_signal(student_logits, teacher_logits)
    raised = at_least_float32(student_logits)
    student = (raised / temperature).log_softmax(-1)
    rows = signal.rows(raised).to(student.dtype)
    check_logits(student_logits, "student")
    check_logits(rows, "teacher")
    teacher = (rows / temperature).log_softmax(-1)
    p, q = (teacher, student) if direction == "forward" else (student, teacher)
    gap = (p - q).masked_fill(p == -torch.inf, 0)  # 0 log 0 = 0 at columns that p masks
    return reduce_positions((p.exp() * gap).sum(-1), reduction)
