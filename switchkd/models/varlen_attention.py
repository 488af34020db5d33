"""Block-diagonal attention of packed rows in one call of a variable-length kernel, `torch.nn.attention.varlen`.

The kernel reads the first token of each sample from a list of offsets. There is no loop over samples, no mask, and no wait for the
device: the number of samples and their largest length are bounded by the shape of the batch (`packing.positions_in_rows`).
The kernel exists on CUDA and for half precisions; elsewhere, and with attention dropout, `block_attention.attend_in_blocks`
computes the same, one sample at a time.

No GPU has confirmed this module yet: `--experimental varlen-attention` selects it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from switchkd.errors import ConfigError
from switchkd.models.block_attention import VARLEN, attend_in_blocks

HALF = (torch.bfloat16, torch.float16)
CAUSAL = (-1, 0)  # the kernel's window: all tokens to the left, none to the right
# Relative error of the kernel's output, and of its gradients, that bfloat16 explains.
TOLERANCE = 2e-2


class Blocks(NamedTuple):
    """The samples of packed rows, one after another, row by row."""

    offsets: Tensor  # [n + 1] int32: the first token of each sample; then the number of tokens, as often as samples are missing
    longest: int  # no sample has more tokens


def blocks_of(position_ids: Tensor, rows: int) -> Blocks:
    """Return the samples of rows; computed once per batch, since all layers receive the same tensor.

    Args:
        position_ids: [R, N] or [1, N] int64, 0 at the first token of each sample; every row starts with one. If it has the
            attribute `block_bounds`, (largest number of samples, largest length), nothing is read from the device.
        rows: R.
    """
    known: Blocks | None = getattr(position_ids, "blocks", None)
    if known is not None:
        return known
    starts = (position_ids == 0).expand(rows, -1).flatten()
    tokens = len(starts)
    bounds: tuple[int, int] | None = getattr(position_ids, "block_bounds", None)
    most, longest = bounds or (int(starts.sum()), int(position_ids.max()) + 1)
    # Tokens that start no sample are written to one place behind the end, which is cut off.
    number = torch.where(starts, starts.cumsum(0) - 1, most + 1)
    offsets = torch.full((most + 2,), tokens, dtype=torch.int32, device=starts.device)
    offsets.scatter_(0, number, torch.arange(tokens, dtype=torch.int32, device=starts.device))
    known = Blocks(offsets[: most + 1], min(longest, position_ids.shape[1]))
    position_ids.blocks = known  # type: ignore[attr-defined]
    return known


def kernel_for(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """Return `torch.nn.attention.varlen.varlen_attn` where it computes in this dtype; None where it does not."""
    if device.type != "cuda" or dtype not in HALF:
        return None
    from torch.nn.attention.varlen import varlen_attn  # torch 2.10 or newer, see `check_kernel`

    return cast(Callable[..., Tensor], varlen_attn)  # without `return_aux`, it returns one tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]  # as in `attend_in_blocks`; the kernel has nothing to fuse
def attend_varlen(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute causal attention within each sample; an attention function in the interface of transformers.

    Arguments and result are those of `block_attention.attend_in_blocks`. Under autocast, the result has autocast's dtype, as that
    of torch's own attention has.
    """
    assert attention_mask is None
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    kernel, position_ids = kernel_for(query.device, dtype), options.get("position_ids")
    if kernel is None or options.get("dropout") or position_ids is None:
        looped: tuple[Tensor, None] = attend_in_blocks(module, query, key, value, attention_mask, **options)
        return looped
    rows, heads, length, _ = query.shape
    blocks = blocks_of(position_ids, rows)
    flat = [each.transpose(1, 2).flatten(0, 1).to(dtype) for each in (query, key, value)]  # [R·N, heads, d]
    found = kernel(
        *flat,
        blocks.offsets,
        blocks.offsets,
        blocks.longest,
        blocks.longest,
        scale=options.get("scaling"),
        window_size=CAUSAL,
        enable_gqa=key.shape[1] != heads,
    )
    return found.unflatten(0, (rows, length)), None


AttentionInterface.register(VARLEN, attend_varlen)


def check_kernel(device: torch.device) -> None:
    """Compare the kernel with attention of one sample at a time, values and gradients, on random numbers in bfloat16.

    Samples of 1 to 70 tokens in two rows, four heads that share two keys; a few milliseconds.

    Raises:
        ConfigError: the installed torch has no such kernel, or it computes something else on this device.
    """
    try:
        if kernel_for(device, torch.bfloat16) is None:
            raise ConfigError(f"--experimental varlen-attention needs a CUDA device, this run computes on {device}")
    except ImportError as missing:
        raise ConfigError(
            f"--experimental varlen-attention needs torch 2.10 or newer, found {torch.__version__}; leave it out"
        ) from missing
    module: Any = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    generator = torch.Generator().manual_seed(0)
    samples = ((1, 70, 25), (64, 32))
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in samples]).to(device)
    shapes = [(2, heads, 96, 64) for heads in (4, 2, 2)]
    leaves = [torch.randn(s, generator=generator).to(device, torch.bfloat16).requires_grad_() for s in shapes]
    results = []
    ways: tuple[Callable[..., tuple[Tensor, None]], ...] = (attend_varlen, attend_in_blocks)
    for attend in ways:
        found, _ = attend(module, *leaves, None, position_ids=position_ids)
        results.append([found.detach(), *torch.autograd.grad(found.float().square().sum(), leaves)])
    for mine, expected in zip(*results, strict=True):
        error = float((mine.float() - expected.float()).norm() / expected.float().norm())
        if not error < TOLERANCE:
            raise ConfigError(
                f"--experimental varlen-attention: torch's kernel is off by {error:.1%} on {device}; leave it out"
            )
