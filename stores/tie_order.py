"""Encodes the teacher's order among top-k entries of equal quantisation level as one number per position.

DBiLD pairs the leading entries in their order, and quantisation makes entries equal. Without the order of equal entries, the error
of the gradient of DBiLD with a window is up to half as large again (docs/payloads.md). The first entries matter most, and the order
of all 128 would take 22 bytes, so the code covers as many of them as fit into `LIMIT` numbers: about 33 entries, 1.8 bytes.

Take a position's entries by ascending level (a level is a depth), those of equal level by ascending rank. A *run* is a maximal
sequence of entries of equal level. The radix r_i of place i is the number of entries from it to the end of its run, and its base is
b_i = r_0 · … · r_{i-1}. Its digit (Lehmer code) tells which of the entries of the run that have no place yet, counted from 0 by
ascending rank, comes at place i. The code is Σ b_i · digit_i over the places with b_i · r_i ≤ `LIMIT`, of the first `PLACES`. The
other entries of a run follow by ascending rank.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LIMIT = 1 << 14
PLACES = 64


class _Places(NamedTuple):
    """The places of P positions that a code covers and that have a choice (radix above 1), flat, by position and then place."""

    row: NDArray[np.intp]  # position
    at: NDArray[np.intp]  # index of the place in a flat [P · K] array
    radix: NDArray[np.intp]
    base: NDArray[np.intp]


def encode_order(levels: NDArray[np.integer], ranks: NDArray[np.integer]) -> NDArray[np.uint16]:
    """Return the code of each position, [P].

    Args:
        levels: [P, K], the entries' levels in the order to be kept, so that they ascend (a level is a depth). ranks: [P, K].
    """
    found = _covered(levels)
    flat = ranks.ravel()
    digit = np.zeros(len(found.at), np.intp)
    mine = flat[found.at]
    for step in range(1, int(found.radix.max(initial=1))):
        later = np.flatnonzero(found.radix > step)
        digit[later] += flat[found.at[later] + step] < mine[later]
    return np.bincount(found.row, weights=digit * found.base, minlength=len(levels)).astype(np.uint16)


def apply_order(codes: NDArray[np.uint16], levels: NDArray[np.integer], entries: NDArray[np.integer]) -> None:
    """Bring entries from the order by rank within a level into the encoded order, in place.

    Args:
        codes: [P]. levels: [P, K], ascending. entries: [P, K] contiguous, what is moved: entries of equal level by ascending rank.
    """
    found = _covered(levels)
    digit = codes.astype(np.intp)[found.row] // found.base % found.radix
    flat = entries.reshape(-1)
    # Places of one run depend on each other, so they are processed one after the other, but those of all runs at once.
    run = found.at + found.radix  # the end of a run identifies it
    first = np.ones(len(run), bool)
    first[1:] = run[1:] != run[:-1]
    number = np.arange(len(run))
    place = number - np.maximum.accumulate(np.where(first, number, 0))
    moved = np.flatnonzero(digit)
    for turn in range(int(place[moved].max(initial=-1)) + 1):
        these = moved[place[moved] == turn]
        at, back = found.at[these], digit[these]
        chosen = flat[at + back]
        for step in range(int(back.max(initial=0)), 0, -1):
            passed = at[back >= step] + step
            flat[passed] = flat[passed - 1]
        flat[at] = chosen


def _covered(levels: NDArray[np.integer]) -> _Places:
    """Return the places that a code covers; levels: [P, K], ascending."""
    positions, entries = levels.shape
    places = min(entries, PLACES)
    leading = levels[:, :places]
    number = np.arange(places)
    ends = np.full((positions, places), places - 1)
    ends[:, :-1] = np.where(leading[:, 1:] != leading[:, :-1], number[:-1], places - 1)
    ends = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    radix = ends - number + 1
    beyond = (levels[:, places:] == levels[:, places - 1 : places]).sum(-1, keepdims=True)  # the last run goes on
    radix += np.where(ends == places - 1, beyond, 0)
    through = np.cumprod(radix, axis=1, dtype=np.float64)  # exact as far as it matters; may become infinite
    row, place = np.nonzero((through <= LIMIT) & (radix > 1))
    chosen = radix[row, place]
    return _Places(row, row * entries + place, chosen, through[row, place].astype(np.intp) // chosen)
