"""What stage two reads: samples joined with their stored teacher, every one checked against the store's digest."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from switchkd.encoding import EncodedSample, SampleEncoder, collate
from switchkd.errors import DataError, StoreMismatch
from switchkd.fingerprints import SampleDigest, digest_sample
from switchkd.packing import layout, pack_rows
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.sample_order import SampleOrder
from switchkd.pipelines.survey import Looker, survey
from switchkd.samples import BadSample, SampleFile, Status
from switchkd.stores import Payload, TeacherStore
from switchkd.vlm import Checkpoint, blank_image
from switchkd.vocab_map import align_positions

# English in the usual vocabularies. It weighs text against image tokens where lengths are compared; nothing else needs it.
CHARACTERS_PER_TOKEN = 4
_NOT_IN_THE_FILE = -1  # the index of a sample that stands in
TEACHER_READS = ("input_ids", "attention_mask", "labels")  # what its LLM takes of a batch


class TrainingSamples(Dataset[tuple[EncodedSample, int]]):
    """The usable samples of a data file, each with its index there, and what the teacher said about them.

    Args:
        store: a whole store of this data file; None trains without a store (`sft`, a live teacher), for which
            every sample is looked at first, images decoded.
        workers: processes for that.
        teacher_encoder: encodes as the teacher reads, where another tokenizer or number of image tokens makes that differ; the
            store's digests are then those of its encodings, and every sample has both.

    Raises:
        StoreMismatch: the store has another number of samples.
        DataError: no usable sample.
    """

    def __init__(
        self,
        samples: SampleFile,
        encoder: SampleEncoder,
        store: TeacherStore | None,
        workers: int = 0,
        teacher_encoder: SampleEncoder | None = None,
    ) -> None:
        self.samples, self.encoder, self.store = samples, encoder, store
        self.teacher_encoder = teacher_encoder
        if store is None:
            statuses = survey(samples, Looker(encoder), workers).status
        elif len(store) != len(samples):
            raise StoreMismatch(
                f"{store.path} was made from {len(store)} samples, {samples.path} has {len(samples)}; "
                "train on the data file that was cached"
            )
        else:
            statuses = store.statuses()
        self.usable = np.flatnonzero(statuses == Status.OK)
        self.skipped = Counter(Status(int(code)).label for code in statuses[statuses != Status.OK])
        if not len(self.usable):
            raise DataError(f"{samples.path} has no usable sample: {dict(self.skipped)}")

    def __len__(self) -> int:
        return len(self.usable)

    def __getitem__(self, item: int) -> tuple[EncodedSample, int]:
        index = int(self.usable[item])
        sample = self.samples[index]
        try:
            encoded = self.encoder.encode(sample)
            if self.teacher_encoder is not None:
                encoded = replace(encoded, teacher=self.teacher_encoder.encode(sample, pixels=False))
        except BadSample as bad:
            raise DataError(f"{self.samples.path}, {bad}; it was usable when the run was prepared") from None
        return encoded, index

    def payload(self, items: Sequence[tuple[EncodedSample, int]]) -> Payload:
        """Return what the teacher said about some of these samples, all their positions joined.

        Raises:
            StoreMismatch: a sample's text, mask or image is not the cached one.
        """
        assert self.store is not None
        payload = self.store.payload([index for _, index in items])  # first, since it opens all parts at once
        for encoded, index in items:
            if changed := (encoded.teacher or encoded).digest.differing(SampleDigest(*self.store.digest(index))):
                raise StoreMismatch(
                    f"row {index} (id {self.samples[index].id}) of {self.samples.path}: its {' and '.join(changed)} changed "
                    f"since {self.store.path} was made; restore it, or cache again"
                )
        return payload

    def aligned(self, count: int) -> float:
        """Return the share of the student's positions that have a partner among the teacher's, over the first samples."""
        assert self.teacher_encoder is not None
        partners = []
        for index in map(int, self.usable[:count]):
            sides = [
                encoder.encode(self.samples[index], pixels=False) for encoder in (self.encoder, self.teacher_encoder)
            ]
            partners.append(_partners([replace(sides[0], teacher=sides[1])]))
        return float((np.concatenate(partners) >= 0).mean())

    def order(self, grouping: str, seed: int, global_batch: int) -> SampleOrder:
        """Return the order in which epochs take the samples; see `SampleOrder`.

        Lengths are estimated from characters, so that no text need be tokenized before the first step.
        """
        has_image = self.samples.has_image()[self.usable]
        lengths = self.samples.characters()[self.usable] // CHARACTERS_PER_TOKEN + has_image * self.encoder.image_tokens
        return SampleOrder(grouping, seed, len(self), lengths, has_image, global_batch)

    def longest(self) -> int:
        """Return the estimated length of the longest sample, in tokens, at most what the encoder lets pass."""
        lengths = self.order("length", 0, 1).lengths
        assert lengths is not None
        return min(int(lengths.max()), self.encoder.max_length)

    def require_same_texts(self) -> None:
        """Compare every sample with the store without decoding images; for a data file whose bytes changed.

        Raises:
            StoreMismatch: names the first samples that differ and how many do.
        """
        assert self.store is not None
        wrong: list[str] = []
        with Progress(
            "the data file changed since it was cached: comparing samples", len(self.usable), "samples"
        ) as progress:
            for index in map(int, self.usable):
                encoded = (self.teacher_encoder or self.encoder).encode(self.samples[index], pixels=False)
                if changed := encoded.digest.differing(SampleDigest(*self.store.digest(index))):
                    wrong.append(f"row {index} (id {self.samples[index].id}): {' and '.join(changed)}")
                progress.advance(1)
        if wrong:
            raise StoreMismatch(
                f"{len(wrong)} samples of {self.samples.path} differ from what {self.store.path} was made from:\n  "
                + "\n  ".join(wrong[:5])
                + ("\n  …" if len(wrong) > 5 else "")
                + "\nRestore the data file, or cache again"
            )


class Collator:
    """Makes one batch: what `encoding.collate` gives, and the teacher's word at the batch's P positions.

    Args:
        stand_in: joins a batch of text alone, see `stand_in_image`; None leaves such a batch as it is.
        payload: gives the teacher's word of some samples, as `TrainingSamples.payload` does; the seconds that it takes go into the
            batch as `store_seconds`. None: there is no store.
        row_tokens: makes the batch ready for rows of this many tokens: its samples come row by row, and it says how they are laid
            out, see `switchkd.packing`. None leaves their order.

    From a store: teacher_ids [P, K] int64, teacher_logits [P, K], teacher_tail [P], teacher_knee [P] int64 if it has top-k
    logits; teacher_hidden [P, d] if it has hidden states.

    Where the teacher reads a sample otherwise: teacher_input_ids, teacher_attention_mask, teacher_labels [B, L_T];
    with another tokenizer also partner [P] int64, the teacher's position of each of the student's, or -1.

    With `row_tokens`: packing [R, N] int64; teacher_packing, of the same samples a row, where the teacher reads them otherwise; and
    switch_packing, of the samples with an image as the teacher reads them, which share rows of their own.
    """

    def __init__(
        self,
        pad_id: int,
        stand_in: EncodedSample | None = None,
        payload: Callable[[Sequence[tuple[EncodedSample, int]]], Payload] | None = None,
        teacher_pad_id: int | None = None,
        row_tokens: int | None = None,
    ) -> None:
        self.pad_id, self.stand_in, self.payload = pad_id, stand_in, payload
        self.row_tokens = row_tokens
        self.teacher_pad_id = pad_id if teacher_pad_id is None else teacher_pad_id

    def __call__(self, items: Sequence[tuple[EncodedSample, int]]) -> dict[str, Any]:
        items = list(items)
        if self.stand_in is not None and all(encoded.pixels is None for encoded, _ in items):
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
        if any(view.starts is not None for view in views):
            batch["partner"] = torch.from_numpy(_partners(samples))
        if self.row_tokens is not None:
            batch |= _layouts(samples, [len(row) for row in rows], self.row_tokens)
        if self.payload is not None:
            start = time.perf_counter()
            batch |= teacher_columns(self.payload([item for item in items if item[1] != _NOT_IN_THE_FILE]))
            batch["store_seconds"] = time.perf_counter() - start
        return batch


def _layouts(samples: Sequence[EncodedSample], per_row: Sequence[int], row_tokens: int) -> dict[str, torch.Tensor]:
    """Return the layouts of a batch that holds `per_row` samples a row, row by row; see `Collator`."""
    numbers = iter(range(len(samples)))
    rows = [list(islice(numbers, count)) for count in per_row]
    lengths = [len(sample.input_ids) for sample in samples]
    found = {"packing": layout(rows, lengths, max(lengths) + 1)}
    read = [len((sample.teacher or sample).input_ids) for sample in samples]
    if any(sample.teacher is not None for sample in samples):
        found["teacher_packing"] = layout(rows, read, max(read) + 1)
    shown = [length for length, sample in zip(read, samples, strict=True) if sample.pixels is not None]
    if shown:
        found["switch_packing"] = layout(pack_rows(shown, row_tokens), shown, max(read) + 1)
    return found


def _partners(samples: Sequence[EncodedSample]) -> NDArray[np.int64]:
    """Align a batch's positions with the teacher's, [P]; see `vocab_map.align_positions`."""
    found, before = [np.empty(0, np.int64)], 0
    for sample in samples:
        if sample.starts is not None and sample.teacher is not None and sample.teacher.starts is not None:
            partner = align_positions(sample.starts, sample.teacher.starts)
            found.append(np.where(partner < 0, -1, partner + before))
            before += len(sample.teacher.starts)
    return np.concatenate(found)


def as_teacher_reads(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask and labels of a batch for the teacher's LLM."""
    return {name: batch.get(f"teacher_{name}", batch[name]) for name in TEACHER_READS}


def stand_in_image(checkpoint: Checkpoint, teacher: Checkpoint | None = None) -> EncodedSample:
    """Return a sample that is a blank image and no position, so that a batch of text alone runs what every other batch runs.

    Where layers are sharded, processes gather them together: one that has no image would wait for others that run the vision
    tower and the switch pathway, for ever. It adds nothing to any sum.

    Args:
        teacher: reads it otherwise, see `TrainingSamples`.
    """
    ids = np.full(checkpoint.image_tokens, checkpoint.image_token_id, np.int32)
    supervised = np.zeros(checkpoint.image_tokens, np.bool_)
    view = None if teacher is None else replace(stand_in_image(teacher), pixels=None)
    digest = digest_sample(ids, supervised, None)
    return EncodedSample(ids, supervised, blank_image(checkpoint.config)[0], digest, view)


def teacher_columns(payload: Payload) -> dict[str, torch.Tensor]:
    """Return a payload as the columns of a batch, see `Collator`; the large ones share its memory."""
    columns = {}
    if payload.ids is not None and payload.logits is not None:
        columns["teacher_ids"] = torch.from_numpy(payload.ids).long()  # as the losses index
        columns["teacher_logits"] = torch.from_numpy(payload.logits)
        columns["teacher_tail"] = torch.tensor(payload.stat("tail_logsumexp"))
        columns["teacher_knee"] = torch.from_numpy(payload.stat("knee")).long()
    if payload.hidden is not None:
        columns["teacher_hidden"] = torch.from_numpy(payload.hidden)
    return columns
