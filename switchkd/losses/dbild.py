"""Bi-directional logits difference losses: DBiLD (paper, section 3.2) and BiLD (arXiv 2406.13555).

Both compare the pairwise differences among the top k logits of a leader, once with the teacher as leader and once with the
student. They differ only in k: DBiLD sets k to the knee of each row, BiLD uses a fixed number.
"""

from typing import Literal

import torch
from torch import Tensor

from switchkd.losses.pairwise_kl import pair_kl
from switchkd.losses.reduction import Reduction, as_signal, at_least_float32, check_logits, reduce_positions
from switchkd.losses.selection import leading_entries, top_of_rows
from switchkd.losses.signals import TeacherSignal

Divergence = Literal["reverse_kl", "forward_kl"]


def dbild_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TeacherSignal,
    *,
    temperature: float = 3.0,
    divergence: Divergence = "reverse_kl",
    window: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Dynamic bi-directional logits difference loss, eqs. 7-15: L_t + L_s.

    Teacher-led: the teacher's logits up to its knee and the student's at the same ids; student-led: the roles are swapped. For
    each model, the softmax is taken over all pairwise differences / temperature; `divergence` compares the two distributions. No
    gradient flows through the selection; it flows through the gathered student logits. There is no temperature² factor (BiLD's
    code has none; the paper shows none).

    Args:
        student_logits: [T, N], float; half precisions are raised to float32. -inf is a masked column: the loss is computed over
            the other columns; a column that only one model masks is left out of all pairs.
        teacher_logits: [T, N], or a `TeacherSignal` over the same T positions and N rows. Receives no gradient.
        temperature: τ of eq. 13.
        divergence: "reverse_kl" is KL(student ‖ teacher) (the paper's D_RKL), "forward_kl" KL(teacher ‖ student).
        window: see `kneedle`; None is the paper's setting.
        reduction: "mean" over positions (0 with a graph if T = 0), "sum", or "none".

    Returns:
        Nats: a scalar, or [T] with reduction "none".

    Raises:
        ValueError: shapes disagree, an unknown divergence or reduction, or a temperature that is not positive.
        NonFiniteLogits: NaN or +inf; names the position.
    """
    student, teacher = _prepare(student_logits, teacher_logits, temperature, divergence)
    teacher_rows = _rows_of(teacher, student)
    leads = teacher.leading_ids(teacher_rows, window), leading_entries(student, window)
    per_position = _both_branches(student, teacher_rows, leads, temperature, divergence)
    return reduce_positions(per_position, reduction)


def bild_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | TeacherSignal,
    *,
    top_k: int = 8,
    temperature: float = 3.0,
    divergence: Divergence = "forward_kl",
    reduction: Reduction = "mean",
) -> Tensor:
    """Bi-directional logits difference loss with a fixed k (BiLD, arXiv 2406.13555, section 3; the paper's Table 4).

    Args:
        top_k: how many of the leader's logits are paired; at least 2, at most N (or the cached K).

    Other arguments, result and errors: see `dbild_loss`.
    """
    student, teacher = _prepare(student_logits, teacher_logits, temperature, divergence)
    if not 2 <= top_k <= teacher.vocab_rows:
        raise ValueError(f"top_k must lie between 2 and the {teacher.vocab_rows} vocabulary rows, got {top_k}")
    k = torch.full(student.shape[:1], top_k, device=student.device)
    leads = (teacher.top(top_k), k), (top_of_rows(student, top_k), k)
    per_position = _both_branches(student, _rows_of(teacher, student), leads, temperature, divergence)
    return reduce_positions(per_position, reduction)


def _prepare(
    student_logits: Tensor, teacher: Tensor | TeacherSignal, temperature: float, divergence: str
) -> tuple[Tensor, TeacherSignal]:
    if divergence not in ("reverse_kl", "forward_kl"):
        raise ValueError(f"divergence must be 'reverse_kl' or 'forward_kl', got {divergence!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    signal = as_signal(student_logits, teacher)
    check_logits(student_logits, "student")
    return at_least_float32(student_logits), signal


def _rows_of(teacher: TeacherSignal, student: Tensor) -> Tensor:
    """Return the teacher's logits [T, N] in the student's dtype."""
    rows = teacher.rows(student).to(student.dtype)
    check_logits(rows, "teacher")
    return rows


def _both_branches(
    student: Tensor,
    teacher: Tensor,
    leads: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    temperature: float,
    divergence: str,
) -> Tensor:
    """L_t + L_s of eq. 7 for every position, [T]: teacher-led, then student-led (ids [T, k_max], k [T])."""
    widths = [ids.shape[-1] for ids, _ in leads]
    both = torch.cat([ids for ids, _ in leads], dim=-1)  # one gather, so that its backward makes one [T, N] tensor
    of_student, of_teacher = ((z.gather(-1, both) / temperature).split(widths, dim=-1) for z in (student, teacher))
    total = student.new_zeros(student.shape[:1])
    for s, t, (ids, k) in zip(of_student, of_teacher, leads, strict=True):
        keep = torch.arange(ids.shape[-1], device=ids.device) < k.unsqueeze(-1)  # [T, k_max]
        keep = keep & (s != -torch.inf) & (t != -torch.inf)  # a column that either model masks is left out of all pairs
        total = total + pair_kl(*((s, t) if divergence == "reverse_kl" else (t, s)), keep)
    return total
