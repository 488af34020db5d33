"""Packing of top-k logits (ids as gaps between ranks, logits as quantisation levels) and of hidden states.

Ids are replaced by their rank in a table of frequencies and each position is sorted by rank: the rank gaps between neighbours are
small and alike, and no order has to be stored beside them. A logit z becomes a level, counted from its row's deepest one: a
quantised depth d = logsumexp - z, with small steps where the probability p = e^{-d} is: an error e costs p·e²/2 of KL.

    step(d)  = min_step · e^{d/2}, at most max_step
    level(d) = (2/min_step)(1 - e^{-d/2}) up to d* = 2 ln(max_step/min_step), from there on level(d*) + (d - d*)/max_step

The error of a logit is at most max_step / 2. min_step = max_step gives even steps.
"""

import sys
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.stores.layout import STAT_COLUMNS, rank_dtype

LARGEST_LEVEL = np.iinfo(np.uint16).max
STAT_STEPS = 1024  # statistics, all but the knee, are rounded to whole 1/1024


def encode_topk(
    ids: NDArray[Any],
    logits: NDArray[Any],
    logsumexp: NDArray[Any],
    rank_of_id: NDArray[Any],
    min_step: float,
    max_step: float,
) -> tuple[NDArray[Any], NDArray[np.uint16], NDArray[np.uint16]]:
    """Pack the top-k entries of P positions.

    Args:
        ids: [P, K] integer, distinct in a row. logits: [P, K] float, finite, any order. logsumexp: [P] float, exactly as it will
            be given to `decode_topk`. rank_of_id: [N], each id's place by frequency.
        min_step, max_step: smallest and largest quantisation step, 0 < min_step ≤ max_step, logits.

    Returns:
        (rank_gap [P, K] uint16 or uint32, level_offset [P, K] uint16, deepest_level [P] uint16): the first rank of a row and
        the ranks skipped between neighbours; how far each level lies above the row's deepest; that deepest level.

    Raises:
        ValueError: a logit that is not finite, above its row's logsumexp, or below the 65,536 quantisation levels.
    """
    if not (np.isfinite(logits).all() and np.isfinite(logsumexp).all()):
        raise ValueError("only finite logits can be stored")
    depth = logsumexp[:, None].astype(np.float64) - logits
    # A logsumexp that was rounded may lie a little below a largest logit that holds all the mass.
    if depth.size and depth.min() < -max(max_step, 1 / STAT_STEPS):
        raise ValueError(f"a logit lies {-depth.min():g} above its row's logsumexp")
    level = _level_of_depth(np.maximum(depth, 0, out=depth), min_step, max_step)
    if level.size and level.max() > LARGEST_LEVEL:
        raise ValueError(f"logits lie {depth.max():g} below the row's logsumexp, more than {LARGEST_LEVEL} levels")
    bits = max(int(level.max(initial=0)), 1).bit_length()
    key: Any = _key_type(len(rank_of_id), bits)
    keys: NDArray[Any] = (rank_of_id.astype(key) << key(bits))[ids] | level.astype(
        key
    )  # one sort carries ranks and levels
    keys.sort(axis=-1)
    rank = keys >> key(bits)
    levels = (keys & key((1 << bits) - 1)).astype(np.uint16)
    rank_gap = rank.astype(rank_dtype(len(rank_of_id)))
    rank_gap[:, 1:] = rank[:, 1:] - rank[:, :-1] - key(1)
    deepest_level = levels.max(axis=-1, initial=0)
    return rank_gap, deepest_level[:, None] - levels, deepest_level


def decode_topk(
    rank_gap: NDArray[Any],
    level_offset: NDArray[np.uint16],
    deepest_level: NDArray[np.uint16],
    logsumexp: NDArray[Any],
    id_of_rank: NDArray[Any],
    min_step: float,
    max_step: float,
    out: tuple[NDArray[np.int32], NDArray[np.float32]] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Unpack what `encode_topk` packed: (ids [P, K] int32, logits [P, K] float32), descending, equal levels by rank.

    Quickest if id_of_rank is int32 already. `out` is filled and returned where it is given.

    Raises:
        ValueError: a rank that id_of_rank does not have.
    """
    ids, logits = out or (np.empty(rank_gap.shape, np.int32), np.empty(rank_gap.shape, np.float32))
    id_of_rank, depths = np.asarray(id_of_rank, np.int32), _depths(min_step, max_step)
    bits = max(len(id_of_rank) - 1, 1).bit_length()
    key: Any = _key_type(int(deepest_level.max(initial=0)) + 1, bits)
    size = max(_AT_ONCE // max(rank_gap.shape[1], 1), 1)
    for rows in (slice(begin, begin + size) for begin in range(0, len(rank_gap), size)):
        keys: NDArray[Any] = _ranks(rank_gap[rows]).astype(key)
        if keys.size and keys[:, -1].max() >= len(id_of_rank):
            raise ValueError(f"ranks reach {keys[:, -1].max()}, the vocabulary has {len(id_of_rank)} rows")
        keys |= (deepest_level[rows, None] - level_offset[rows]).astype(key) << key(bits)
        keys.sort(axis=-1)
        # `take` by machine words, bounds known, is several times quicker than an index of another type.
        at = (keys >> key(bits)).astype(np.intp)
        depths.take(at, mode="clip", out=logits[rows])
        np.subtract(logsumexp[rows, None], logits[rows], out=logits[rows], dtype=np.float32, casting="same_kind")
        np.bitwise_and(keys, key((1 << bits) - 1), out=at, casting="unsafe")
        id_of_rank.take(at, mode="clip", out=ids[rows])
    return ids, logits


_AT_ONCE = 1 << 16  # entries: what is made on the way stays in a core's own cache, which takes two thirds of the time


def _ranks(rank_gap: NDArray[Any]) -> NDArray[Any]:
    """Return the ranks [P, K] that rank gaps lead to, in their dtype: sums along each row, 1 added at each step."""
    if rank_gap.dtype != np.uint16 or rank_gap.shape[1] % _LANES or not rank_gap.size or sys.byteorder != "little":
        rank = rank_gap.copy()
        rank[:, 1:] += rank_gap.dtype.type(1)
        return np.cumsum(rank, axis=-1, dtype=rank_gap.dtype, out=rank)
    # Four at a time takes two thirds of the time. A word times 0x0001000100010001 holds the sums of its four numbers up to each
    # of them; none reaches beyond its 16 bits, since a rank does not. What comes before a word is added to all four.
    words = np.ascontiguousarray(rank_gap).view(np.uint64) + _EACH_LANE
    words[:, 0] -= np.uint64(1)  # the first of a row is no gap
    words *= _EACH_LANE
    before = np.cumsum(words[:, :-1] >> np.uint64(48), axis=-1, dtype=np.uint64)
    before *= _EACH_LANE
    words[:, 1:] += before
    return words.view(np.uint16)


_LANES = 4
_EACH_LANE = np.uint64(0x0001000100010001)


@lru_cache(maxsize=4)
def _depths(min_step: float, max_step: float) -> NDArray[np.float32]:
    """Return the depth of every level there is, [65,536]."""
    return _depth_of_level(np.arange(LARGEST_LEVEL + 1), min_step, max_step).astype(np.float32)


def round_stats(stats: NDArray[Any]) -> NDArray[np.float32]:
    """Round statistics [P, 5] to what a store keeps: whole 1/1024, the knee as it is."""
    rounded = np.rint(stats.astype(np.float64) * STAT_STEPS) / STAT_STEPS
    knee = STAT_COLUMNS.index("knee")
    rounded[:, knee] = stats[:, knee]
    return rounded.astype(np.float32)


def _key_type(values: int, bits: int) -> Any:
    """Return the smaller type that holds `values` numbers above `bits` more bits; 32 bits sort faster."""
    return np.uint32 if values << bits <= 1 << 32 else np.uint64


def _level_of_depth(depth: NDArray[np.float64], min_step: float, max_step: float) -> NDArray[np.int64]:
    turn = 2 * np.log(max_step / min_step)
    curved = np.expm1(np.minimum(depth, turn) * -0.5) * (-2 / min_step)
    straight = np.maximum(depth - turn, 0) / max_step
    level: NDArray[np.int64] = np.rint(np.minimum(curved + straight, LARGEST_LEVEL + 1)).astype(np.int64)
    return level


def _depth_of_level(level: NDArray[Any], min_step: float, max_step: float) -> NDArray[np.float64]:
    turn, level_at_turn = 2 * np.log(max_step / min_step), 2 / min_step - 2 / max_step
    curved = -2 * np.log1p(-np.minimum(level, level_at_turn) * (min_step / 2))
    depth: NDArray[np.float64] = np.where(level <= level_at_turn, curved, turn + (level - level_at_turn) * max_step)
    return depth


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


def decode_hidden(
    state: NDArray[Any], scale: NDArray[np.float16] | None, dtype: str, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Unpack what `encode_hidden` packed, [P, d] float32. `out` is filled and returned where it is given."""
    states = np.empty(state.shape, np.float32) if out is None else out
    if dtype == "float16":
        _widen(state, states)
    elif dtype == "bfloat16":
        np.left_shift(state, np.uint32(16), out=states.view(np.uint32), dtype=np.uint32)
    else:
        assert scale is not None
        states[...] = state
        states *= np.repeat(scale.astype(np.float32), BLOCK, axis=1)[:, : state.shape[1]]
    return states


def _widen(halves: NDArray[np.float16], out: NDArray[np.float32]) -> None:
    """Write float16 as float32 into `out`, in half of numpy's time, bit for bit the same.

    The bits of a float16, sign apart, moved up by 13 are those of a float32 that is 2^112 times too small, if it is finite.
    """
    bits = out.view(np.int32)
    np.left_shift(halves.view(np.int16), 13, out=bits, dtype=np.int32)  # fills the bits above with copies of the sign
    bits &= ~0x70000000
    out *= np.float32(2.0**112)
    if (
        out.size and max(out.max(), -out.min()) > np.finfo(np.float16).max
    ):  # it was not finite; no store has that unless it is damaged
        out[...] = halves


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
