"""A loss on logits, computed from hidden states and LM heads without the logits of all positions ever existing.

[T, V] logits of a Qwen vocabulary take 0.6 GB for a thousand positions, and a loss makes several tensors of that size. Here a
chunk of positions goes through the LM head, the loss and back to gradients of hidden states and LM head, all in the forward
pass; the next chunk then reuses the memory. The backward pass only scales what is known. The scheme is that of Liger-Kernel's
fused linear cross entropy (arXiv 2410.10989), for any loss that is a sum over positions.

Plain torch: matrix products run in the libraries of the device, and what is left is a few passes over a chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits of a chunk, 64 MiB in float32: enough positions for efficient matrix products, little beside the LM head itself.
CHUNK_LOGITS = 1 << 24


class LMHead(NamedTuple):
    """The last linear layer of a language model."""

    weight: Tensor  # [V, d]
    bias: Tensor | None = None  # [V]

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, d] → [T, V], computed in the head's dtype and returned in float32 or above."""
        return at_least_float32(F.linear(hidden.to(self.weight.dtype), self.weight, self.bias))


class Chunk(NamedTuple):
    """Some consecutive positions, as a loss sees them."""

    rows: slice  # of the T positions
    logits: Tensor  # [c, V], float32 or float64
    switch: Tensor | None  # z_switch at those of them that belong to images, [c', V_T]; None if there is none


# A chunk → (what is minimised, its parts for the log), sums over the chunk's positions
LossOfChunk = Callable[[Chunk], tuple[Tensor, Tensor]]


def at_least_float32(x: Tensor) -> Tensor:
    """Raise half precisions to float32, leave float64 alone."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def loss_in_chunks(
    hidden: Tensor,
    head: LMHead,
    loss_of_chunk: LossOfChunk,
    *,
    switch_hidden: Tensor | None = None,
    switch_head: LMHead | None = None,
    on_image: Tensor | None = None,
    chunk_positions: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (Σ of what is minimised, scalar with graph; Σ of its parts, without) over all positions.

    Gradients reach `hidden`, `head` and `switch_hidden`; `switch_head` is frozen. Both LM heads may be of a half precision: the
    loss is computed on logits raised to float32, the gradient of the weight is summed over chunks in float32. Under autocast the
    student's LM head runs in autocast's dtype.

    Args:
        hidden: the student's final hidden states, [T, d].
        head: the student's LM head; may be tied to its embedding.
        loss_of_chunk: differentiable in the chunk's logits; anything else that it reads receives no gradient.
        switch_hidden: the switch pathway's hidden states at the positions of image samples, in order, [T', d_T].
        switch_head: the teacher's LM head, wanted with `switch_hidden`.
        on_image: [T] bool with T' True; wanted with `switch_hidden`.
        chunk_positions: positions at a time; by default what makes `CHUNK_LOGITS` logits.

    Raises:
        ValueError: the switch pathway's arguments do not go together.
    """
    if switch_hidden is not None:
        if switch_head is None or on_image is None:
            raise ValueError("switch_hidden comes with switch_head and on_image")
        if int(on_image.sum()) != len(switch_hidden):
            raise ValueError(f"on_image marks {int(on_image.sum())} positions, switch_hidden has {len(switch_hidden)}")
    autocast = hidden.device.type if torch.is_autocast_enabled(hidden.device.type) else None
    work = _Work(
        loss_of_chunk=loss_of_chunk,
        switch_head=switch_head,
        on_image=on_image,
        positions=chunk_positions or max(1, CHUNK_LOGITS // len(head.weight)),
        dtype=torch.get_autocast_dtype(autocast) if autocast else hidden.dtype,
        with_gradients=torch.is_grad_enabled(),
    )
    with torch.autocast(hidden.device.type, enabled=False):
        total, parts = _InChunks.apply(hidden, head.weight, head.bias, switch_hidden, work)  # type: ignore[no-untyped-call]
    return total, parts


@dataclass(frozen=True)
class _Work:
    """What is done, apart from the tensors that receive a gradient."""

    loss_of_chunk: LossOfChunk
    switch_head: LMHead | None
    on_image: Tensor | None
    positions: int  # in a chunk
    dtype: torch.dtype  # of the student's matrix products
    with_gradients: bool

    def spans(self, count: int) -> Iterator[tuple[slice, slice]]:
        """Yield each chunk's positions, and its part of the switch pathway's positions."""
        starts = list(range(0, count, self.positions))
        if self.on_image is None:
            before = [0] * (len(starts) + 1)
        else:
            chunks = [chunk.sum() for chunk in torch.split(self.on_image, self.positions)] if starts else []
            before = [0, *(torch.stack(chunks).cumsum(0).tolist() if chunks else [])]
        for number, start in enumerate(starts):
            yield slice(start, min(start + self.positions, count)), slice(before[number], before[number + 1])


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, switch_hidden: Tensor | None, work: _Work
    ) -> tuple[Tensor, Tensor]:
        wanted = [work.with_gradients and needed for needed in ctx.needs_input_grad[:4]]
        sums = _Gradients(hidden, weight, bias, switch_hidden, wanted)
        head = LMHead(weight.to(work.dtype), None if bias is None else bias.to(work.dtype))
        total = parts = None
        for rows, switch_rows in work.spans(len(hidden)):
            states = hidden[rows].to(work.dtype)
            switch = None
            if switch_hidden is not None and work.switch_head is not None and switch_rows.stop > switch_rows.start:
                switch = work.switch_head.logits(switch_hidden[switch_rows])
            chunk = Chunk(rows, head.logits(states), switch)
            loss, of_parts, of_logits, of_switch = _loss_and_gradients(work.loss_of_chunk, chunk, any(wanted))
            total, parts = (loss, of_parts) if total is None or parts is None else (total + loss, parts + of_parts)
            if of_logits is not None:
                sums.add(rows, states, head.weight, of_logits)
            if of_switch is not None and work.switch_head is not None:
                sums.add_switch(switch_rows, work.switch_head.weight, of_switch)
            del chunk, of_logits, of_switch  # before the next chunk is made
        if total is None or parts is None:
            total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
            parts = total.new_zeros(0)
        ctx.gradients = sums.finished()
        ctx.mark_non_differentiable(parts)
        ctx.set_materialize_grads(False)
        return total, parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError(
                "a fused loss gives its gradients away and can go backward once: do not retain its graph"
            )
        gradients, ctx.gradients = ctx.gradients, None
        if grad_total is None:
            return None, None, None, None, None
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(grad_total)
        return (*gradients, None)


def _loss_and_gradients(
    loss_of_chunk: LossOfChunk, chunk: Chunk, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return a chunk's (loss, parts, d loss / d logits, d loss / d switch logits)."""
    if not with_gradients:
        return *loss_of_chunk(chunk), None, None
    inputs = [chunk.logits.requires_grad_()] + ([] if chunk.switch is None else [chunk.switch.requires_grad_()])
    with torch.enable_grad():
        loss, parts = loss_of_chunk(chunk)
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return loss.detach(), parts.detach(), found[0], found[1] if chunk.switch is not None else None


class _Gradients:
    """Gradients of the four inputs, filled chunk by chunk; None where none is wanted."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, switch_hidden: Tensor | None, wanted: list[bool]
    ) -> None:
        self.dtypes = [x.dtype if x is not None else None for x in (hidden, weight, bias, switch_hidden)]
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=_sum_dtype(weight)) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=_sum_dtype(bias)) if bias is not None and wanted[2] else None
        self.switch = torch.zeros_like(switch_hidden) if switch_hidden is not None and wanted[3] else None

    def add(self, rows: slice, states: Tensor, weight: Tensor, of_logits: Tensor) -> None:
        """Carry the gradient of a chunk's logits [c, V] back through the student's LM head."""
        if self.bias is not None:
            self.bias += of_logits.sum(0)
        of_logits = of_logits.to(states.dtype)
        if self.hidden is not None:
            self.hidden[rows] = of_logits @ weight
        if self.weight is not None and self.weight.dtype == states.dtype:
            self.weight.addmm_(of_logits.T, states)
        elif self.weight is not None:
            self.weight += of_logits.T @ states

    def add_switch(self, rows: slice, weight: Tensor, of_logits: Tensor) -> None:
        """Carry the gradient of a chunk's z_switch [c', V_T] back through the teacher's LM head."""
        if self.switch is not None:
            self.switch[rows] = of_logits.to(weight.dtype) @ weight

    def finished(self) -> list[Tensor | None]:
        """Return the gradients in their inputs' dtypes."""
        found = (self.hidden, self.weight, self.bias, self.switch)
        return [None if g is None or d is None else g.to(d) for g, d in zip(found, self.dtypes, strict=True)]


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
