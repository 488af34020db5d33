"""A frozen teacher whose layers multiply in float8 (`--experimental fp8-teacher`), on the tensor cores of Ada, Hopper and later.

Only the linear layers of the language model are quantised. Embedding, norms, projector and LM head are not; the LM head computes
the teacher's logits from a store's hidden states. A weight W [out, in] and an input x [T, in] become

    W ≈ diag(s) W8,  x ≈ diag(r) x8,  s_i = max_j |W_ij| / 448,  r_t = max_j |x_tj| / 448,  W8, x8 in e4m3

and the product is x Wᵀ ≈ diag(r) (x8 W8ᵀ) diag(s), accumulated in float32. The gradient g [T, out] of the product goes back through
the same W8: g W ≈ diag(q) (g8 W8), where g diag(s) ≈ diag(q) g8, since the scales of W's rows lie on the dimension that is summed.
No gradient of a weight exists. The scaling by rows is that of `torch._scaled_mm`.

The error of such a teacher is measured by `benchmarks/teacher_weights.py` and reported in docs/training-engine.md.
"""

import importlib.util
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from switchkd.errors import ConfigError
from switchkd.pipelines.training.option_groups.step import FP8_TEACHER

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448
LEAST_SCALE = 1e-30  # of a row of zeros
MULTIPLE = 16  # of both widths of a product, which the tensor cores demand
FIRST_CAPABILITY = (8, 9)  # of a device with tensor cores for float8
NEAR = 1e-2  # relative difference between a device's product and its reference: that of an output in bfloat16, and more


def quantise_rows(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (x8 [T, n] e4m3, scales [T, 1] float32) with x · columns ≈ scales · x8, and the largest |x8| of each row 448.

    Each entry of x8 is within a sixteenth of its value (three bits of mantissa, rounded to the nearest), or within 2^-10 if it is
    smaller than the smallest normal number, 2^-6.

    Args:
        x: [T, n], floating point; computed in float32. columns: [n] float32, a factor on each column.
    """
    if x.is_cuda and not torch.compiler.is_compiling():
        from switchkd.pipelines.training.step_ways.fp8_kernel import quantise_rows_in_triton

        return quantise_rows_in_triton(x, columns)
    x = x.float() if columns is None else x.float() * columns
    scales = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(LEAST_SCALE)
    return (x / scales).to(FP8), scales


def check_fp8(device: torch.device) -> None:
    """Compare a product in float8 and its gradient with their references on a run's device, before any model is loaded.

    Raises:
        ConfigError: the device has no float8 products, or they are something else than their references.
    """
    if device.type != "cuda":
        raise ConfigError(f"--experimental {FP8_TEACHER} needs a CUDA device, this run computes on {device}")
    found = torch.cuda.get_device_capability(device)
    if found < FIRST_CAPABILITY:
        raise ConfigError(
            f"--experimental {FP8_TEACHER} needs a GPU of compute capability {'.'.join(map(str, FIRST_CAPABILITY))} or above "
            f"(Ada, Hopper, Blackwell); {torch.cuda.get_device_name(device)} has {'.'.join(map(str, found))}: leave it out"
        )
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(f"--experimental {FP8_TEACHER} needs triton, which torch's CUDA build brings; leave it out")
    try:
        error = product_error(device)
    except RuntimeError as refused:
        raise ConfigError(
            f"--experimental {FP8_TEACHER}: torch has no such product on {device}: {refused}"
        ) from refused
    if not error < NEAR:
        raise ConfigError(
            f"--experimental {FP8_TEACHER}: products on {device} differ from their reference by {error:.1%}, expected "
            f"{NEAR:.0%} at most; leave it out"
        )


def product_error(device: torch.device) -> float:
    """Return the largest relative difference, of a product and of its gradient, from products of dequantised matrices."""
    generator = torch.Generator().manual_seed(0)
    inputs, gradient = (torch.randn(67, width, generator=generator).bfloat16() for width in (256, 384))
    plain: Any = nn.Linear(256, 384, bias=True)
    nn.init.normal_(plain.weight, std=0.05, generator=generator)
    holder = nn.Module()
    holder.layers = nn.ModuleList([plain.requires_grad_(False).bfloat16()])
    bias = plain.bias.float()
    to_fp8(holder)
    weight = dequantised(plain)
    leaf = inputs.to(device).requires_grad_()
    result = holder.to(device).get_submodule("layers.0")(leaf)
    (found,) = torch.autograd.grad(result, leaf, gradient.to(device))
    (x, x_scales), (g, g_scales) = quantise_rows(inputs), quantise_rows(gradient, plain.scales.cpu().squeeze(0))
    # The gradient's rows carry the scales of the weight's already.
    wanted = (x.float() * x_scales) @ weight.T + bias, (g.float() * g_scales) @ plain.weight.cpu().float()
    pairs = zip((result.detach().cpu(), found.cpu()), wanted, strict=True)
    return max(float((mine.float() - other.detach()).norm() / other.norm().detach()) for mine, other in pairs)


def to_fp8(language: nn.Module, *, with_gradient: bool = True) -> None:
    """Quantise the layers of a frozen language model in place; on any device, whose products need not be in float8.

    A layer then holds `weight` [out, in] e4m3, `scales` [1, out] float32 and, with gradients, `transposed` [in, out], which is the
    same weight in the order that the gradient's product reads: together as many bytes as in bfloat16.

    Args:
        with_gradient: whether gradients pass through the layers, as on the switch pathway; a live teacher without it has none.

    Raises:
        ConfigError: a layer's widths are not multiples of 16.
    """
    last = _LastInput()
    for module in _linear_layers(language):
        rows, scales = quantise_rows(module.weight.detach())
        _hold(module, rows, rows.t().contiguous() if with_gradient else None)
        module.register_buffer("scales", scales.t().contiguous(), persistent=False)
        module.forward = partial(_forward, module, last)  # type: ignore[method-assign]


def count_as_fp8(language: nn.Module, *, with_gradient: bool = True) -> None:
    """Give the layers of a model without weights the dtypes and shapes that `to_fp8` would, for an estimate of memory."""
    for module in _linear_layers(language):
        rows = torch.zeros(1, dtype=FP8).expand(module.weight.shape)
        _hold(module, rows, rows.t() if with_gradient else None)


def dequantised(module: Any) -> Tensor:
    """Return the weight that a layer made by `to_fp8` stands for, [out, in] float32."""
    weight: Tensor = module.weight.detach().float() * module.scales.t()
    return weight


def _linear_layers(language: nn.Module) -> list[Any]:
    found = []
    for name, module in language.get_submodule("layers").named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
            raise ConfigError(
                f"--experimental {FP8_TEACHER} takes widths that are multiples of {MULTIPLE}; layer {name} of the teacher has "
                f"{module.in_features} inputs and {module.out_features} outputs: leave it out"
            )
        found.append(module)
    return found


def _hold(module: Any, weight: Tensor, transposed: Tensor | None) -> None:
    module.weight = nn.Parameter(weight, requires_grad=False)
    if transposed is not None:
        module.transposed = nn.Parameter(transposed, requires_grad=False)


class _LastInput:
    """Quantises inputs of layers; several that read the same tensor (q, k and v; gate and up) share the result."""

    def __init__(self) -> None:
        self._of: weakref.ref[Tensor] | None = None
        self._version = -1
        self._found: tuple[Tensor, Tensor] | None = None

    def quantise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[…, n] → see `quantise_rows`, with all leading dimensions as one."""
        flat = x.detach().reshape(-1, x.shape[-1])
        if torch.compiler.is_compiling():  # the compiler computes it once by itself
            return quantise_rows(flat)
        if self._found is None or self._of is None or self._of() is not x or self._version != x._version:
            self._found = quantise_rows(flat)
            self._of, self._version = weakref.ref(x), x._version
        return self._found


def _forward(module: Any, last: _LastInput, inputs: Tensor) -> Tensor:
    kind = inputs.device.type
    output = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
    rows, scales = last.quantise(inputs)
    found: Tensor = _Product.apply(inputs, rows, scales, module, output)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    """x Wᵀ + b from a quantised x and W. Nothing is kept for the backward pass but the layer itself."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, rows: Tensor, scales: Tensor, module: Any, output: torch.dtype) -> Tensor:
        ctx.module, ctx.dtype = module, inputs.dtype
        found = torch._scaled_mm(rows, module.weight.t(), scale_a=scales, scale_b=module.scales, out_dtype=output)
        if module.bias is not None:
            found += module.bias
        return found.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        module = ctx.module
        rows, scales = quantise_rows(gradient.reshape(-1, gradient.shape[-1]), module.scales.squeeze(0))
        found = torch._scaled_mm(
            rows,
            module.transposed.t(),
            scale_a=scales,
            scale_b=torch.ones_like(module.scales[:, :1]).expand(1, module.in_features).contiguous(),
            out_dtype=gradient.dtype,
        )
        return found.view(*gradient.shape[:-1], -1).to(ctx.dtype), None, None, None, None
