"""Packs several samples into one row for the language model, assigns samples to rows, and gathers the results per sample.

The batch itself remains [B, L] with one sample per line, and all counts and losses remain per sample. Only the input of a language
model is laid out in rows [R, N]. Its attention is block-diagonal: position ids restart at 0 with each sample, and `block_attention`
and transformers' masks (`masking_utils.find_packed_sequence_indices`) separate samples by them if no mask is passed.

The layout is one tensor, `source` [R, N] int64: the index into the flattened [B, L] of each element of the rows. The padding at the
end of a row refers to the last column of the batch, which contains only padding (`encoded.collate`'s `room`).
"""

import heapq
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def pack_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Assign samples to rows with little padding.

    First-fit decreasing gives a sufficient number of rows. For this number and larger ones, samples are assigned longest first,
    each to the emptiest row. Of these assignments, the one with the least padding is returned; on a tie, the one with the
    shortest rows, since attention costs the square of their length.

    Args:
        lengths: tokens of each sample. row_tokens: maximum tokens per row; a longer sample gets a row of its own.

    Returns:
        The samples of each row, by index.
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
    """Return `source` [R, N] of a batch that is padded on the right to `width`; its last column must contain only padding."""
    assert all(length < width for length in lengths)
    longest = max(sum(lengths[sample] for sample in row) for row in rows)
    source = torch.full((len(rows), longest), width - 1)
    for number, row in enumerate(rows):
        ends = list(accumulate(lengths[sample] for sample in row))
        for sample, end in zip(row, ends, strict=True):
            start = end - lengths[sample]
            source[number, start:end] = torch.arange(lengths[sample]) + sample * width
    return source


def in_order(source: Tensor, attention_mask: Tensor) -> Tensor:
    """Return a layout with the samples of a batch in order, row by row, and no longer rows: `source` itself if it is one.

    A model that puts image features into rows by itself takes them in the order of the rows.
    """
    width = attention_mask.shape[1]
    is_text = into_rows(attention_mask, source).bool()
    if bool((source[is_text].diff() > 0).all()):
        return source
    lengths, room = attention_mask.sum(-1).tolist(), source.shape[1]
    rows: list[list[int]] = [[]]
    for sample, length in enumerate(lengths):
        if sum(lengths[other] for other in rows[-1]) + length > room:
            rows.append([])
        rows[-1].append(sample)
    return layout(rows, lengths, width).to(source.device)


def into_rows(batch: Tensor, source: Tensor) -> Tensor:
    """Lay out [B, L, …] in rows: [R, N, …]."""
    return batch.flatten(0, 1)[source]


def positions_in_rows(attention_mask: Tensor, source: Tensor) -> Tensor:
    """Return the position ids of rows, [R, N]: the index of each token in its sample; padding also restarts at 0.

    The attribute `block_bounds` says how many samples, runs of padding included, there are at most, and how many tokens each has at
    most: what is known without reading from the device, see `varlen_attention.blocks_of`.
    """
    is_text = into_rows(attention_mask, source).bool()
    behind = torch.arange(source.shape[1], device=source.device) - is_text.sum(-1, keepdim=True)
    # Position ids of padding stay below the batch's length, since learned position embeddings are limited.
    positions = torch.where(is_text, source, behind.clamp_min(0)) % attention_mask.shape[1]
    (samples, width), (rows, length) = attention_mask.shape, source.shape
    positions.block_bounds = samples + rows * -(-length // width), width  # type: ignore[attr-defined]
    return positions


def out_of_rows(states: Tensor, source: Tensor, wanted: Tensor) -> Tensor:
    """Gather the states of the wanted tokens from rows.

    Args:
        states: [R, N, d]. wanted: [B, L] bool, never in the last column.

    Returns:
        [P, d], in row-major order of `wanted`.
    """
    place = source.new_zeros(wanted.numel())
    place[source.flatten()] = torch.arange(source.numel(), device=source.device)
    return states.flatten(0, 1)[place[wanted.flatten()]]


def text_inputs(input_ids: Tensor, attention_mask: Tensor, source: Tensor | None) -> dict[str, Tensor]:
    """Return the text arguments of a VLM's forward pass for a batch, padded or, with `source`, packed in rows.

    In rows, images must come in the order of the rows, see `pack_rows`.
    """
    if source is None:
        return {"input_ids": input_ids, "attention_mask": attention_mask}
    return {"input_ids": into_rows(input_ids, source), "position_ids": positions_in_rows(attention_mask, source)}
