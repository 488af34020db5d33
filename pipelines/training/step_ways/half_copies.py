"""Bfloat16 copies of float32 weights, which take the place of autocast's casts.

Autocast casts every weight of a linear layer in every forward pass, and activations between layers that compute in different
dtypes. Here the model computes in bfloat16 throughout, as under FSDP's mixed precision
(`torch.distributed.fsdp.MixedPrecisionPolicy`): every float32 weight has a copy, which is written again once per step of the
optimizer. Master weights, their gradients and the optimizer's state stay float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _AsCopy(torch.autograd.Function):
    """Returns a weight's copy; the gradient goes on to the weight, in the weight's dtype."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.to(ctx.dtype), None


class HalfCopies:
    """The bfloat16 copies of a model's float32 weights.

    Args:
        model: on its device; its parameters remain float32. A parameter that several modules share, as a tied LM head does, has one
            copy, and the gradients of its uses are added in float32.
        optimizer: whose steps change the weights.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        places = [
            (module, name, weight)
            for module in model.modules()
            for name, weight in module.named_parameters(recurse=False)
            if weight.dtype == torch.float32
        ]
        copies = {id(weight): weight.detach().bfloat16() for *_, weight in places}
        self._places = [(module, name, weight, copies[id(weight)]) for module, name, weight in places]
        self._versions = {id(weight): weight._version for *_, weight in places}
        self._stepped = False
        self.refreshed = 0  # times that copies were written again
        optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, *_: Any) -> None:
        self._stepped = True

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model's modules read the copies inside the block, which encloses a forward pass and its backward pass.

        Copies of weights that changed since the last block are written first: those that train after a step of the optimizer, and
        those that were loaded, whose changes torch counts (it counts none of those by a fused AdamW). A frozen weight has no
        gradient.
        """
        self._refresh()
        for module, name, weight, copy in self._places:
            read: Any = _AsCopy.apply(weight, copy) if weight.requires_grad else copy  # type: ignore[no-untyped-call]
            module._parameters[name] = read
        try:
            yield
        finally:
            for module, name, weight, _ in self._places:
                module._parameters[name] = weight

    @torch.no_grad()
    def _refresh(self) -> None:
        changed = {
            id(weight): (weight, copy)
            for *_, weight, copy in self._places
            if weight._version != self._versions[id(weight)] or (self._stepped and weight.requires_grad)
        }
        if changed:
            torch._foreach_copy_([copy for _, copy in changed.values()], [weight for weight, _ in changed.values()])
            self._versions |= {key: weight._version for key, (weight, _) in changed.items()}
            self.refreshed += 1
        self._stepped = False
