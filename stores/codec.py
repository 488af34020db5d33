"""Encodes top-k logits (ids as gaps between ranks, logits as quantisation levels) and hidden states (as steps from a mean).

Ids are replaced by their rank in a frequency table, and the entries of each position are sorted by rank: the gaps between
neighbouring ranks are small and similar. A logit z is stored as a quantisation level, counted from the deepest level of its row;
levels give the order of the entries, except among equal levels (tie_order.py). The level quantises the depth d = logsumexp - z,
with smaller steps where the probability p = e^{-d} is larger, since an error e adds p·e²/2 to the KL.

    step(d)  = min_step · e^{d/2}, at most max_step
    level(d) = (2/min_step)(1 - e^{-d/2}) up to d* = 2 ln(max_step/min_step), from there on level(d*) + (d - d*)/max_step

The error of a logit is at most max_step / 2. min_step = max_step gives uniform steps.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchkd.stores.layout import HIDDEN_DTYPES, INT8_BLOCK, STAT_COLUMNS, rank_dtype
from switchkd.stores.tie_order import apply_order, encode_order

LARGEST_LEVEL = np.iinfo(np.uint16).max
STAT_STEPS = 1024  # statistics other than the knee are rounded to multiples of 1/1024


class TopKCodes(NamedTuple):
    """The encoded top-k entries of P positions."""

    rank_gap: NDArray[
        Any
    ]  # [P, K] uint16 or uint32: the first rank of a row, and the number of ranks skipped between neighbours
    level_offset: NDArray[np.uint16]  # [P, K], the distance of each level from the row's deepest level
    deepest_level: NDArray[np.uint16]  # [P]
    order: NDArray[np.uint16] | None  # [P], of the entries of equal level, see tie_order.py; None in version 1


def encode_topk(
    ids: NDArray[Any],
    logits: NDArray[Any],
    logsumexp: NDArray[Any],
    rank_of_id: NDArray[Any],
    min_step: float,
    max_step: float,
) -> TopKCodes:
    """Encode the top-k entries of P positions.

    Args:
        ids: [P, K] integer, distinct in a row. logits: [P, K] float, finite, descending. logsumexp: [P] float, exactly the values
            that `decode_topk` will receive. rank_of_id: [N], each id's rank by frequency.
        min_step, max_step: smallest and largest quantisation step, 0 < min_step ≤ max_step, logits.

    Raises:
        ValueError: logits that do not descend; a logit that is not finite, above its row's logsumexp, or below the 65,536
            quantisation levels.
    """
    if not (np.isfinite(logits).all() and np.isfinite(logsumexp).all()):
        raise ValueError("only finite logits can be stored")
    if (logits[:, :-1] < logits[:, 1:]).any():
        raise ValueError("the logits of a position must descend")
    depth = logsumexp[:, None].astype(np.float64) - logits
    # After rounding, logsumexp may be slightly below a largest logit that has almost all the mass.
    if depth.size and depth.min() < -max(max_step, 1 / STAT_STEPS):
        raise ValueError(f"a logit lies {-depth.min():g} above its row's logsumexp")
    level = _level_of_depth(np.maximum(depth, 0, out=depth), min_step, max_step)
    if level.size and level.max() > LARGEST_LEVEL:
        raise ValueError(f"logits lie {depth.max():g} below the row's logsumexp, more than {LARGEST_LEVEL} levels")
    np.maximum.accumulate(level, axis=-1, out=level)  # they ascend already, but for errors in the last place
    bits = max(int(level.max(initial=0)), 1).bit_length()
    key: Any = _key_type(len(rank_of_id), bits)
    # Ranks and levels share one key, so one sort orders both.
    keys: NDArray[Any] = (rank_of_id.astype(key) << key(bits))[ids] | level.astype(key)
    order = encode_order(level, keys)
    keys.sort(axis=-1)
    rank = keys >> key(bits)
    levels = (keys & key((1 << bits) - 1)).astype(np.uint16)
    rank_gap = rank.astype(rank_dtype(len(rank_of_id)))
    rank_gap[:, 1:] = rank[:, 1:] - rank[:, :-1] - key(1)
    deepest_level = levels.max(axis=-1, initial=0)
    return TopKCodes(rank_gap, deepest_level[:, None] - levels, deepest_level, order)


def decode_topk(
    codes: TopKCodes,
    logsumexp: NDArray[Any],
    id_of_rank: NDArray[Any],
    min_step: float,
    max_step: float,
    out: tuple[NDArray[np.int32], NDArray[np.float32]] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Decode the output of `encode_topk`: (ids [P, K] int32, logits [P, K] float32), descending.

    Entries of equal level are in the encoded order as far as the code covers them, and then by rank.

    Fastest if id_of_rank is already int32. If `out` is given, it is filled and returned.

    Raises:
        ValueError: a rank that id_of_rank does not have.
    """
    rank_gap, level_offset, deepest_level, order = codes
    ids, logits = out or (np.empty(rank_gap.shape, np.int32), np.empty(rank_gap.shape, np.float32))
    id_of_rank, depths = np.asarray(id_of_rank, np.int32), _depths(min_step, max_step)
    bits = max(len(id_of_rank) - 1, 1).bit_length()
    key: Any = _key_type(int(deepest_level.max(initial=0)) + 1, bits)
    for rows in _row_blocks(rank_gap):
        keys: NDArray[Any] = _ranks(rank_gap[rows]).astype(key)
        if keys.size and keys[:, -1].max() >= len(id_of_rank):
            raise ValueError(f"ranks reach {keys[:, -1].max()}, the vocabulary has {len(id_of_rank)} rows")
        keys |= (deepest_level[rows, None] - level_offset[rows]).astype(key) << key(bits)
        keys.sort(axis=-1)
        # `take` with machine-word indices and no bounds check is several times faster than indices of another type.
        at = (keys >> key(bits)).astype(np.intp)
        depths.take(at, mode="clip", out=logits[rows])
        np.subtract(logsumexp[rows, None], logits[rows], out=logits[rows], dtype=np.float32, casting="same_kind")
        if order is not None:
            apply_order(order[rows], at, keys)
        np.bitwise_and(keys, key((1 << bits) - 1), out=at, casting="unsafe")
        id_of_rank.take(at, mode="clip", out=ids[rows])
    return ids, logits


_AT_ONCE = 1 << 16  # entries per step: temporaries stay in a core's own cache, which reduces the time to two thirds


def _row_blocks(numbers: NDArray[Any]) -> Iterator[slice]:
    """Split [P, n] into blocks of rows with about `_AT_ONCE` entries."""
    size = max(_AT_ONCE // max(numbers.shape[1], 1), 1)
    return (slice(begin, begin + size) for begin in range(0, len(numbers), size))


def _ranks(rank_gap: NDArray[Any]) -> NDArray[Any]:
    """Return the ranks [P, K] of rank gaps, in their dtype: cumulative sums along each row, plus 1 at each step."""
    if rank_gap.dtype != np.uint16 or rank_gap.shape[1] % _LANES or not rank_gap.size or sys.byteorder != "little":
        rank = rank_gap.copy()
        rank[:, 1:] += rank_gap.dtype.type(1)
        return np.cumsum(rank, axis=-1, dtype=rank_gap.dtype, out=rank)
    # Processing four numbers at a time reduces the time to two thirds. A word times 0x0001000100010001 contains the prefix sums of
    # its four numbers; none exceeds 16 bits, since a rank does not. The sum before a word is added to all four.
    words = np.ascontiguousarray(rank_gap).view(np.uint64) + _EACH_LANE
    words[:, 0] -= np.uint64(1)  # the first number of a row is a rank, not a gap
    words *= _EACH_LANE
    before = np.cumsum(words[:, :-1] >> np.uint64(48), axis=-1, dtype=np.uint64)
    before *= _EACH_LANE
    words[:, 1:] += before
    return words.view(np.uint16)


_LANES = 4
_EACH_LANE = np.uint64(0x0001000100010001)


@lru_cache(maxsize=4)
def _depths(min_step: float, max_step: float) -> NDArray[np.float32]:
    """Return the depth of every quantisation level, [65,536]."""
    return _depth_of_level(np.arange(LARGEST_LEVEL + 1), min_step, max_step).astype(np.float32)


def round_stats(stats: NDArray[Any]) -> NDArray[np.float32]:
    """Round statistics [P, 5] as a store keeps them: to multiples of 1/1024; the knee is unchanged."""
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


@dataclass(frozen=True)
class HiddenSteps:
    """Quantiser of hidden states: one step per feature, and the point that steps are counted from."""

    step: NDArray[np.float32]  # [d], positive
    mean: NDArray[np.float32]  # [d]


LARGEST_STEP_COUNT = 1 << 22  # steps from the mean; float32 still resolves a quarter of a step there
LEAST_SPREAD = (
    1e-4  # of a head's column, relative to the root mean square over columns: a column without effect has a finite step
)


def steps_of(spread: NDArray[Any], error: float) -> NDArray[np.float32]:
    """Return the quantisation step of each feature that gives logits a wanted error.

    A feature rounded to multiples of `step` has an error of variance step²/12, uniform and independent of the others. It moves the
    logits of a position by that error times the LM head's column, whose mean moves all logits alike and therefore no loss. So
    step = T · sqrt(12 / d) / s makes each feature contribute T²/d to the mean squared error of a logit.

    Args:
        spread: s, the population standard deviation of each column of the LM head over the N rows in use, [d], above 0 somewhere.
        error: T, the root-mean-square error of a logit over the N rows, a shift common to a position apart.

    Returns:
        [d].

    Raises:
        ValueError: spreads that are not finite, or all 0.
    """
    spread = np.asarray(spread, np.float64)
    scale = np.sqrt(np.mean(np.square(spread)))
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError("the LM head has columns that are not finite, or all its rows are equal")
    step: NDArray[np.float32] = (error * np.sqrt(12 / len(spread)) / np.maximum(spread, LEAST_SPREAD * scale)).astype(
        np.float32
    )
    return step


def encode_hidden(states: NDArray[np.float32], dtype: str, steps: HiddenSteps | None = None) -> NDArray[Any]:
    """Encode final hidden states.

    Args:
        states: [P, d], finite. dtype: one of `layout.HIDDEN_DTYPES`. steps: with "steps", the store's.

    Returns:
        [P, d]: float16; bfloat16 as its upper 16 bits, uint16; or the nearest number of steps from the mean, int16, or int32 if
        one of them needs it.

    Raises:
        ValueError: not finite, or beyond the dtype's range.
    """
    if dtype == "steps":
        assert steps is not None
        count = states - steps.mean
        count /= steps.step
        np.rint(count, out=count)
        largest = max(count.max(initial=0), -count.min(initial=0))
        if not largest <= LARGEST_STEP_COUNT:  # also NaN
            raise ValueError(
                "a hidden state is not finite"
                if not np.isfinite(states).all()
                else f"a hidden state lies {largest:g} quantisation steps from the mean, more than {LARGEST_STEP_COUNT}; "
                "use --hidden-dtype bfloat16"
            )
        return count.astype(np.int16 if largest <= np.iinfo(np.int16).max else np.int32)
    if not np.isfinite(states).all():
        raise ValueError("only finite hidden states can be stored")
    if dtype == "float16":
        if states.size and np.abs(states).max() > np.finfo(np.float16).max:
            raise ValueError(f"a hidden state of {np.abs(states).max():g} does not fit float16; use bfloat16")
        return states.astype(np.float16)
    if dtype != "bfloat16":
        raise ValueError(f"hidden states are stored as {', '.join(HIDDEN_DTYPES)}, not as {dtype}")
    bits = np.ascontiguousarray(states, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to nearest, ties to even
    return (rounded >> np.uint32(16)).astype(np.uint16)


def encode_advantage(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Encode visual advantages [P], nats: to the nearest float16, which differs by at most 2^-11 of its size.

    A teacher in half precision does not give its logits as precisely as that.

    Raises:
        ValueError: not finite, or beyond float16.
    """
    if not np.isfinite(values).all():
        raise ValueError("a visual advantage is not finite")
    if values.size and np.abs(values).max() > np.finfo(np.float16).max:
        raise ValueError(f"a visual advantage of {np.abs(values).max():g} nats does not fit float16")
    return values.astype(np.float16)


def decode_hidden(
    state: NDArray[Any],
    dtype: str,
    steps: HiddenSteps | None = None,
    scale: NDArray[np.float16] | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Decode the output of `encode_hidden`, [P, d] float32. If `out` is given, it is filled and returned.

    Args:
        state: as it is stored, [P, d]. steps: with "steps", the store's. scale: with "int8", [P, ceil(d / 32)].
    """
    states = np.empty(state.shape, np.float32) if out is None else out
    if dtype == "steps":
        assert steps is not None
        for rows in _row_blocks(state):
            some = states[rows]
            some[...] = state[rows]
            some *= steps.step
            some += steps.mean
    elif dtype == "float16":
        _widen(state, states)
    elif dtype == "bfloat16":
        np.left_shift(state, np.uint32(16), out=states.view(np.uint32), dtype=np.uint32)
    else:
        assert scale is not None
        states[...] = state
        states *= np.repeat(scale.astype(np.float32), INT8_BLOCK, axis=1)[:, : state.shape[1]]
    return states


def _widen(halves: NDArray[np.float16], out: NDArray[np.float32]) -> None:
    """Write float16 as float32 into `out`, in half of numpy's time and with bit-identical results.

    For a finite float16, its bits without the sign, shifted left by 13, are those of a float32 that is 2^112 times too small.
    """
    bits = out.view(np.int32)
    np.left_shift(halves.view(np.int16), 13, out=bits, dtype=np.int32)  # sign-extends into the upper bits
    bits &= ~0x70000000
    out *= np.float32(2.0**112)
    if (
        out.size and max(out.max(), -out.min()) > np.finfo(np.float16).max
    ):  # not finite, which only occurs in a damaged store
        out[...] = halves


def ranks_by_frequency(ids: NDArray[Any], vocab_rows: int) -> NDArray[np.uint32]:
    """Return id_of_rank [N] uint32: the ids sorted by their frequency in `ids`, highest first, ties by id."""
    counts = np.bincount(ids.ravel(), minlength=vocab_rows)
    return np.lexsort((np.arange(vocab_rows), -counts)).astype(np.uint32)


def invert(id_of_rank: NDArray[Any]) -> NDArray[np.uint32]:
    """Return rank_of_id [N] from id_of_rank [N]."""
    rank_of_id = np.empty(len(id_of_rank), np.uint32)
    rank_of_id[id_of_rank] = np.arange(len(id_of_rank), dtype=np.uint32)
    return rank_of_id
