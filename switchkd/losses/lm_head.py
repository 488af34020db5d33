"""The LM head's matrix product: float32 logits, whatever the dtype of the head.

DBiLD is discontinuous in the order of the logits and in their knee: logits rounded to bfloat16 change its gradient by about 10 %,
although each of them is off by 0.015 on average (docs/method.md). So a half-precision head multiplies operands of its own dtype,
but accumulates and returns float32.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

HALF = (torch.bfloat16, torch.float16)
# Rows of a half-precision head that are raised to float32 at a time where the device has no such product: they stay in cache.
RAISED_ROWS = 512


@dataclass(frozen=True)
class LogitMap:
    """What a model computes of the LM head's product x: softcap · tanh(scale · x / softcap), or scale · x without a soft-cap."""

    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_identity(self) -> bool:
        """Whether the product is the logits."""
        return self.scale == 1.0 and self.softcap is None

    def __str__(self) -> str:
        return f"scale {self.scale:g}, soft-cap {'none' if self.softcap is None else format(self.softcap, 'g')}"

    def __call__(self, product: Tensor) -> Tensor:
        """Map [T, V] → [T, V], differentiable."""
        scaled = product if self.scale == 1.0 else product * self.scale
        return scaled if self.softcap is None else torch.tanh(scaled / self.softcap) * self.softcap

    def slope(self, logits: Tensor) -> Tensor:
        """Return the derivative of the logits z with respect to the product, [T, V]: scale · (1 - (z / softcap)²)."""
        flat = torch.full_like(logits, self.scale)
        return flat if self.softcap is None else flat * (1 - (logits / self.softcap).square())


IDENTITY = LogitMap()


class LMHead(NamedTuple):
    """The last linear layer of a language model, and what the model makes of its output."""

    weight: Tensor  # [V, d]
    bias: Tensor | None = None  # [V]
    logit_map: LogitMap = IDENTITY

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, d] → [T, V], float32, or float64 for a float64 head; see `float32_logits`."""
        return self.logit_map(self.product(hidden))

    def product(self, hidden: Tensor) -> Tensor:
        """[T, d] → [T, V], what `logit_map` maps to the logits."""
        return float32_logits(hidden, self.weight, self.bias)

    def rows(self, count: int) -> "LMHead":
        """Return the head of the first `count` vocabulary rows."""
        return self._replace(weight=self.weight[:count], bias=None if self.bias is None else self.bias[:count])


def float32_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return hidden · weightᵀ + bias, in float32 or above, differentiable in all three, with autocast off.

    A float32 or float64 weight multiplies states converted to its dtype. A half-precision weight is not converted as a whole:

    * on CUDA, `torch.mm(out_dtype=torch.float32)`. States of a higher precision than the weight's, as a store's are, are split into
      two addends of the weight's dtype, so they are not rounded either;
    * elsewhere, `RAISED_ROWS` rows of the weight at a time are raised to float32.

    Args:
        hidden: [T, d]. weight: [V, d]. bias: [V]. All floating point.

    Returns:
        [T, V].
    """
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.dtype not in HALF:
            return F.linear(hidden.to(weight.dtype), weight, bias)
        logits: Tensor = _HalfProduct.apply(hidden, weight)  # type: ignore[no-untyped-call]
        return logits if bias is None else logits + bias


# A torch operator for the same reason as in `selection`; it also keeps a compiler from unrolling the loop.
@torch.library.custom_op("switchkd::half_product", mutates_args=())
def _half_product(hidden: Tensor, weight: Tensor) -> Tensor:
    if weight.is_cuda:
        first, *rest = _addends(hidden, weight.dtype)
        logits = torch.mm(first, weight.T, out_dtype=torch.float32)
        for addend in rest:
            logits += torch.mm(addend, weight.T, out_dtype=torch.float32)
        return logits
    hidden = hidden.float()
    logits = hidden.new_empty(len(hidden), len(weight))
    for begin in range(0, len(weight), RAISED_ROWS):
        rows = weight[begin : begin + RAISED_ROWS]
        logits[:, begin : begin + len(rows)] = hidden @ rows.float().T
    return logits


@_half_product.register_fake
def _(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)


def _addends(hidden: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return addends of a half precision whose sum is `hidden`, to twice that precision; one if it has this dtype already."""
    upper = hidden.to(dtype)
    return [upper] if hidden.dtype == dtype else [upper, (hidden - upper).to(dtype)]


class _HalfProduct(torch.autograd.Function):
    """`_half_product` with gradients; their products run in the weight's dtype, as those of `F.linear` do."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        found: Tensor = _half_product(hidden, weight)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logits: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        hidden, weight = ctx.saved_tensors
        of_hidden, of_weight = ctx.needs_input_grad
        of_logits = of_logits.to(weight.dtype)
        return (
            (of_logits @ weight).to(hidden.dtype) if of_hidden else None,
            of_logits.T @ hidden.to(weight.dtype) if of_weight else None,
        )
