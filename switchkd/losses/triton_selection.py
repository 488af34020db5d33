"""Selection of leading logits in Triton kernels: histogram and threshold, compaction, knee; the sort is torch's.

Results are those of `selection`, which calls this module on CUDA if asked to (`selection.use_kernels`). A row is read three
times and no tensor of its size is written. The host waits for the device once per call, for the number of entries to sort; torch
operators wait six times. Kernels run one program a row. Triton's interpreter runs them on a CPU (`make test-triton`).

No GPU has confirmed this module yet: `--experimental triton-selection` selects it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from switchkd.losses.row_limits import EDGE_ERROR, require_two

BINS = 2048  # a power of two
COLUMNS = 4096  # of a row that a program reads at a time
SORTED_COLUMNS = 1024
LEAST_SPREAD = tl.constexpr(1e-30)  # as in `selection`: equal logits share bin 0
EDGE = tl.constexpr(4 * EDGE_ERROR)
TINY = tl.constexpr(2.2250738585072014e-308)  # the smallest normal float64


@triton.jit
def _bin_of(z, low, scale, bins: tl.constexpr):
    """The bin of each logit; -1 for a masked column. Kernels that count and that collect must agree."""
    masked = z == float("-inf")
    height = (tl.where(masked, low, z) - low) * scale
    inside = (height >= 0.0) & (height < bins)  # neither NaN nor inf, which no integer stands for
    place = tl.where(inside, height, tl.where(height >= bins, bins - 1.0, 0.0)).to(tl.int32)
    return tl.where(masked, -1, place)


@triton.jit
def _count(
    logits, wanted, lows, scales, sizes, floors, numbers, columns, has_wanted: tl.constexpr,
    bins: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Of each row: smallest logit, scale of the bins, columns that are not masked, lowest bin to sort, and entries in it and above.

    With `wanted`, that is the highest bin with so many entries in it and above, or -1; without, the lowest that may hold the knee,
    see `selection._bins_of_knee`.
    """
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, block)
    least = tl.full((block,), float("inf"), tl.float32)
    most = tl.full((block,), float("-inf"), tl.float32)
    start = 0
    while start < columns:
        z = tl.load(logits + row * columns + start + offsets, mask=start + offsets < columns, other=float("-inf"))
        least = tl.minimum(least, tl.where(z == float("-inf"), float("inf"), z))
        most = tl.maximum(most, z)
        start += block
    low = tl.min(least, 0)
    scale = bins / tl.maximum(tl.max(most, 0) - low, LEAST_SPREAD)
    counts = tl.zeros((bins,), tl.int32)
    start = 0
    while start < columns:
        there = start + offsets < columns
        z = tl.load(logits + row * columns + start + offsets, mask=there, other=float("-inf"))
        place = _bin_of(z, low, scale, bins)
        counts += tl.histogram(tl.maximum(place, 0), bins, mask=place >= 0)
        start += block
    number = tl.arange(0, bins)
    size = tl.sum(counts, 0)
    above = size - tl.cumsum(counts, 0)  # entries in higher bins
    if has_wanted:
        floor = tl.sum((above + counts >= tl.load(wanted + row)).to(tl.int32), 0) - 1
    else:
        bottom = number.to(tl.float64) / bins
        bound = -(above.to(tl.float64) / size) - bottom
        bound = tl.where(counts == 0, float("-inf"), bound)
        reach = tl.max(bound, 0) - 1.0 / bins - EDGE
        floor = tl.min(tl.where(bound >= reach, number, bins - 1), 0)
    entries = tl.sum(tl.where(number >= floor, counts, 0), 0)
    tl.store(lows + row, low)
    tl.store(scales + row, scale)
    tl.store(sizes + row, size)
    tl.store(floors + row, floor)
    tl.store(numbers + row, tl.where(floor < 0, columns, entries))


@triton.jit
def _collect(
    logits, lows, scales, floors, values, ids, columns, width, bins: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """Write values and ids of each row's entries in bin `floor` and above, in the order of their ids."""
    row = tl.program_id(0).to(tl.int64)
    low, scale, floor = tl.load(lows + row), tl.load(scales + row), tl.load(floors + row)
    offsets = tl.arange(0, block)
    start, written = 0, 0
    while start < columns:
        there = start + offsets < columns
        z = tl.load(logits + row * columns + start + offsets, mask=there, other=float("-inf"))
        found = there & (_bin_of(z, low, scale, bins) >= floor)
        place = written + tl.cumsum(found.to(tl.int32), 0) - 1
        kept = found & (place < width)
        tl.store(values + row * width + place, z, mask=kept)
        tl.store(ids + row * width + place, (start + offsets).to(tl.int64), mask=kept)
        written += tl.sum(found.to(tl.int32), 0)
        start += block


@triton.jit
def _knee(descending, lows, sizes, knees, width, block: tl.constexpr):
    """The knee of each row from its sorted leading entries, as `selection.knee_of_sorted` computes it in float64."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, block)
    bottom, size = tl.load(lows + row).to(tl.float64), tl.load(sizes + row).to(tl.float64)
    spread = tl.load(descending + row * width).to(tl.float64) - bottom
    spread = tl.where(spread > TINY, spread, TINY)
    best, knee = tl.full((), float("-inf"), tl.float64), tl.full((), 2, tl.int32)
    start = 0
    while start < width:
        place = start + offsets
        z = tl.load(descending + row * width + place, mask=place < width, other=float("-inf"))
        height = (z.to(tl.float64) - bottom) / spread
        distance = (1.0 - (place + 1).to(tl.float64) / size) - height
        distance = tl.where(z == float("-inf"), float("-inf"), distance)
        highest, at = tl.max(distance, 0, return_indices=True, return_indices_tie_break_left=True)
        knee = tl.where(highest > best, start + at + 1, knee)
        best = tl.where(highest > best, highest, best)
        start += block
    tl.store(knees + row, tl.maximum(knee, 2).to(tl.int64))


def lead(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Select each row's leading entries up to its knee; see `selection.leading_entries`.

    Args:
        logits: [T, N] float32, T ≥ 1.

    Returns:
        (ids [T, m] int64, k [T] int64); m is at least the largest k, and about a sixth above it.

    Raises:
        ValueError: a row has fewer than two columns that are not masked.
    """
    values, ids, lows, sizes = _sorted(logits, None)
    knees = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    _knee[(len(logits),)](values, lows, sizes, knees, values.shape[-1], block=SORTED_COLUMNS)
    return ids, knees


def top(logits: Tensor, count: Tensor) -> Tensor:
    """Return the ids of at least each row's `count` largest entries, in order, [T, N] float32 and [T] int64 → [T, m] int64."""
    return _sorted(logits, count)[1]


def _sorted(logits: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (values [T, m], descending, ties by id; ids [T, m]; smallest logit [T]; columns that are not masked [T])."""
    logits = logits.contiguous()
    rows, columns = logits.shape
    lows, scales = torch.empty(2, rows, device=logits.device)
    sizes, floors, numbers = torch.empty(3, rows, dtype=torch.int32, device=logits.device)
    _count[(rows,)](
        logits, sizes if wanted is None else wanted, lows, scales, sizes, floors, numbers, columns,
        has_wanted=wanted is not None, bins=BINS, block=COLUMNS,
    )  # fmt: skip
    width, fewest = torch.stack([numbers.max(), sizes.min()]).tolist()  # the one wait
    if wanted is None and fewest < 2:
        require_two(sizes.unsqueeze(-1))
    width = max(2, width)
    values = logits.new_full((rows, width), -torch.inf)
    ids = torch.zeros(rows, width, dtype=torch.long, device=logits.device)
    _collect[(rows,)](logits, lows, scales, floors, values, ids, columns, width, bins=BINS, block=COLUMNS)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order), lows, sizes
