"""Packing of top-k logits (ids as frequency ranks, logits as whole steps below the row's maximum) and of hidden states.

A logit is stored as q = round((z_max - z) / step), so its error is at most step / 2. Entries are ordered by q, and entries of
equal q by rank: their order inside half a step is noise, and sorted ranks compress better. q is kept as differences, which are
small and never negative.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.stores.layout import rank_dtype

LARGEST_Q = np.iinfo(np.uint16).max


def encode_topk(
    ids: NDArray[Any], logits: NDArray[Any], z_max: NDArray[Any], rank_of_id: NDArray[Any], step: float
) -> tuple[NDArray[Any], NDArray[np.uint16]]:
    """Pack the top-k entries of P positions.

    Args:
        ids: [P, K] integer, distinct in a row. logits: [P, K] float, finite, any order. z_max: [P] float, the rows' maxima.
        rank_of_id: [N], each id's place by frequency. step: logits per quantisation step.

    Returns:
        (rank [P, K] uint16 or uint32, step differences [P, K] uint16).

    Raises:
        ValueError: a logit that is not finite, or further than 65,535 steps below the maximum.
    """
    if not (np.isfinite(logits).all() and np.isfinite(z_max).all()):
        raise ValueError("only finite logits can be stored")
    q = np.rint((z_max[:, None].astype(np.float64) - logits) / step)
    if q.size and (q.min() < 0 or q.max() > LARGEST_Q):
        raise ValueError(
            f"logits lie {q.min() * step:g} to {q.max() * step:g} below the maximum, outside 0 … {LARGEST_Q * step:g}"
        )
    q, rank = q.astype(np.int64), rank_of_id[ids].astype(np.int64)
    order = np.argsort(q * len(rank_of_id) + rank, axis=-1)
    q, rank = np.take_along_axis(q, order, -1), np.take_along_axis(rank, order, -1)
    return rank.astype(rank_dtype(len(rank_of_id))), np.diff(q, axis=-1, prepend=0).astype(np.uint16)


def decode_topk(
    rank: NDArray[Any], steps: NDArray[Any], z_max: NDArray[Any], id_of_rank: NDArray[Any], step: float
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Unpack what `encode_topk` packed: (ids [P, K] int32, logits [P, K] float32), in descending order of logits."""
    below = np.cumsum(steps, axis=-1, dtype=np.uint32).astype(np.float32) * np.float32(step)
    return id_of_rank[rank].astype(np.int32), z_max[:, None].astype(np.float32) - below


BLOCK = 32  # int8 states share a scale per this many entries


def encode_hidden(states: NDArray[np.float32], dtype: str) -> tuple[NDArray[Any], NDArray[np.float16] | None]:
    """Pack final hidden states.

    Args:
        states: [P, d], finite. dtype: "float16", "bfloat16" (kept as its upper 16 bits, uint16) or "int8".

    Returns:
        (state [P, d], scale): scale is [P, ceil(d / 32)] float16 for int8, where state · scale gives the block back; else None.

    Raises:
        ValueError: not finite, or beyond what the dtype holds.
    """
    if not np.isfinite(states).all():
        raise ValueError("only finite hidden states can be stored")
    if dtype == "float16":
        if states.size and np.abs(states).max() > np.finfo(np.float16).max:
            raise ValueError(f"a hidden state of {np.abs(states).max():g} does not fit float16; use bfloat16")
        return states.astype(np.float16), None
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(states, np.float32).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to nearest, ties to even
        return (rounded >> np.uint32(16)).astype(np.uint16), None
    blocks = _blocks(states)
    # Rounded up to float16 first, so that no entry exceeds 127 steps of the scale that is stored.
    largest = np.abs(blocks).max(-1, initial=0) / 127
    scale = largest.astype(np.float16)
    scale = np.where(scale.astype(np.float32) < largest, np.nextafter(scale, np.float16(np.inf)), scale)
    if not np.isfinite(scale).all():
        raise ValueError("a hidden state does not fit an int8 block with a float16 scale; use bfloat16")
    divisor = np.where(scale > 0, scale, 1).astype(np.float32)[..., None]
    quantised = np.rint(blocks / divisor).astype(np.int8).reshape(len(states), blocks.shape[1] * BLOCK)
    return quantised[:, : states.shape[1]], scale


def decode_hidden(state: NDArray[Any], scale: NDArray[np.float16] | None, dtype: str) -> NDArray[np.float32]:
    """Unpack what `encode_hidden` packed, [P, d] float32."""
    if dtype == "float16":
        return state.astype(np.float32)
    if dtype == "bfloat16":
        return (state.astype(np.uint32) << np.uint32(16)).view(np.float32)
    assert scale is not None
    blocks = _blocks(state.astype(np.float32)) * scale.astype(np.float32)[..., None]
    return np.ascontiguousarray(blocks.reshape(len(state), blocks.shape[1] * BLOCK)[:, : state.shape[1]])


def _blocks(states: NDArray[Any]) -> NDArray[Any]:
    """Cut [P, d] into [P, ceil(d / 32), 32], the last block filled with zeros."""
    blocks = -(-states.shape[1] // BLOCK)
    missing = blocks * BLOCK - states.shape[1]
    return np.pad(states, ((0, 0), (0, missing))).reshape(len(states), blocks, BLOCK)


def ranks_by_frequency(ids: NDArray[Any], vocab_rows: int) -> NDArray[np.uint32]:
    """Return id_of_rank [N] uint32: the ids by how often they occur in `ids`, ties by id."""
    counts = np.bincount(ids.ravel(), minlength=vocab_rows)
    return np.lexsort((np.arange(vocab_rows), -counts)).astype(np.uint32)


def invert(id_of_rank: NDArray[Any]) -> NDArray[np.uint32]:
    """Return rank_of_id [N] from id_of_rank [N]."""
    rank_of_id = np.empty(len(id_of_rank), np.uint32)
    rank_of_id[id_of_rank] = np.arange(len(id_of_rank), dtype=np.uint32)
    return rank_of_id
