"""Measures how far reconstructed teacher logits are from exact ones, and what that does to the gradient of DBiLD.

The gradient depends on the student. Without one, students are made at three distances from the teacher: noise on the teacher's
logits as a student of the same width could have it, which is a product of the LM head. The noise has the same effect on the logits
for every feature, whatever the feature's scale, since a few features of real models are some hundred times as large as the others.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from switchkd.losses import dbild_loss
from switchkd.losses.lm_head import IDENTITY, LMHead, LogitMap, float32_logits
from switchkd.losses.selection import leading_entries
from switchkd.losses.signals import DenseSignal, SparseSignal, TeacherSignal
from switchkd.pipelines.capture.tables import column_spread

DISTANCES = {"near": 0.05, "middle": 0.3, "far": 1.5}  # mean KL(teacher ‖ student), nats
CHUNK_LOGITS = 1 << 23  # logits of one tensor that are in memory at a time
_FIT_POSITIONS = 256  # positions on which the size of the noise is fitted


@dataclass(frozen=True)
class Student:
    """A student's logits at P positions."""

    name: str
    logits: Tensor  # [P, N] float32
    head: Tensor  # [N, d], its LM head: carries a gradient of logits back to its final states
    logit_map: LogitMap = IDENTITY  # what it makes of its LM head's output


@dataclass(frozen=True)
class Fidelity:
    """How one reconstruction of the teacher's logits compares with the exact ones, for one student; means over positions.

    Attributes:
        kl_nats: KL(exact ‖ reconstruction), all N rows.
        rms_error: root-mean-square error of the logits that are stored; a shift common to a position is not counted.
        row_error: median over positions of the largest such error. largest_error: the largest of all.
        knee_moved: share of positions with another teacher-led k.
        teacher_led_recall: share of the exact teacher-led ids that are in the reconstruction's.
        student_led_recall: share of the student-led ids whose teacher logit is stored, and not estimated.
        gradient_error: ‖g - g_exact‖ / ‖g_exact‖ of DBiLD, with respect to the student's logits.
        state_gradient_error: the same with respect to its final states.
    """

    kl_nats: float
    rms_error: float
    row_error: float
    largest_error: float
    knee_moved: float
    teacher_led_recall: float
    student_led_recall: float
    gradient_error: float
    state_gradient_error: float


def make_students(exact: Tensor, head: Tensor, seed: int) -> list[Student]:
    """Make students at the three `DISTANCES`.

    The noise of a position is W (n / s), with W the LM head, s the spread of its columns and n normal: each feature contributes
    equally to the error of a logit.

    Args:
        exact: the teacher's logits, [P, N] float32. head: its LM head's rows in use, [N, d]. seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    spread = torch.from_numpy(column_spread(head)).to(head.device, torch.float32)
    spread = spread.clamp_min(1e-4 * float(spread.square().mean().sqrt()))
    made = []
    for name, distance in DISTANCES.items():
        noise = torch.randn(len(exact), head.shape[1], generator=generator).to(head.device) / spread
        unit = float32_logits(noise / head.shape[1] ** 0.5, head)
        unit -= unit.mean(-1, keepdim=True)
        size = _size_for(distance, exact[:_FIT_POSITIONS], unit[:_FIT_POSITIONS])
        made.append(Student(f"{name}, KL {distance:g}", exact + size * unit, head))
    return made


def _size_for(distance: float, exact: Tensor, unit: Tensor) -> float:
    """Return the factor by which noise is multiplied for a mean KL of `distance`, by bisection; 0 without positions."""
    if not len(exact):
        return 0.0
    low, high = 0.0, 64.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if _kl(exact, exact + middle * unit).mean() < distance else (low, middle)
    return (low + high) / 2


def compare(student: Student, exact: TeacherSignal, found: TeacherSignal) -> Fidelity:
    """Compare a reconstruction with the exact logits at the same P positions, chunk by chunk.

    Args:
        exact: the signal of the exact teacher. found: the reconstruction.
    """
    sums = _Sums()
    for rows in chunks(len(student.logits), student.logits.shape[-1]):
        slope = None if student.logit_map.is_identity else student.logit_map.slope(student.logits[rows])
        sums.add(student.logits[rows], student.head, slope, exact.slice_rows(rows), found.slice_rows(rows))
    return sums.result()


def chunks(positions: int, vocab_rows: int) -> Iterator[slice]:
    """Split P positions into chunks with about `CHUNK_LOGITS` logits."""
    size = max(1, CHUNK_LOGITS // vocab_rows)
    return (slice(begin, min(begin + size, positions)) for begin in range(0, positions, size))


def _kl(p: Tensor, q: Tensor) -> Tensor:
    log_p = p.log_softmax(-1)
    return (log_p.exp() * (log_p - q.log_softmax(-1))).sum(-1)


@dataclass
class _Sums:
    positions: int = 0
    kl: float = 0.0
    squared_error: float = 0.0
    stored: int = 0
    moved: int = 0
    teacher_led: int = 0
    teacher_led_found: int = 0
    student_led: int = 0
    student_led_stored: int = 0
    squares: tuple[float, float] = (0.0, 0.0)  # of the exact gradient: at the logits, at the states
    differences: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        self.row_errors: list[Tensor] = [torch.zeros(0)]

    def add(
        self, student: Tensor, head: Tensor, slope: Tensor | None, exact: TeacherSignal, found: TeacherSignal
    ) -> None:
        live, rebuilt = (signal.rows(student).float() for signal in (exact, found))
        self.positions += len(live)
        self.kl += float(_kl(live, rebuilt).sum())
        stored = torch.ones_like(live, dtype=torch.bool)
        if isinstance(found, SparseSignal):
            stored = torch.zeros_like(stored).scatter_(-1, found.ids, True)
        error = (rebuilt - live).masked_fill_(~stored, 0.0)
        if stored.all():
            error -= error.mean(-1, keepdim=True)
        self.squared_error += float(error.square().sum())
        self.stored += int(stored.sum())
        self.row_errors.append(error.abs().amax(-1).cpu())
        sides = [signal.leading_ids(rows) for signal, rows in ((exact, live), (found, rebuilt))]
        self.moved += int((sides[0][1] != sides[1][1]).sum())
        of_exact, of_found = (_led(*side, live.shape[-1]) for side in sides)
        self.teacher_led += int(of_exact.sum())
        self.teacher_led_found += int((of_exact & of_found).sum())
        of_student = _led(*leading_entries(student), live.shape[-1])
        self.student_led += int(of_student.sum())
        self.student_led_stored += int((of_student & stored).sum())
        wanted, got = _gradient(student, exact), _gradient(student, found)
        at_head = [g if slope is None else g * slope for g in (wanted, got - wanted)]
        states = [float32_logits(g, head.T.contiguous()) for g in at_head]
        self.squares = _plus(self.squares, wanted, states[0])
        self.differences = _plus(self.differences, got - wanted, states[1])

    def result(self) -> Fidelity:
        rows = torch.cat(self.row_errors)
        count = max(self.positions, 1)
        errors = [(d / s) ** 0.5 if s else 0.0 for d, s in zip(self.differences, self.squares, strict=True)]
        values = (
            self.kl / count,
            (self.squared_error / max(self.stored, 1)) ** 0.5,
            float(rows.median()) if len(rows) else 0.0,
            float(rows.max()) if len(rows) else 0.0,
            self.moved / count,
            self.teacher_led_found / max(self.teacher_led, 1),
            self.student_led_stored / max(self.student_led, 1),
            *errors,
        )
        return Fidelity(**dict(zip((field.name for field in fields(Fidelity)), values, strict=True)))


def _led(ids: Tensor, k: Tensor, vocab_rows: int) -> Tensor:
    """Return the leading ids as a mask, [P, N]."""
    keep = torch.arange(ids.shape[-1], device=ids.device) < k.unsqueeze(-1)
    mask = torch.zeros(len(ids), vocab_rows, dtype=torch.int8, device=ids.device)
    return mask.scatter_reduce_(-1, ids, keep.to(torch.int8), "amax").bool()


def _plus(sums: tuple[float, float], at_logits: Tensor, at_states: Tensor) -> tuple[float, float]:
    return sums[0] + float(at_logits.square().sum()), sums[1] + float(at_states.square().sum())


def _gradient(student: Tensor, signal: TeacherSignal) -> Tensor:
    """Return the gradient of dbild-rkl, summed over positions, with respect to the student's logits, [P, N]."""
    logits = student.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(dbild_loss(logits, signal, reduction="sum"), logits)
    return gradient


def exact_signal(states: Tensor, head: LMHead) -> DenseSignal:
    """Return the signal of float32 logits of final states, [P, d], all in memory."""
    return DenseSignal(head.logits(states))
