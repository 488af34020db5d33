"""Encodes the teacher's order among top-k entries of equal quantisation level as one number per position.

DBiLD pairs the leading entries in their order, and quantisation makes entries equal. Without the order of equal entries, the error
of the gradient of DBiLD with a window is larger by 12 to 25 % of itself (docs/payloads.md). The first entries matter most, and the
order of all 128 would take 22 bytes, so the code covers as many of them as fit into `LIMIT` numbers: about 34 entries, 1.9 bytes.

Take a position's entries by ascending level (a level is a depth), those of equal level by ascending rank. A *run* is a maximal
sequence of entries of equal level. The radix r_i of place i is the number of entries from it to the end of its run, and its base is
b_i = r_0 · … · r_{i-1}. Its digit (Lehmer code) tells which of the entries of the run that have no place yet, counted from 0 by
ascending rank, comes at place i. The code is Σ b_i · digit_i over the places with b_i · r_i ≤ `LIMIT`, of the first `PLACES`. The
other entries of a run follow by ascending rank.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LIMIT = 1 << 14
PLACES = 64


class _Places(NamedTuple):
    """The places of P positions that a code covers and that have a choice (radix above 1), flat, by position and then place."""

    row: NDArray[np.intp]  # position
    at: NDArray[np.intp]  # index of the place in a flat [P · K] array
    turn: NDArray[np.intp]  # number of the place in its run, from 0
    radix: NDArray[np.intp]
    base: NDArray[np.intp]


def encode_order(levels: NDArray[Any], ranks: NDArray[Any]) -> NDArray[np.uint16]:
    """Return the code of each position, [P].

    Args:
        levels: [P, K] integer, the entries' levels in the order to be kept, so that they ascend (a level is a depth).
        ranks: [P, K] integer.
    """
    found = _covered(levels)
    flat = ranks.ravel()
    digit = np.zeros(len(found.at), np.intp)
    mine = flat[found.at]
    left = np.arange(len(found.at))
    for step in range(1, int(found.radix.max(initial=1))):
        left = left[found.radix[left] > step]
        digit[left] += flat[found.at[left] + step] < mine[left]
    return np.bincount(found.row, weights=digit * found.base, minlength=len(levels)).astype(np.uint16)


def apply_order(codes: NDArray[np.uint16], levels: NDArray[Any], entries: NDArray[Any]) -> None:
    """Bring entries from the order by rank within a level into the encoded order, in place.

    Args:
        codes: [P]. levels: [P, K] integer, ascending. entries: [P, K] contiguous, what is moved: entries of equal level by
            ascending rank.
    """
    found = _covered(levels)
    digit = codes.astype(np.intp)[found.row] // found.base % found.radix
    flat = entries.reshape(-1)
    # Places of one run depend on each other, so they are processed one after the other, but those of all runs at once.
    moved = np.flatnonzero(digit)
    at, back, turn = found.at[moved], digit[moved], found.turn[moved]
    for number in range(int(turn.max(initial=-1)) + 1):
        these = np.flatnonzero(turn == number)
        _bring(flat, at[these], back[these])


def _bring(flat: NDArray[Any], at: NDArray[np.intp], back: NDArray[np.intp]) -> None:
    """Bring the entry that lies `back` behind each place to it, and move those that it passes back by one."""
    chosen = flat[at + back]
    for step in range(int(back.max(initial=0)), 1, -1):
        passed = at[back >= step] + step
        flat[passed] = flat[passed - 1]
    flat[at + 1] = flat[at]
    flat[at] = chosen


def _covered(levels: NDArray[Any]) -> _Places:
    """Return the places that a code covers; levels: [P, K], ascending."""
    positions, entries = levels.shape
    places = min(entries, PLACES)
    equal = np.zeros((positions, places), bool)  # to the next entry, of which the last of all has none
    width = min(places, entries - 1)
    np.equal(levels[:, :width], levels[:, 1 : width + 1], out=equal[:, :width])
    # A place has a choice if the next entry is equal; these places, and no other, are listed.
    tied = np.flatnonzero(equal)
    row = tied // places
    number = np.arange(len(tied))
    begins = np.ones(len(tied), bool)
    begins[1:] = (tied[1:] != tied[:-1] + 1) | (row[1:] != row[:-1])
    first = np.flatnonzero(begins)
    size = np.diff(first, append=len(tied))  # of the runs, less 1
    run = np.cumsum(begins) - 1
    turn = number - first[run]
    radix = size[run] - turn + 1
    if entries > places:  # a run may go on behind the places
        crossing = np.flatnonzero(equal[:, -1])
        beyond = (levels[crossing, places:] == levels[crossing, places - 1, None]).sum(-1)
        more = np.zeros(positions, np.intp)
        more[crossing] = beyond - 1  # one of them is counted already
        last = tied - turn + size[run] == (row + 1) * places
        radix += np.where(last, more[row], 0)
    # The product of the choices so far, by sums of logarithms: one whole number is told from the next, see _ROUNDING.
    bits = np.cumsum(np.log2(radix))
    before = np.concatenate([[0.0], bits])[np.searchsorted(row, np.arange(positions + 1))]
    through = bits - before[row]
    kept = np.flatnonzero(through <= np.log2(LIMIT) + _ROUNDING)
    radix, row = radix[kept], row[kept]
    base = np.rint(np.exp2(through[kept] - np.log2(radix))).astype(np.intp)
    at = tied[kept] + row * (entries - places)
    return _Places(row, at, turn[kept], radix, base)


_ROUNDING = 1e-5  # log2(LIMIT + 1) - log2(LIMIT) is 8.8e-5; sums over a part's entries are exact to 1e-9
