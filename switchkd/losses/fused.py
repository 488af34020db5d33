"""Computes losses on logits from hidden states and LM heads chunk by chunk, without materialising the [T, V] logits.

[T, V] logits of a Qwen vocabulary take 0.6 GB for a thousand positions, and a loss allocates several tensors of that size. Here,
the forward pass computes for each chunk of positions the logits, the loss, and the gradients of hidden states and LM head; the
next chunk reuses the memory. The backward pass only scales these stored gradients. The scheme is that of Liger-Kernel's
fused linear cross entropy (arXiv 2410.10989), for any loss that is a sum over positions.

The code is plain torch: matrix products run in the libraries of the device, and the rest is a few passes over a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchkd.losses.lm_head import IDENTITY, LMHead, LogitMap

# Logits of a chunk, 80 MiB in float32: 138 positions of a Qwen vocabulary, enough for efficient matrix products and few reads of
# the LM heads; small compared with the LM head itself.
CHUNK_LOGITS = 5 << 22
# A loss allocates about ten tensors of the size of its input. On a CPU it receives blocks of a chunk, small enough that these
# tensors stay in cache and in memory that is already allocated; on an accelerator it receives whole chunks.
BLOCK_LOGITS = {"cpu": 1 << 19}


@dataclass(frozen=True)
class SwitchStates:
    """The teacher's final hidden states on the switch pathway, and the LM head that maps them to z_switch.

    Attributes:
        hidden: [P_image, d_T], at the positions of image samples, in order; carries a graph.
        head: the teacher's LM head, frozen.
        on_image: [P] bool with P_image True: which of all positions belong to image samples. The positions are those of the
            student, or those of a teacher with another tokenizer.
        scale: factor on VSD, where these are a share of the image samples.
    """

    hidden: Tensor
    head: LMHead
    on_image: Tensor
    scale: float = 1.0


class Block(NamedTuple):
    """Consecutive positions that a loss processes at a time."""

    rows: slice  # of the T positions
    in_chunk: slice  # the same positions, relative to the start of the chunk
    logits: Tensor  # [c, V], float32 or float64; before a loss reads them, the products of which `LMHead.logit_map` makes logits
    switch: Tensor | None  # z_switch at the block's positions of image samples, [c', V_T]; None if there is none


# A block → (total that is minimised, its terms for the log), sums over the block's positions
LossOfBlock = Callable[[Block], tuple[Tensor, Tensor]]
# Positions of a chunk → loss function of its blocks; holds the work that is done once per chunk
OpenChunk = Callable[[slice], LossOfBlock]


# The function calls autograd itself, so a compiled program has a graph break here.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def loss_in_chunks(
    hidden: Tensor,
    head: LMHead,
    open_chunk: OpenChunk,
    *,
    switch: SwitchStates | None = None,
    chunk_positions: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (sum of the total that is minimised, scalar with graph; sums of its terms, without graph) over all positions.

    Gradients reach `hidden`, `head` and `switch.hidden`; `switch.head` is frozen. Both LM heads may be of a half precision:
    the logits are float32 (`lm_head.float32_logits`), the gradient of the weight is summed over chunks in float32. Under autocast
    the operands of the student's LM head have autocast's dtype.

    Args:
        hidden: the student's final hidden states, [T, d].
        head: the student's LM head; may be tied to its embedding.
        open_chunk: maps a chunk's positions to the loss function of its blocks. The loss is differentiable in a block's logits;
            no other tensor that it reads receives a gradient.
        switch: the switch pathway, whose `on_image` covers the same T positions; None without VSD.
        chunk_positions: maximum number of positions per chunk; by default, as many as give `CHUNK_LOGITS` logits.

    Raises:
        ValueError: `switch.on_image` marks another number of positions than `switch.hidden` has.
    """
    if switch is not None and (marked := int(switch.on_image.sum())) != len(switch.hidden):
        raise ValueError(f"on_image marks {marked} positions, switch_hidden has {len(switch.hidden)}")
    autocast = hidden.device.type if torch.is_autocast_enabled(hidden.device.type) else None
    work = _Work(
        open_chunk=open_chunk,
        switch=switch,
        positions=chunk_positions or max(1, CHUNK_LOGITS // len(head.weight)),
        dtype=torch.get_autocast_dtype(autocast) if autocast else hidden.dtype,
        maps=(head.logit_map, IDENTITY if switch is None else switch.head.logit_map),
        with_gradients=torch.is_grad_enabled(),
    )
    with torch.autocast(hidden.device.type, enabled=False):
        switch_hidden = None if switch is None else switch.hidden
        total, parts = _InChunks.apply(hidden, head.weight, head.bias, switch_hidden, work)  # type: ignore[no-untyped-call]
    return total, parts


@dataclass(frozen=True)
class _Work:
    """Arguments of `_InChunks` that receive no gradient; the tensors that do are passed to autograd separately."""

    open_chunk: OpenChunk
    switch: SwitchStates | None
    positions: int  # in a chunk, at most
    dtype: torch.dtype  # of the student's matrix products
    maps: tuple[LogitMap, LogitMap]  # of the student's products to its logits, and of the switch pathway's
    with_gradients: bool

    def images_before(self, count: int) -> list[int]:
        """Return how many of the first 0, 1 … count positions belong to images."""
        return [0] * (count + 1) if self.switch is None else [0, *self.switch.on_image.cumsum(0).tolist()]


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, switch_hidden: Tensor | None, work: _Work
    ) -> tuple[Tensor, Tensor]:
        wanted = [work.with_gradients and needed for needed in ctx.needs_input_grad[:4]]
        sums = _Gradients((hidden, weight, bias, switch_hidden), wanted)
        head = LMHead(weight.to(work.dtype), None if bias is None else bias.to(work.dtype))
        before = work.images_before(len(hidden))
        block_rows = max(1, BLOCK_LOGITS.get(hidden.device.type, CHUNK_LOGITS) // len(weight))
        total = parts = None
        chunks = max(1, -(-len(hidden) // work.positions))
        step = max(
            1, -(-len(hidden) // chunks)
        )  # equal chunks: a small chunk reads the LM head as often as a large one
        for start in range(0, len(hidden), step):
            rows = slice(start, min(start + step, len(hidden)))
            switch_rows = slice(before[rows.start], before[rows.stop])
            states = hidden[rows].to(work.dtype)
            logits, switch = head.product(states), None
            if switch_hidden is not None and work.switch is not None and switch_rows.stop > switch_rows.start:
                switch = work.switch.head.product(switch_hidden[switch_rows])
            loss_of_block = work.open_chunk(rows)
            for first in range(rows.start, rows.stop, block_rows):
                last = min(first + block_rows, rows.stop)
                of_switch = slice(before[first] - switch_rows.start, before[last] - switch_rows.start)
                block = Block(
                    slice(first, last),
                    slice(first - start, last - start),
                    logits[first - start : last - start],
                    switch[of_switch] if switch is not None and of_switch.stop > of_switch.start else None,
                )
                loss, of_parts = _replace_by_gradients(loss_of_block, block, work.maps, any(wanted))
                total, parts = (loss, of_parts) if total is None or parts is None else (total + loss, parts + of_parts)
            if any(wanted):
                sums.add(rows, states, head.weight, logits)
                if switch is not None and work.switch is not None:
                    sums.add_switch(switch_rows, work.switch.head.weight, switch)
            del logits, switch, block, loss_of_block  # free the memory before the next chunk is computed
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


def _replace_by_gradients(
    loss_of_block: LossOfBlock, block: Block, maps: tuple[LogitMap, LogitMap], with_gradients: bool
) -> tuple[Tensor, Tensor]:
    """Return a block's (loss, terms), and overwrite the products that are its logits before `maps` with the loss's gradients."""
    if not with_gradients:
        return loss_of_block(_mapped(block, maps))
    places = [z for z in (block.logits, block.switch) if z is not None]
    inputs = [z.detach().requires_grad_() for z in places]
    block = block._replace(logits=inputs[0], switch=inputs[1] if len(inputs) > 1 else None)
    with torch.enable_grad():
        loss, parts = loss_of_block(_mapped(block, maps))
        found = torch.autograd.grad(loss, inputs, allow_unused=True)
    for place, gradient in zip(places, found, strict=True):
        place.copy_(gradient) if gradient is not None else place.zero_()
    return loss.detach(), parts.detach()


def _mapped(block: Block, maps: tuple[LogitMap, LogitMap]) -> Block:
    """Return a block of products as a block of logits."""
    switch = None if block.switch is None else maps[1](block.switch)
    return block._replace(logits=maps[0](block.logits), switch=switch)


class _Gradients:
    """Gradients of the four inputs, accumulated chunk by chunk; None for an input that needs no gradient."""

    def __init__(self, inputs: tuple[Tensor | None, ...], wanted: list[bool]) -> None:
        self.inputs = [x if is_wanted else None for x, is_wanted in zip(inputs, wanted, strict=True)]
        hidden, _, bias, switch_hidden = self.inputs
        self.hidden = None if hidden is None else torch.zeros_like(hidden)
        self.weight: Tensor | None = None  # the largest tensor; allocated by the first chunk
        self.bias = None if bias is None else torch.zeros_like(bias, dtype=_sum_dtype(bias))
        self.switch = None if switch_hidden is None else torch.zeros_like(switch_hidden)

    def add(self, rows: slice, states: Tensor, weight: Tensor, of_logits: Tensor) -> None:
        """Carry the gradient of a chunk's logits [c, V] back through the student's LM head."""
        if self.bias is not None:
            self.bias += of_logits.sum(0)
        of_logits = of_logits.to(states.dtype)
        if self.hidden is not None:
            self.hidden[rows] = of_logits @ weight
        wanted = self.inputs[1]
        if wanted is not None and self.weight is None:
            self.weight = (of_logits.T @ states).to(_sum_dtype(wanted))
        elif self.weight is not None and self.weight.dtype == states.dtype:
            self.weight.addmm_(of_logits.T, states)
        elif self.weight is not None:
            self.weight += of_logits.T @ states

    def add_switch(self, rows: slice, weight: Tensor, of_logits: Tensor) -> None:
        """Carry the gradient of a chunk's z_switch [c', V_T] back through the teacher's LM head."""
        if self.switch is not None:
            self.switch[rows] = of_logits.to(weight.dtype) @ weight

    def finished(self) -> list[Tensor | None]:
        """Return the gradients in their inputs' dtypes; zeros if no chunk contributed."""
        found = (self.hidden, self.weight, self.bias, self.switch)
        return [
            None if x is None else torch.zeros_like(x) if gradient is None else gradient.to(x.dtype)
            for x, gradient in zip(self.inputs, found, strict=True)
        ]


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
