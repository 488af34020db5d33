"""Several samples in one row, each as if it were alone: which samples share a row, and the way there and back.

A batch stays what it is, [B, L] with one sample a line, and everything that is counted and compared stays per sample. Only what a
language model reads is laid out in rows [R, N]. Its attention is block-diagonal: position ids begin anew with each sample, by which
`block_attention` and transformers' masks (`masking_utils.find_packed_sequence_indices`) tell samples apart where no mask is passed.

The layout is one tensor, `source` [R, N] int64: which element of the flattened [B, L] stands in which place. What fills a row up
points to the last column of the batch, which holds padding alone (`encoding.collate`'s `room`).
"""

import heapq
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def pack_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Share samples out among rows with little padding.

    First-fit decreasing tells how many rows suffice. With that many and more, samples are dealt out longest first, each to the
    emptiest row. Of all these the one with the least padding is taken, of equal ones that with the shortest rows: attention costs
    the square of their length.

    Args:
        lengths: tokens of each sample. row_tokens: that a row may have; a longer sample has a row to itself.

    Returns:
        the samples of each row, by index.
    """
    longest_first = sorted(range(len(lengths)), key=lambda sample: -lengths[sample])
    best = _first_fit(longest_first, lengths, row_tokens)
    found = [best] + [_dealt(longest_first, lengths, rows) for rows in range(len(best), len(lengths) + 1)]
    fitting = [rows for rows in found if all(len(row) == 1 or _tokens(row, lengths) <= row_tokens for row in rows)]
    widths = [max((_tokens(row, lengths) for row in rows), default=0) for rows in fitting]
    return min(zip(fitting, widths, strict=True), key=lambda each: (len(each[0]) * each[1], each[1]))[0]


def _tokens(row: list[int], lengths: Sequence[int]) -> int:
    return sum(lengths[sample] for sample in row)


def _first_fit(samples: list[int], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for sample in samples:
        row = next((row for row, left in enumerate(room) if lengths[sample] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_tokens)
        rows[row].append(sample)
        room[row] -= lengths[sample]
    return rows


def _dealt(samples: list[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, row) for row in range(count)]
    for sample in samples:
        tokens, row = filled[0]
        rows[row].append(sample)
        heapq.heapreplace(filled, (tokens + lengths[sample], row))
    return rows


def layout(rows: Sequence[Sequence[int]], lengths: Sequence[int], width: int) -> Tensor:
    """Return `source` [R, N] of a batch that is padded on the right to `width`; its last column must hold padding alone."""
    assert all(length < width for length in lengths)
    longest = max(sum(lengths[sample] for sample in row) for row in rows)
    source = torch.full((len(rows), longest), width - 1)
    for number, row in enumerate(rows):
        ends = list(accumulate(lengths[sample] for sample in row))
        for sample, end in zip(row, ends, strict=True):
            start = end - lengths[sample]
            source[number, start:end] = torch.arange(lengths[sample]) + sample * width
    return source


def into_rows(batch: Tensor, source: Tensor) -> Tensor:
    """Lay out [B, L, …] in rows: [R, N, …]."""
    return batch.flatten(0, 1)[source]


def positions_in_rows(attention_mask: Tensor, source: Tensor) -> Tensor:
    """Return the position ids of rows, [R, N]: the index of each token in its sample; padding counts anew from 0, too."""
    is_text = into_rows(attention_mask, source).bool()
    behind = torch.arange(source.shape[1], device=source.device) - is_text.sum(-1, keepdim=True)
    # No padding counts further than a sample does, for models that learn their positions.
    return torch.where(is_text, source, behind.clamp_min(0)) % attention_mask.shape[1]


def out_of_rows(states: Tensor, source: Tensor, wanted: Tensor) -> Tensor:
    """Pick what belongs to the wanted tokens out of rows.

    Args:
        states: [R, N, d]. wanted: [B, L] bool, never in the last column.

    Returns:
        [P, d], in row-major order of `wanted`.
    """
    place = source.new_zeros(wanted.numel())
    place[source.flatten()] = torch.arange(source.numel(), device=source.device)
    return states.flatten(0, 1)[place[wanted.flatten()]]


def text_inputs(input_ids: Tensor, attention_mask: Tensor, source: Tensor | None) -> dict[str, Tensor]:
    """Return what a VLM's forward takes of a batch's text: as it is, or in rows.

    Images must then come in the order of the rows, see `pack_rows`.
    """
    if source is None:
        return {"input_ids": input_ids, "attention_mask": attention_mask}
    return {"input_ids": into_rows(input_ids, source), "position_ids": positions_in_rows(attention_mask, source)}
