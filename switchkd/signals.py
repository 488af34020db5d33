"""What a teacher says about T supervised positions, whether it was cached or is live: `TeacherSignal`.

Losses read a signal through three methods and never know where it came from:

* `rows(student)`        its logits over all N vocabulary rows;
* `lead(rows, window)`   the teacher-led selection: its leading ids in descending order, and how many of them (the knee);
* `top(count)`           a fixed number of leading ids.

`DenseSignal` knows every logit. `SparseSignal` knows K of them and the tail's mass; what it answers for the others is a
named policy, one of `TAIL_POLICIES`, which may look at the student.
"""

from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from switchkd.kneedle import knee_of_sorted

TailPolicy = Literal["student", "uniform", "floor"]
TAIL_POLICIES: dict[str, str] = {
    "student": "the student's own logits, shifted to the tail's mass and held at the smallest cached logit; the teacher-led "
    "set goes on beyond K, up to the knee, in this order",
    "uniform": "the tail's mass, spread evenly: tail_logsumexp - log(N - K); probabilities sum to 1",
    "floor": "the smallest cached logit: an upper bound on every one of them",
}


# Corrections of the shift for what the ceiling cuts off; the gradient's error changes by under 0.4 points from 1 to 8.
_SHIFT_PASSES = 4


class TeacherSignal(Protocol):
    """The teacher's word on T positions over N vocabulary rows."""

    @property
    def vocab_rows(self) -> int:
        """N."""
        ...

    def __len__(self) -> int:
        """T."""
        ...

    def lead(self, rows: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Return (ids [T, k_max] int64 in the teacher's descending order, k [T] int64, 2 ≤ k ≤ k_max).

        Args:
            rows: what `rows` returned. window: see `kneedle`.
        """
        ...

    def top(self, count: int) -> Tensor:
        """Return the ids of the `count` largest logits in the teacher's descending order, [T, count] int64."""
        ...

    def rows(self, student: Tensor) -> Tensor:
        """Return the teacher's logits, [T, N], without a graph; `student` [T, N] may help to guess those that are not known."""
        ...

    def select(self, keep: Tensor) -> Self:
        """Return the signal of the positions where `keep` [T] bool is True."""
        ...


def top_of_rows(logits: Tensor, count: int) -> Tensor:
    """Return the ids of each row's `count` largest logits in descending order, [T, N] → [T, count] int64.

    Equal logits come in the order of their ids, so that the order of eq. 12's pairs is defined.
    """
    return logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :count]


def lead_of_rows(logits: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Select each row's leading entries up to its knee, in the order of `top_of_rows`.

    Args:
        logits: [T, N]. window: see `kneedle`.

    Returns:
        (ids [T, k_max] int64, k [T] int64), where k_max is the largest k of the batch (2 if T = 0).
    """
    ordered, ids = logits.detach().sort(dim=-1, descending=True, stable=True)
    k = knee_of_sorted(ordered, window)
    return ids[:, : _largest(k)], k


def _largest(k: Tensor) -> int:
    return int(k.max()) if len(k) else 2


@dataclass(frozen=True)
class DenseSignal:
    """A teacher whose logits are all at hand: live, or made from its final hidden states."""

    logits: Tensor  # [T, N]

    @property
    def vocab_rows(self) -> int:
        """N."""
        return self.logits.shape[-1]

    def __len__(self) -> int:
        return len(self.logits)

    def lead(self, rows: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """See `TeacherSignal.lead`."""
        return lead_of_rows(rows, window)

    def top(self, count: int) -> Tensor:
        """See `TeacherSignal.top`."""
        return top_of_rows(self.logits, count)

    def rows(self, student: Tensor) -> Tensor:
        """See `TeacherSignal.rows`."""
        return self.logits.detach()

    def select(self, keep: Tensor) -> "DenseSignal":
        """See `TeacherSignal.select`."""
        return DenseSignal(self.logits[keep])


@dataclass(frozen=True)
class SparseSignal:
    """A teacher known by its K largest logits and statistics over all N, as a `topk` payload holds them.

    Exact where K covers what is asked: K = N, a window ≤ K, or KL terms inside the top K. Otherwise `tail` decides. With the
    policies that do not look at the student, the teacher-led set of full-vocabulary DBiLD is cut at K.
    """

    ids: Tensor  # [T, K] int64, in the teacher's descending order
    logits: Tensor  # [T, K]
    tail_logsumexp: Tensor  # [T], nats: log Σ e^z over the N - K others; -inf if K = N
    knee: Tensor  # [T] int64, over all N rows
    vocab_rows: int  # N
    tail: TailPolicy = "student"

    def __len__(self) -> int:
        return len(self.ids)

    def lead(self, rows: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """See `TeacherSignal.lead`.

        Raises:
            ValueError: the window is wider than the K cached logits, so its knee is not known.
        """
        cached = self.ids.shape[-1]
        if window is not None:
            if window > cached:
                raise ValueError(f"window = {window} asks for more than the {cached} cached logits a position")
            k = knee_of_sorted(self.logits, window)
        elif self.tail == "student":
            k = self.knee.clamp(2, self.vocab_rows)
        else:
            k = self.knee.clamp(2, cached)
        largest = _largest(k)
        if largest <= cached:
            return self.ids[:, :largest], k
        others = rows.scatter(
            -1, self.ids, -torch.inf
        )  # guesses may equal the smallest cached logit; they come after it
        return torch.cat([self.ids, others.topk(largest - cached, dim=-1).indices], dim=-1), k

    def top(self, count: int) -> Tensor:
        """See `TeacherSignal.top`. Raises ValueError if fewer than `count` are cached."""
        if count > self.ids.shape[-1]:
            raise ValueError(f"{count} leading logits asked for, {self.ids.shape[-1]} a position are cached")
        return self.ids[:, :count]

    def rows(self, student: Tensor) -> Tensor:
        """See `TeacherSignal.rows`; entries outside the top K follow the tail policy."""
        others = self.vocab_rows - self.ids.shape[-1]
        if others and self.tail == "student":
            return self._rows_beside(student.detach())
        if others and self.tail == "uniform":
            fill = self.tail_logsumexp - torch.tensor(float(others)).log().item()
        else:
            fill = self.logits[:, -1]
        rows = fill.to(self.logits.dtype).unsqueeze(-1).repeat(1, self.vocab_rows)
        return rows.scatter_(-1, self.ids, self.logits)

    def _rows_beside(self, student: Tensor) -> Tensor:
        """Guess the tail from the student, [T, N]: one shift a row gives it the teacher's mass.

        No uncached logit exceeds the smallest cached one, so the guess is held there, and the shift is corrected for what that
        cuts off. Measured against the true tail in docs/payloads.md.
        """
        logits = self.logits.to(student.dtype)
        tail = student.scatter(-1, self.ids, -torch.inf)
        ceiling, target = logits[:, -1:], self.tail_logsumexp.to(student.dtype).unsqueeze(-1)
        shift = target - tail.logsumexp(-1, keepdim=True)
        for _ in range(_SHIFT_PASSES):
            held = torch.minimum(tail + shift, ceiling)
            shift = shift + target - held.logsumexp(-1, keepdim=True)
        return torch.minimum(tail + shift, ceiling).scatter_(-1, self.ids, logits)

    def select(self, keep: Tensor) -> "SparseSignal":
        """See `TeacherSignal.select`."""
        tensors = {f.name: getattr(self, f.name)[keep] for f in fields(self) if f.name not in ("vocab_rows", "tail")}
        return replace(self, **tensors)
