"""Collation of samples into batch tensors: padded or packed, for student and teacher, with the stored teacher's columns."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from switchkd.data.encoded import EncodedSample, collate
from switchkd.data.encoding import SampleEncoder
from switchkd.fingerprints import digest_sample
from switchkd.losses.cross_tokenizer import align_positions
from switchkd.models.features import media_of
from switchkd.models.packing import layout, pack_rows
from switchkd.pipelines.preflight.left_out import Unusable
from switchkd.pipelines.stored_teacher import teacher_columns
from switchkd.stores import Payload

_NOT_IN_THE_FILE = -1  # the index of a placeholder sample

TEACHER_READS = ("input_ids", "attention_mask", "labels")  # the columns of a batch that its LLM takes


class Collator:
    """Makes one batch: the output of `encoded.collate`, and the stored teacher's output at the batch's P positions.

    Args:
        stand_in: added to a text-only batch, see `placeholder_sample`; None leaves such a batch unchanged.
        payload: returns the stored teacher's output for some samples, as `TrainingSamples.payload` does; the seconds that it takes
            are added to the batch as `store_seconds`. None: there is no store.
        empty: takes the place of a batch of which no sample can be used, see `empty_sample`.
        row_tokens: packs the samples into rows of this many tokens: the samples are ordered row by row, and the batch contains
            their layout, see `switchkd.models.packing`. None keeps their order.
        teacher_of: with the stores of several teachers, returns the number of the teacher of a sample, by its index.

    It returns those columns of a `Batch` that exist, as a dict, because transformers' Trainer moves a dict to its device.
    """

    def __init__(
        self,
        pad_id: int,
        stand_in: EncodedSample | None = None,
        payload: Callable[[Sequence[tuple[EncodedSample, int]]], Payload] | None = None,
        teacher_pad_id: int | None = None,
        row_tokens: int | None = None,
        empty: EncodedSample | None = None,
        teacher_of: Callable[[int], int] | None = None,
    ) -> None:
        self.pad_id, self.stand_in, self.payload = pad_id, stand_in, payload
        self.row_tokens, self.empty, self.teacher_of = row_tokens, empty, teacher_of
        self.teacher_pad_id = pad_id if teacher_pad_id is None else teacher_pad_id

    def __call__(self, given: Sequence[tuple[EncodedSample, int] | Unusable]) -> dict[str, Any]:
        left_out = [item for item in given if isinstance(item, Unusable)]
        items = [item for item in given if not isinstance(item, Unusable)]
        if not items:
            assert self.empty is not None
            items.append((self.empty, _NOT_IN_THE_FILE))
        if self.stand_in is not None and all(encoded.media is None for encoded, _ in items):
            items.append((self.stand_in, _NOT_IN_THE_FILE))
        rows: list[list[int]] = []
        if self.row_tokens is not None:
            rows = pack_rows([len(encoded.input_ids) for encoded, _ in items], self.row_tokens)
            items = [items[index] for row in rows for index in row]
        samples = [encoded for encoded, _ in items]
        room = 1 if rows else 0
        batch = collate(samples, self.pad_id, room)
        views = [sample.teacher for sample in samples if sample.teacher is not None]
        if views:
            read = collate(views, self.teacher_pad_id, room)
            batch |= {f"teacher_{name}": read[name] for name in TEACHER_READS}
            if media := media_of(read):
                batch["teacher_media"] = media
        if not all(sample.switched for sample in samples):
            batch["switched"] = torch.tensor([sample.media is not None and sample.switched for sample in samples])
        if any(view.starts is not None for view in views):
            batch["partner"] = torch.from_numpy(aligned_positions(samples))
        if self.row_tokens is not None:
            batch |= _layouts(samples, [len(row) for row in rows], self.row_tokens)
        if self.payload is not None:
            start = time.perf_counter()
            batch |= teacher_columns(self.payload([item for item in items if item[1] != _NOT_IN_THE_FILE]))
            batch["store_seconds"] = time.perf_counter() - start
        if self.teacher_of is not None:
            batch["teacher_number"] = self._teacher_numbers(items)
        if left_out:
            batch["left_out"] = tuple(map(tuple, left_out))  # the Trainer cannot make named tuples anew
        return batch

    def _teacher_numbers(self, items: Sequence[tuple[EncodedSample, int]]) -> torch.Tensor:
        """Return the number of each position's teacher, [P] int64; samples that are not in the file have no position."""
        assert self.teacher_of is not None
        own = [(self.teacher_of(index), encoded.positions) for encoded, index in items if index != _NOT_IN_THE_FILE]
        return torch.tensor([number for number, count in own for _ in range(count)], dtype=torch.int64)


def _layouts(samples: Sequence[EncodedSample], per_row: Sequence[int], row_tokens: int) -> dict[str, torch.Tensor]:
    """Return the layouts of a batch whose rows contain `per_row` samples each, row by row; see `Collator`."""
    numbers = iter(range(len(samples)))
    rows = [list(islice(numbers, count)) for count in per_row]
    lengths = [len(sample.input_ids) for sample in samples]
    found = {"packing": layout(rows, lengths, max(lengths) + 1)}
    read = [len((sample.teacher or sample).input_ids) for sample in samples]
    if any(sample.teacher is not None for sample in samples):
        found["teacher_packing"] = layout(rows, read, max(read) + 1)
    shown = [
        length for length, sample in zip(read, samples, strict=True) if sample.media is not None and sample.switched
    ]
    if shown:
        found["switch_packing"] = layout(pack_rows(shown, row_tokens), shown, max(read) + 1)
    return found


def aligned_positions(samples: Sequence[EncodedSample]) -> NDArray[np.int64]:
    """Align a batch's positions with the teacher's, [P]; see `vocab_map.align_positions`."""
    found, before = [np.empty(0, np.int64)], 0
    for sample in samples:
        if sample.starts is not None and sample.teacher is not None and sample.teacher.starts is not None:
            partner = align_positions(sample.starts, sample.teacher.starts)
            found.append(np.where(partner < 0, -1, partner + before))
            before += len(sample.teacher.starts)
    return np.concatenate(found)


def placeholder_sample(encoder: SampleEncoder, teacher: SampleEncoder | None = None) -> EncodedSample:
    """Return a sample with a made-up image and no position, so that a text-only batch runs the same layers as every other batch.

    Where layers are sharded, all processes gather them together: a process without an image would deadlock with others that run
    the vision tower and the switch pathway. The sample adds nothing to any sum.

    Args:
        encoder: the student's. teacher: the teacher's, if it encodes samples differently; see `TrainingSamples`.
    """
    ids, media = encoder.placeholder()
    supervised = np.zeros(len(ids), np.bool_)
    view = None if teacher is None else placeholder_sample(teacher)
    if view is not None and not reads_own_media(encoder, teacher):
        view = replace(view, media=None)
    return EncodedSample(ids, supervised, media, digest_sample(ids, supervised, None), view)


def reads_own_media(encoder: SampleEncoder, teacher: SampleEncoder | None) -> bool:
    """Whether the teacher reads an image through its own processor; that of a Llava reads no pixels in training."""
    return teacher is not None and (teacher.reader.is_variable or encoder.reader.is_variable)


def empty_sample(pad_id: int, with_teacher: bool, with_starts: bool) -> EncodedSample:
    """Return a sample of two tokens of padding without a position; it adds nothing to any sum.

    Args:
        with_teacher: the teacher encodes samples differently. with_starts: see `EncodedSample.starts`.
    """
    ids, supervised = np.full(2, pad_id, np.int32), np.zeros(2, np.bool_)
    starts = np.zeros(0, np.int64) if with_starts else None
    sample = EncodedSample(ids, supervised, None, digest_sample(ids, supervised, None), starts=starts)
    return replace(sample, teacher=sample) if with_teacher else sample
