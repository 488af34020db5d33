"""Selects the leading entries of logits rows, up to the knee or a fixed number, without sorting whole rows.

A histogram of each row gives a logit below which no entry can belong to the result. The entries above it are gathered and
sorted, a few thousand of a vocabulary's 152 thousand entries. The result is that of a stable full sort, ties included; the
histogram only decides how many entries are sorted, never the result.

A logit of -inf is a masked column and does not count: N, the smallest logit and the knee of its row are those of the other columns.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from switchkd.losses.row_limits import EDGE_ERROR, require_two

BINS = 2048  # maximum; the histogram locates a knee to about one bin before any entry is sorted
# Logits that are processed together: temporaries of this many entries stay in a CPU's cache and a GPU's memory.
BLOCK_LOGITS = {"cpu": 1 << 20}
BLOCK_LOGITS_ELSEWHERE = 1 << 25
_kernels: Literal["torch", "triton"] = "torch"


def use_kernels(name: Literal["torch", "triton"]) -> None:
    """Choose what selects from float32 logits on CUDA in this process: torch's operators, or `triton_selection`.

    Raises:
        ImportError: triton is not installed.
    """
    global _kernels
    if name == "triton":
        import switchkd.losses.triton_selection  # noqa: F401
    _kernels = name


def _in_triton(rows: Tensor) -> bool:
    return _kernels == "triton" and rows.is_cuda and rows.dtype == torch.float32


def top_of_rows(logits: Tensor, count: int) -> Tensor:
    """Return the ids of each row's `count` largest logits in descending order, [T, N] → [T, count] int64.

    Equal logits come in the order of their ids, so that the order of eq. 12's pairs is defined.
    """
    found: Tensor = _top_of_rows(logits.detach(), count)
    return found


def leading_entries(logits: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Select each row's leading entries up to its knee, in the order of `top_of_rows`.

    Args:
        logits: [T, N]. window: see `kneedle`.

    Returns:
        (ids [T, k_max] int64, k [T] int64), where k_max is the largest k of the batch (2 if T = 0), or more with Triton's kernels.
        Beyond a row's k its ids are valid but arbitrary. Rows with NaN or +inf get an arbitrary k and arbitrary ids; the losses
        refuse such rows.

    Raises:
        ValueError: fewer than two columns, or than two that are not masked, or a window below 2.
    """
    if window is not None and window < 2:
        raise ValueError(f"window must be at least 2, got {window}")
    if logits.shape[-1] < 2:
        raise ValueError(f"a knee needs at least 2 logits a row, got {logits.shape[-1]}")
    found: tuple[Tensor, Tensor] = _lead_of_rows(logits.detach(), window)
    return found


def entries_up_to(logits: Tensor, k: Tensor) -> Tensor:
    """Return the ids of each row's k largest logits, in the order of `top_of_rows`, [T, N] and [T] int64 → [T, k_max] int64.

    k_max is the largest k of the batch (2 if T = 0). Beyond a row's k its ids are valid but arbitrary.

    Args:
        k: 2 ≤ k ≤ N, for instance the knees of a store.
    """
    found: Tensor = _entries_up_to(logits.detach(), k)
    return found


def tops_and_knees(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return `top_of_rows(logits, count)` and `kneedle(logits)` from one histogram and one sort, [T, count] and [T] int64.

    Args:
        logits: [T, N], T > 0; no gradient flows. count: 0 ≤ count ≤ N.

    Raises:
        ValueError: a row has fewer than two columns that are not masked.
    """
    found = [_top_and_knee(block, count) for block in in_blocks(logits)]
    return torch.cat([ids for ids, _ in found]), torch.cat([k for _, k in found])


def _top_and_knee(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    heights, from_bin, low = _histogram(logits)
    lowest, highest = _bins_of_knee(from_bin)
    floor = (from_bin >= count).sum(-1) - 1  # of the `count` largest
    number = from_bin[:, :1]
    if not _in_numpy(number):
        values, ids = _sorted_from(logits, heights, torch.minimum(lowest, floor), from_bin)
        return ids[:, :count], knee_of_sorted(values, row_size=number, row_min=low)
    # What lies between the largest entries and the bins of the knee needs no order.
    ids = _sorted_from(logits, heights, floor, from_bin)[1][:, :count] if count else floor.new_zeros(len(logits), 0)
    above = F.pad(from_bin, (0, 1)).gather(-1, highest.unsqueeze(-1) + 1)
    bottoms = lowest.to(heights.dtype)
    # The last bin also holds the height `bins`.
    ends = (highest + 1).to(heights.dtype).masked_fill(highest == from_bin.shape[-1] - 1, torch.inf)
    runs = []
    for row, height, first, end in zip(*(x.numpy() for x in (logits, heights, bottoms, ends)), strict=True):
        run = row[(height >= first) & (height < end)]
        run.sort()
        runs.append(torch.from_numpy(run).flip(0))
    values = torch.nn.utils.rnn.pad_sequence(runs, batch_first=True, padding_value=-torch.inf)
    return ids, _rank_of_knee(values, number, low, logits.amax(-1, keepdim=True), above)


# Custom torch operators: compiled and exported programs then contain a call to them, since the control flow depends on the logits.


@torch.library.custom_op("switchkd::top_of_rows", mutates_args=())
def _top_of_rows(logits: Tensor, count: int) -> Tensor:
    tops = [_top(block, count) for block in in_blocks(logits)]
    return torch.cat(tops) if tops else torch.zeros(0, count, dtype=torch.long, device=logits.device)


@_top_of_rows.register_fake
def _(logits: Tensor, count: int) -> Tensor:
    return logits.new_empty(logits.shape[0], count, dtype=torch.long)


@torch.library.custom_op("switchkd::entries_up_to", mutates_args=())
def _entries_up_to(logits: Tensor, k: Tensor) -> Tensor:
    if not len(logits):
        return torch.zeros(0, 2, dtype=torch.long, device=logits.device)
    blocks = in_blocks(logits)
    each = zip(blocks, torch.split(k, [len(block) for block in blocks]), strict=True)
    return _padded([_top(block, numbers) for block, numbers in each])


@_entries_up_to.register_fake
def _(logits: Tensor, k: Tensor) -> Tensor:
    longest = torch.library.get_ctx().new_dynamic_size(min=2)
    return logits.new_empty(logits.shape[0], longest, dtype=torch.long)


@torch.library.custom_op("switchkd::leading_entries", mutates_args=())
def _lead_of_rows(logits: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    rows, count = logits.shape
    if not rows:
        none = torch.zeros(0, dtype=torch.long, device=logits.device)
        return none.new_zeros(0, 2), none
    if window is not None and window < count:
        ids = top_of_rows(logits, window)
        values = logits.gather(-1, ids)
        there = values != -torch.inf
        size, least = there.sum(-1, keepdim=True), values.masked_fill(~there, torch.inf).amin(-1, keepdim=True)
        require_two(size)
        k = knee_of_sorted(values, window, row_size=size, row_min=least)
        return ids[:, : int(k.max())].contiguous(), k
    leads = [_lead(block, window) for block in in_blocks(logits)]
    return _padded([ids for ids, _ in leads]), torch.cat([k for _, k in leads])


@_lead_of_rows.register_fake
def _(logits: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    longest = torch.library.get_ctx().new_dynamic_size(min=2)
    return (
        logits.new_empty(logits.shape[0], longest, dtype=torch.long),
        logits.new_empty(logits.shape[0], dtype=torch.long),
    )


def kneedle(logits: Tensor, window: int | None = None) -> Tensor:
    """Return the number k of leading logits that each row's knee selects.

    Eqs. 8-9: with the row sorted in descending order, x_i = i/N and y_i the value scaled to [0, 1],
    k = argmax_i (1 - x_i) - y_i for i = 1 … N; the first i on a tie. The paper leaves two cases open: k is at least 2, since one
    logit has no pair, and a row of equal logits (y undefined) gives 2.

    Args:
        logits: [T, N], floating point, N ≥ 2; -inf is a masked column. No gradient flows through the result.
        window: search for the knee in the row's `window` largest logits as if they were the whole row. None: all N (the paper).

    Returns:
        [T], int64, 2 ≤ k ≤ N (or ≤ window).

    Raises:
        ValueError: fewer than two columns, or a window below 2.
    """
    return leading_entries(logits, window)[1]


def in_blocks(logits: Tensor) -> list[Tensor]:
    """Divide [T, N] logits into blocks of rows that `BLOCK_LOGITS` entries fit, float32 or float64 and without a gradient."""
    size = BLOCK_LOGITS.get(logits.device.type, BLOCK_LOGITS_ELSEWHERE)
    rows = logits.detach()
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    return list(torch.split(rows, max(1, size // max(rows.shape[-1], 1)))) if len(rows) else []


def _padded(ids: list[Tensor]) -> Tensor:
    """Join the ids of several blocks, each row filled up with 0."""
    longest = max(block.shape[-1] for block in ids)
    return torch.cat([F.pad(block, (0, longest - block.shape[-1])) for block in ids])


def _top(logits: Tensor, count: int | Tensor) -> Tensor:
    """Return the ids of each row's `count` largest entries, [T, count]; with a number for each row, [T], up to the largest."""
    if _in_triton(logits):
        from switchkd.losses import triton_selection

        each = count if isinstance(count, Tensor) else torch.full(logits.shape[:1], count, device=logits.device)
        found = triton_selection.top(logits, each)
        return found if isinstance(count, Tensor) else found[:, :count]
    heights, from_bin, _ = _histogram(logits)
    wanted = count.unsqueeze(-1) if isinstance(count, Tensor) else count
    # The highest bin with at least `count` entries in it and above; -1, the height of masked columns, if there are fewer.
    floor = (from_bin >= wanted).sum(-1) - 1
    longest = int(count.max()) if isinstance(count, Tensor) else count
    return _sorted_from(logits, heights, floor, from_bin)[1][:, :longest]


def _lead(logits: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    if _in_triton(logits):
        from switchkd.losses import triton_selection

        return triton_selection.lead(logits)
    heights, from_bin, low = _histogram(logits)
    floor = _bins_of_knee(from_bin)[0]
    values, ids = _sorted_from(logits, heights, floor, from_bin)
    k = knee_of_sorted(values, window, row_size=from_bin[:, :1], row_min=low)
    return ids[:, : int(k.max())], k


def _in_numpy(rows: Tensor) -> bool:
    """Whether numpy processes these rows; on one core it searches and sorts several times as fast as torch."""
    return rows.device.type == "cpu" and bool(torch.isfinite(rows.sum()))


def _histogram(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (height of every entry, [T, N], rising with the logit; entries in a bin and those above it, [T, bins] int64; the
    smallest logit, [T, 1]).

    An entry's bin is the integer part of its height; a masked column has height -1 and no bin. The first column of the counts is
    the number of columns that are not masked.
    """
    count = min(BINS, logits.shape[-1])
    low, high = logits.amin(-1, keepdim=True), logits.amax(-1, keepdim=True)
    masked = None
    if bool((low == -torch.inf).any()):
        masked = logits == -torch.inf
        low = logits.masked_fill(masked, torch.inf).amin(-1, keepdim=True)
    scale = count / (high - low).clamp_min(1e-30)  # equal logits share bin 0
    heights = (logits - low).mul_(scale)
    if masked is not None:
        heights.masked_fill_(masked, -1.0)
    if _in_numpy(high - low):
        # A row's largest logit falls into bin `count`, beyond the last one, and is moved to the bin below.
        bins = heights.to(torch.int16)  # BINS fit, and the fewer bytes are counted three times as fast
        rows = bins if masked is None else [row[row >= 0] for row in bins]
        entries = torch.stack([torch.bincount(row, minlength=count + 1) for row in rows])
        entries[:, count - 1] += entries[:, count]
        entries = entries[:, :count]
    else:
        bins = heights.nan_to_num_(0.0).long().clamp_(0, count - 1)
        one = torch.ones((), dtype=torch.int32, device=logits.device).expand(bins.shape)
        one = one if masked is None else (~masked).to(torch.int32)
        entries = torch.zeros(len(bins), count, dtype=torch.int32, device=logits.device).scatter_add_(-1, bins, one)
    from_bin = entries.flip(-1).cumsum(-1).flip(-1)
    return heights, from_bin, low


def _bins_of_knee(from_bin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest bin that may hold a row's knee, [T] each.

    The entries of bin b have y between b / bins and (b + 1) / bins, and the first of them has rank 1 + entries above b. So the
    largest of their distances 1 - x - y lies within one bin's height below the bound used here.
    """
    count, columns = from_bin.shape[-1], from_bin[:, :1]
    require_two(columns)
    above = F.pad(from_bin[:, 1:], (0, 1))
    bottom = torch.arange(count, dtype=torch.float64, device=from_bin.device) / count
    bound = (-(above.double() / columns) - bottom).masked_fill(
        from_bin == above, -torch.inf
    )  # an empty bin cannot hold the knee
    reach = bound.amax(-1, keepdim=True) - 1 / count - 4 * EDGE_ERROR
    may = (bound >= reach).to(torch.uint8)
    return may.argmax(-1), count - 1 - may.flip(-1).argmax(-1)


def _sorted_from(logits: Tensor, heights: Tensor, floor: Tensor, from_bin: Tensor) -> tuple[Tensor, Tensor]:
    """Return (values, ids) of each row's entries in bin `floor` and above, [T, m], descending, ties by id; then -inf and 0."""
    number = from_bin.gather(-1, floor.clamp_min(0).unsqueeze(-1))  # [T, 1]
    number = number.masked_fill(floor.unsqueeze(-1) < 0, logits.shape[-1])  # masked columns, too
    longest = int(number.max())
    values = logits.new_full((len(logits), longest), -torch.inf)
    ids = torch.zeros(len(logits), longest, dtype=torch.long, device=logits.device)
    if _in_numpy(number):
        rows = (x.numpy() for x in (logits, heights, floor, values, ids))
        for row, height, bottom, of_values, of_ids in zip(*rows, strict=True):
            places = np.flatnonzero(height >= bottom.astype(height.dtype))
            of_ids[: len(places)] = places[_falling_order(row[places])]
            of_values[: len(places)] = row[of_ids[: len(places)]]
        return values, ids
    flat = (heights >= floor.unsqueeze(-1)).reshape(-1).nonzero().squeeze(-1)  # row-major, ids ascending
    starts = torch.arange(len(logits), device=logits.device).mul_(logits.shape[-1])
    filled = torch.arange(longest, device=logits.device) < number
    values[filled] = logits.reshape(-1)[flat]
    ids[filled] = flat - starts.repeat_interleave(number.squeeze(-1))
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _falling_order(values: np.ndarray) -> np.ndarray:
    """Return the indices that sort [m] values in descending order, ties in their original order."""
    if values.dtype != np.float32:
        return np.argsort(-values, kind="stable")
    # numpy sorts integers with vector instructions, but not in argsort. So each key holds the value's bits, transformed to increase
    # as the value decreases, and the entry's index.
    bits = (values + 0.0).view(np.int32)  # + 0.0 makes -0.0 equal to 0.0
    falling = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    keys = (falling.astype(np.int64) << 32) | np.arange(len(values))
    keys.sort()
    return keys & 0xFFFFFFFF


def knee_of_sorted(
    descending: Tensor, window: int | None = None, row_size: Tensor | None = None, row_min: Tensor | None = None
) -> Tensor:
    """Return the knee k of rows that are already sorted, [T, M] → [T] int64; see `selection.kneedle`.

    Args:
        descending: whole rows, or their leading entries, filled up with -inf.
        window: the knee is searched for in this many leading entries, as if they were the whole row.
        row_size, row_min: for leading entries that certainly contain the knee: N and the smallest logit of each row, [T, 1].

    Raises:
        ValueError: fewer than two columns, or a window below 2.
    """
    if window is not None:
        if window < 2:
            raise ValueError(f"window must be at least 2, got {window}")
        descending = descending[:, :window]
    if descending.shape[-1] < 2:
        raise ValueError(f"a knee needs at least 2 logits a row, got {descending.shape[-1]}")
    count: int | Tensor = descending.shape[-1] if row_size is None else row_size
    bottom = descending[:, -1:] if row_min is None else row_min
    return _rank_of_knee(descending, count, bottom, descending[:, :1])


def _rank_of_knee(
    descending: Tensor, count: int | Tensor, bottom: Tensor, top: Tensor, above: int | Tensor = 0
) -> Tensor:
    """Return the knee k of rows, [T] int64, from a run of each one's entries that certainly contains it.

    Args:
        descending: the runs, [T, M], filled up with -inf. count: N of each row. above: its entries before the run, [T, 1].
        bottom, top: its smallest and largest logit, [T, 1].
    """
    top, bottom = top.double(), bottom.double()
    spread = (top - bottom).clamp_min(torch.finfo(torch.float64).tiny)
    height = (descending.double() - bottom).div_(spread)  # y_i; 0 everywhere if all logits are equal
    rank = above + torch.arange(1, descending.shape[-1] + 1, dtype=torch.float64, device=descending.device)
    distance = height.neg_().add_(1 - rank / count).masked_fill_(descending == -torch.inf, -torch.inf)
    best = distance.argmax(dim=-1, keepdim=True)
    return (best + 1 + above).squeeze(-1).clamp_min_(2)
