"""The teacher's signal at T positions, read from a store or computed live: `TeacherSignal` and its implementations.

Losses read a signal only through these methods, which do not depend on its origin:

* `rows(student)`              the teacher's logits over all N vocabulary rows;
* `leading_ids(rows, window)`  the teacher-led selection: its leading ids in descending order, and their number k, the knee: the
                               one of the exact logits where the signal has it, else that of `rows`;
* `top(count)`                 a fixed number of leading ids;
* `slice_rows(rows)`           the signal of consecutive positions, so that a loss can process them chunk by chunk.

`DenseSignal` holds every logit, `HiddenSignal` the final hidden states that the logits are computed from. `SparseSignal` holds K
logits and the mass of the tail; a tail policy, one of `TAIL_POLICIES`, estimates the others and may use the student's logits.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from switchkd.losses.lm_head import IDENTITY, LogitMap, float32_logits
from switchkd.losses.selection import entries_up_to, knee_of_sorted, leading_entries, top_of_rows
from switchkd.settings import TailPolicy

TAIL_POLICIES: dict[str, str] = {
    "student": "the student's own logits, shifted to the tail's mass and held at the smallest cached logit; the teacher-led "
    "set goes on beyond K, up to the knee, in this order",
    "uniform": "the tail's mass, spread evenly: tail_logsumexp - log(N - K); probabilities sum to 1",
    "floor": "the smallest cached logit: an upper bound on every one of them",
}


# Number of corrections of the shift for the clamped mass. From 1 to 8 of them, the gradient's error changes by under 0.4 points.
_SHIFT_PASSES = 4


class TeacherSignal(Protocol):
    """The teacher's signal: its logits at T positions over N vocabulary rows."""

    @property
    def vocab_rows(self) -> int:
        """N."""
        ...

    @property
    def positions(self) -> int:
        """T."""
        ...

    def leading_ids(self, rows: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Return (ids [T, k_max] int64 in the teacher's descending order, k [T] int64, 2 ≤ k ≤ k_max).

        Args:
            rows: the result of `rows`. window: see `kneedle`.
        """
        ...

    def top(self, count: int) -> Tensor:
        """Return the ids of the `count` largest logits in the teacher's descending order, [T, count] int64."""
        ...

    def rows(self, student: Tensor) -> Tensor:
        """Return the teacher's logits, [T, N], without a graph; `student` [T, N] may serve to estimate those not cached."""
        ...

    def select(self, keep: Tensor) -> Self:
        """Return the signal of the positions where `keep` [T] bool is True."""
        ...

    def slice_rows(self, rows: slice) -> "TeacherSignal":
        """Return the signal of consecutive positions; a signal that computes its logits does so here, once."""
        ...


@torch.library.custom_op(
    "switchkd::ids_up_to", mutates_args=()
)  # a torch operator for the same reason as in `selection`
def _ids_up_to(cached: Tensor, rows: Tensor, k: Tensor) -> Tensor:
    """Return the leading ids of [T, N] rows up to the largest k, [T, k_max]: first the [T, K] cached, then the others by logit."""
    largest = int(k.max()) if len(k) else 2
    if largest <= cached.shape[-1]:
        return cached[:, :largest].clone()
    others = rows.scatter(
        -1, cached, -torch.inf
    )  # estimates may equal the smallest cached logit; they are ordered after it
    return torch.cat([cached, others.topk(largest - cached.shape[-1], dim=-1).indices], dim=-1)


@_ids_up_to.register_fake
def _(cached: Tensor, rows: Tensor, k: Tensor) -> Tensor:
    return cached.new_empty(cached.shape[0], torch.library.get_ctx().new_dynamic_size(min=2))


@dataclass(frozen=True)
class DenseSignal:
    """Signal with all logits in memory: computed by a live teacher, or from its final hidden states."""

    logits: Tensor  # [T, N]
    knee: Tensor | None = None  # [T] int64, over all N rows, where it is known better than these logits tell it
    leads: dict[int | None, tuple[Tensor, Tensor]] = field(
        default_factory=dict, repr=False
    )  # window → result of `leading_ids`

    @property
    def vocab_rows(self) -> int:
        """N."""
        return self.logits.shape[-1]

    @property
    def positions(self) -> int:
        """T."""
        return self.logits.shape[0]

    def leading_ids(self, rows: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """See `TeacherSignal.leading_ids`. The result is cached: Align and VSD share the teacher's order and knee."""
        if window not in self.leads:
            self.leads[window] = self._find_leads(rows, window)
        return self.leads[window]

    def _find_leads(self, rows: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        if self.knee is None or (window is not None and window < self.vocab_rows):
            return leading_entries(rows, window)
        k = self.knee.clamp(2, self.vocab_rows)
        return entries_up_to(rows, k), k

    def top(self, count: int) -> Tensor:
        """See `TeacherSignal.top`."""
        return top_of_rows(self.logits, count)

    def rows(self, student: Tensor) -> Tensor:
        """See `TeacherSignal.rows`."""
        return self.logits.detach()

    def select(self, keep: Tensor) -> "DenseSignal":
        """See `TeacherSignal.select`."""
        leads = {window: (ids[keep], k[keep]) for window, (ids, k) in self.leads.items()}
        return DenseSignal(self.logits[keep], None if self.knee is None else self.knee[keep], leads)

    def slice_rows(self, rows: slice) -> "DenseSignal":
        """See `TeacherSignal.slice_rows`."""
        return DenseSignal(self.logits[rows], None if self.knee is None else self.knee[rows])


class _FromStates:
    """What signals of hidden states have in common: all is read from the logits of `slice_rows`."""

    hidden: Tensor
    knee: Tensor | None

    @property
    def positions(self) -> int:
        """T."""
        return self.hidden.shape[0]

    def leading_ids(self, rows: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """See `TeacherSignal.leading_ids`."""
        return DenseSignal(rows, self.knee).leading_ids(rows, window)

    def top(self, count: int) -> Tensor:
        """See `TeacherSignal.top`."""
        return self.slice_rows(slice(None)).top(count)

    def rows(self, student: Tensor) -> Tensor:
        """See `TeacherSignal.rows`."""
        return self.slice_rows(slice(None)).logits

    def slice_rows(self, rows: slice) -> DenseSignal:
        """See `TeacherSignal.slice_rows`."""
        raise NotImplementedError


@dataclass(frozen=True)
class HiddenSignal(_FromStates):
    """Signal that holds the teacher's final hidden states, stored or live; the LM head computes the logits of what is read."""

    hidden: Tensor  # [T, d]
    head: Tensor  # [N, d], the LM head's rows in use; its logits are float32, see `float32_logits`
    knee: Tensor | None = (
        None  # [T] int64, over all N rows, of the exact logits; None: found on the logits computed here
    )
    logit_map: LogitMap = IDENTITY  # what the model makes of the LM head's product

    @property
    def vocab_rows(self) -> int:
        """N."""
        return len(self.head)

    def select(self, keep: Tensor) -> "HiddenSignal":
        """See `TeacherSignal.select`."""
        knee = None if self.knee is None else self.knee[keep]
        return HiddenSignal(self.hidden[keep], self.head, knee, self.logit_map)

    def slice_rows(self, rows: slice) -> DenseSignal:
        """See `TeacherSignal.slice_rows`."""
        with torch.no_grad():
            logits = self.logit_map(float32_logits(self.hidden[rows], self.head))
        return DenseSignal(logits, None if self.knee is None else self.knee[rows])


@dataclass(frozen=True)
class MixedHiddenSignal(_FromStates):
    """Signal that holds the final hidden states of several teachers with one vocabulary, each position of one of them."""

    hidden: Tensor  # [T, d], d of the widest teacher; narrower states are filled up on the right
    heads: tuple[
        tuple[Tensor, LogitMap], ...
    ]  # of each teacher: LM head [N, d_i], d_i ≤ d, and what is made of its product
    teacher: Tensor  # [T] int64, number of each position's teacher
    knee: Tensor | None = None  # see `HiddenSignal`

    @property
    def vocab_rows(self) -> int:
        """N."""
        return len(self.heads[0][0])

    def select(self, keep: Tensor) -> "MixedHiddenSignal":
        """See `TeacherSignal.select`."""
        knee = None if self.knee is None else self.knee[keep]
        return MixedHiddenSignal(self.hidden[keep], self.heads, self.teacher[keep], knee)

    def slice_rows(self, rows: slice) -> DenseSignal:
        """See `TeacherSignal.slice_rows`."""
        hidden, teacher = self.hidden[rows], self.teacher[rows]
        logits = hidden.new_empty(
            (len(hidden), self.vocab_rows), dtype=torch.promote_types(self.heads[0][0].dtype, torch.float32)
        )
        with torch.no_grad():
            for number, (head, logit_map) in enumerate(self.heads):
                own = teacher == number
                states = hidden[own, : head.shape[1]]
                if len(states):
                    logits[own] = logit_map(float32_logits(states, head))
        return DenseSignal(logits, None if self.knee is None else self.knee[rows])


@dataclass(frozen=True)
class SparseSignal:
    """Signal that holds the teacher's K largest logits and statistics over all N rows, as in a `topk` payload.

    Results are exact where K = N. Otherwise logits outside the top K follow the tail policy `tail`; with a window ≤ K, the
    teacher-led set is exact, but student-led ids may lie outside. With policies that do not use the student's logits, the
    teacher-led set of full-vocabulary DBiLD is cut at K.
    """

    ids: Tensor  # [T, K] int64, in the teacher's descending order
    logits: Tensor  # [T, K]
    tail_logsumexp: Tensor  # [T], nats: log Σ e^z over the N - K others; -inf if K = N
    knee: Tensor  # [T] int64, over all N rows
    vocab_rows: int  # N
    tail: TailPolicy = "student"

    def __post_init__(self) -> None:
        if self.tail not in TAIL_POLICIES:
            raise ValueError(f"tail is one of {', '.join(TAIL_POLICIES)}, got {self.tail!r}")

    @property
    def positions(self) -> int:
        """T."""
        return self.ids.shape[0]

    def leading_ids(self, rows: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """See `TeacherSignal.leading_ids`.

        Raises:
            ValueError: the window is wider than the K cached logits, so its knee cannot be computed.
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
        return _ids_up_to(self.ids, rows.detach(), k), k

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
        """Estimate the tail from the student's logits, [T, N]: one shift per row gives the tail the teacher's mass.

        No uncached logit exceeds the smallest cached one, so the estimates are clamped to it, and the shift is corrected for the
        mass that the clamp removes. docs/payloads.md reports measurements against the true tail.
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
        return self._take(keep)

    def slice_rows(self, rows: slice) -> "SparseSignal":
        """See `TeacherSignal.slice_rows`."""
        return self._take(rows)

    def _take(self, keep: Tensor | slice) -> "SparseSignal":
        tensors = {f.name: getattr(self, f.name)[keep] for f in fields(self) if f.name not in ("vocab_rows", "tail")}
        return replace(self, **tensors)
