"""Block-diagonal attention for packed rows: selects the attention of a language model and checks that it separates samples.

A mask over all pairs of a row costs the square of its length, and most of its entries are masked. If every layer is plain causal
attention, attention is computed for each sample of a row separately, at the cost of unpacked samples. Other kinds (sliding windows)
use transformers' masks. Both identify samples by their position ids, which restart at 0 with each sample.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from switchkd.errors import ConfigError

# Of the attention functions; transformers builds no mask for a name without a mask function.
NAME, VARLEN = "switchkd_blocks", "switchkd_varlen"
PLAIN = "sdpa"  # the only one that block attention takes the place of
ATTENTION = {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
}  # kinds of layers that can keep samples separate
PROBE = (5, 8)  # lengths of the samples that a language model is tested with, tokens
HALF_TOLERANCE, TOLERANCE = (
    3e-2,
    1e-4,
)  # relative change of a state; rounding stays below, mixing of samples does not


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled layer would be compiled again for other lengths
def attend_in_blocks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute causal attention within each sample; an attention function in the interface of transformers.

    Args:
        query, key, value: [R, heads, N, d]. attention_mask: None.
        options: position_ids [R, N] or [1, N], and the options of transformers' own attention. Without position ids a row is one
            block; `enable_packing` detects this.

    Returns:
        [R, N, heads, d], and no weights.
    """
    assert attention_mask is None
    position_ids = options.get("position_ids")
    lengths = [[query.shape[2]]] if position_ids is None else _block_lengths(position_ids)
    rows = []
    for row in range(len(query)):
        blocks = [whole[row : row + 1].split(lengths[row % len(lengths)], dim=2) for whole in (query, key, value)]
        alone = [sdpa_attention_forward(module, *block, None, **options)[0] for block in zip(*blocks, strict=True)]
        rows.append(torch.cat(alone, dim=1))
    return torch.cat(rows), None


def _block_lengths(position_ids: Tensor) -> list[list[int]]:
    """Return the length of each block of each row; computed once per batch, since all layers receive the same tensor."""
    known: list[list[int]] | None = getattr(position_ids, "block_lengths", None)
    if known is None:
        ends = position_ids.shape[1]
        starts = [[place for place, position in enumerate(row) if position == 0] for row in position_ids.tolist()]
        known = [[end - start for start, end in zip(row, [*row[1:], ends], strict=True)] for row in starts]
        position_ids.block_lengths = known  # type: ignore[attr-defined]
    return known


AttentionInterface.register(NAME, attend_in_blocks)


def uses_block_attention(language: Any) -> bool:
    """Return whether a language model uses block attention, see `enable_packing`."""
    return language.config._attn_implementation in (NAME, VARLEN)


def attention_ways(config: Any, varlen: bool, plain: bool = True) -> tuple[str, ...]:
    """Return the attention functions that a language model is tried with for packed rows, fastest first.

    Args:
        config: of the language model. varlen: see `enable_packing`. plain: False for a family that does not attend causally.
    """
    before = str(config._attn_implementation)
    return (VARLEN if varlen else NAME, before) if plain and is_plain(config) else (before,)


@contextmanager
def without_block_attention(language: Any) -> Iterator[None]:
    """Let a language model attend as its checkpoint does inside the block: generation pads on the left and keeps keys."""
    if not uses_block_attention(language):
        yield
        return
    before = language.config._attn_implementation
    language.set_attn_implementation(PLAIN)
    try:
        yield
    finally:
        language.set_attn_implementation(before)


def is_plain(config: Any) -> bool:
    """Return whether every layer is full causal attention, computed by torch's fused attention."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) == {"full_attention"} and config._attn_implementation == PLAIN
    windows = ("sliding_window", "attention_chunk_size")
    return config._attn_implementation == PLAIN and all(getattr(config, name, None) is None for name in windows)


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the relative change of a state that rounding explains in a model of this dtype."""
    return HALF_TOLERANCE if dtype.itemsize == 2 else TOLERANCE


def check_layers(config: Any, name: str) -> None:
    """Refuse a language model whose config lists layers that mix the samples of a row, before any weights are loaded.

    Not every config lists its layers; `enable_packing` tests the model itself.

    Args:
        config: of the language model. name: of the model, for the error.

    Raises:
        ConfigError: the model has convolutions, linear attention or state-space layers.
    """
    if mixing := sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION):
        raise ConfigError(
            f"--packing: the language model of {name} ({config.model_type}) has layers of kind {', '.join(mixing)}, which mix "
            "samples of one row; leave --packing out"
        )


def enable_packing(language: Any, name: str, varlen: bool = False) -> None:
    """Prepare a language model for packed rows, and test that it keeps the samples of a row separate.

    Two short samples of random embeddings are run alone and in packed rows in either order; the cost is that of a few dozen tokens.

    Args:
        language: any of transformers' decoders, with weights; its attention is changed, see `attend_in_blocks`.
        name: of the model, for the error.
        varlen: attention in blocks runs in one kernel, see `varlen_attention`.

    Raises:
        ConfigError: the model mixes the samples of a row.
    """
    training = language.training
    language.eval()
    weight = language.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(1, n, weight.shape[1], generator=generator).to(weight) * weight.std() for n in PROBE]
    with torch.no_grad():
        alone = [language(inputs_embeds=sample, use_cache=False).last_hidden_state for sample in samples]
        tolerance = tolerance_of(weight.dtype)
        for way in attention_ways(language.config, varlen):
            language.set_attn_implementation(way)
            change = _influence(language, samples, alone)
            if change <= tolerance:
                break
        else:
            raise ConfigError(
                f"--packing: the language model of {name} ({language.config.model_type}) does not keep samples of one row apart: "
                f"their states change by {change:.1%}. All layers must heed position ids; leave --packing out"
            )
    language.train(training)


def _influence(language: nn.Module, samples: list[Tensor], alone: list[Tensor]) -> float:
    """Return how much samples of a row influence each other: the largest change of a token's state, relative to its norm."""
    orders = ((0, 1), (1, 0))
    rows, expected = (
        torch.cat([torch.cat([states[sample] for sample in order], 1) for order in orders])
        for states in (samples, alone)
    )
    position_ids = torch.stack([torch.cat([torch.arange(PROBE[sample]) for sample in order]) for order in orders])
    found = language(inputs_embeds=rows, position_ids=position_ids.to(rows.device), use_cache=False).last_hidden_state
    change = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return float(change.nan_to_num(torch.inf).max())
