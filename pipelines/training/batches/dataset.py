"""The training data: samples joined with the stored teacher's output, each checked against the store's digest."""

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from switchkd.counting import counted
from switchkd.data.encoded import EncodedSample
from switchkd.data.encoding import SampleEncoder
from switchkd.data.files import check_folder
from switchkd.data.oddities import warnings_about
from switchkd.data.samples import BadSample, SampleFile, Status
from switchkd.errors import DataError, StoreMismatch
from switchkd.fingerprints import SampleDigest
from switchkd.pipelines.preflight.inspector import SampleInspector
from switchkd.pipelines.preflight.left_out import LeftOut, Unusable
from switchkd.pipelines.preflight.skip_limit import SkipLimit
from switchkd.pipelines.preflight.survey import probe, survey
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.stored_teacher import changed_since
from switchkd.pipelines.training.batches.collator import aligned_positions, reads_own_media
from switchkd.pipelines.training.batches.sampler import POOL_BATCHES, EpochOrder, Order, padding_share
from switchkd.pipelines.training.batches.switch_share import SwitchShare
from switchkd.pipelines.training.lifecycle.together import from_first_process
from switchkd.stores import Payload, TeacherStore

# Data files of up to so many rows are inspected whole before the first step of a run without a store: within half a minute in one
# process. The order of a larger file's samples does not depend on their images.
SURVEYED_ROWS = 4096
WORTH_GROUPING = 0.05  # share of the tokens that grouping saves
# Typical for English. It is used only to add text to image tokens where lengths of samples are estimated and compared.
CHARACTERS_PER_TOKEN = 4
ESTIMATED_BY = 32  # samples, by whose images the tokens of an image are estimated where its size decides


class OrderedSamples(Dataset[tuple[EncodedSample, int] | Unusable]):
    """The samples of a run, of one data file or of several; `len` is how many an epoch has."""

    encoder: SampleEncoder  # the student's
    teacher_encoder: SampleEncoder | None  # the teacher's, if it encodes samples differently
    skipped: Counter[str]  # rows that are known to be unusable, by reason
    left_out: LeftOut | None  # None where stores know all samples
    surveyed: bool  # whether all rows were inspected

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def rows(self) -> int:
        """Rows of the data, usable or not."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the data's content."""

    @property
    @abstractmethod
    def stores(self) -> list[TeacherStore]:
        """The stores of the data files; none with a live teacher, or without a teacher."""

    @property
    @abstractmethod
    def template(self) -> dict[str, Any]:
        """The conversation template, as plain data."""

    def teacher_of(self, index: int) -> int:
        """Return the number of the teacher that a sample's store is of, by the sample's index; 0 where there is one."""
        return 0

    @abstractmethod
    def warnings(self) -> list[str]:
        """Return lines about usable rows that may lack their image."""

    @abstractmethod
    def payload(self, items: Sequence[tuple[EncodedSample, int]]) -> Payload:
        """Return the stored teacher's output for some of these samples, the positions of all of them concatenated."""

    @abstractmethod
    def aligned(self, count: int) -> float:
        """Return the share of the student's positions that have a partner among the teacher's, over some `count` samples."""

    @abstractmethod
    def order(self, grouping: str, seed: int, global_batch: int) -> Order:
        """Return the order in which epochs take the samples."""

    @abstractmethod
    def longest(self) -> int:
        """Return the estimated length of the longest sample, in tokens, at most the encoder's limit."""

    @abstractmethod
    def order_identity(self) -> str:
        """Return what the order of epochs is made of, besides seed and grouping; equal if a resumed run takes the same samples."""

    def grouping(self, batch_size: int, global_batch: int, packing: int | None) -> Literal["none", "modality-length"]:
        """Return the grouping that a run should have where none is asked for.

        With few steps an epoch, batches of similar samples would be few different ones; with packing there is little padding.
        """
        if packing is not None or len(self) < POOL_BATCHES * global_batch:
            return "none"
        plain, grouped = (self.order(name, 0, global_batch) for name in ("none", "modality-length"))
        assert grouped.lengths is not None
        shares = [padding_share(order.epoch(0), grouped.lengths, batch_size) for order in (plain, grouped)]
        return "modality-length" if shares[0] - shares[1] >= WORTH_GROUPING else "none"


class TrainingSamples(OrderedSamples):
    """The usable samples of a data file, each with its index in the file, and the stored teacher's output for them.

    Without a store (`sft`, a live teacher), nothing is known of the samples at first. Up to `SURVEYED_ROWS` are inspected before
    the first step, by the first process, once (see `preflight.kept`). Of a larger file only a part is, which tells a wrong image
    folder or damaged data from good ones; then all rows that hold a conversation are in the order of the epochs. One that cannot
    be used when it is read is left out of its step, counted, and limited by `max_skipped`. So the order is a function of data file
    and seed, and the first step does not wait for all images.

    Args:
        store: a complete store of this data file, or None.
        workers: processes for inspection.
        teacher_encoder: encodes samples for the teacher, if its tokenizer or number of image tokens differs from the student's; the
            store's digests are then those of its encodings, and every sample has both.
        share: which image samples pass the switch pathway; None: all of them.
        max_skipped: without a store, the share of samples that may be unusable. Below 1, an image folder is refused in which not
            one of some images exists.

    Raises:
        StoreMismatch: the store has another number of samples.
        DataError: no usable sample, or more unusable ones than `max_skipped` allows.
        ReadFailure: an image could not be read now, or memory ran out; names the row.
    """

    def __init__(
        self,
        samples: SampleFile,
        encoder: SampleEncoder,
        store: TeacherStore | None,
        workers: int = 0,
        teacher_encoder: SampleEncoder | None = None,
        max_skipped: float = 1.0,
        share: SwitchShare | None = None,
    ) -> None:
        self.samples, self.encoder, self.store = samples, encoder, store
        self.teacher_encoder, self.share = teacher_encoder, share
        if max_skipped < 1:
            check_folder(samples, encoder.images)
        self.left_out: LeftOut | None = None
        self.surveyed = store is not None or len(samples) <= SURVEYED_ROWS
        if store is None:
            statuses = from_first_process(partial(_statuses, samples, SampleInspector(encoder), workers, max_skipped))
            limit = SkipLimit(samples.path, len(samples), max_skipped)
            limit.skipped = _skipped(statuses)
            self.left_out = LeftOut(limit)
        elif len(store) != len(samples):
            raise StoreMismatch(
                f"{store.path} was made from {counted(len(store), 'sample')}, {samples.path} has {len(samples)}; "
                "train on the data file that was cached"
            )
        else:
            statuses = store.statuses()
        self.usable = np.flatnonzero(statuses == Status.OK)
        self.skipped = _skipped(statuses)
        if not len(self.usable):
            raise DataError(f"{samples.path} has no usable sample: {dict(self.skipped)}")

    def __len__(self) -> int:
        return len(self.usable)

    @property
    def rows(self) -> int:
        """Rows of the data file, usable or not."""
        return len(self.samples)

    @property
    def fingerprint(self) -> str:
        """See `SampleFile`."""
        return self.samples.fingerprint

    @property
    def stores(self) -> list[TeacherStore]:
        """The store, if there is one."""
        return [] if self.store is None else [self.store]

    @property
    def template(self) -> dict[str, Any]:
        """The conversation template, as plain data."""
        return self.encoder.template.as_dict()

    def warnings(self) -> list[str]:
        """Return lines about usable rows that may lack their image."""
        return warnings_about(self.samples.notes())

    def __getitem__(self, item: int) -> tuple[EncodedSample, int] | Unusable:
        """Encode one sample: `item` is epoch · n + its number, see `StepBatches`."""
        epoch, number = divmod(item, len(self.usable))
        index = int(self.usable[number])
        sample = self.samples[index]
        try:
            encoded = self.encoder.encode(sample)
            if self.teacher_encoder is not None:
                own_media = reads_own_media(self.encoder, self.teacher_encoder)
                encoded = replace(encoded, teacher=self.teacher_encoder.encode(sample, pixels=own_media))
            if self.share is not None and encoded.media is not None:
                encoded = replace(encoded, switched=self.share.takes(epoch, number))
        except BadSample as bad:
            if self.left_out is not None:
                return Unusable(index, int(bad.status), bad.detail)
            raise DataError(f"{self.samples.path}, {bad}; it was usable when the run was prepared") from None
        return encoded, index

    def payload(self, items: Sequence[tuple[EncodedSample, int]]) -> Payload:
        """Return the stored teacher's output for some of these samples, the positions of all of them concatenated.

        Raises:
            StoreMismatch: a sample's text, mask or image is not the cached one.
        """
        assert self.store is not None
        payload = self.store.payload([index for _, index in items])  # read first, since this opens all parts at once
        for encoded, index in items:
            if changed := (encoded.teacher or encoded).digest.differing(SampleDigest(*self.store.digest(index))):
                raise StoreMismatch(
                    f"row {index} (id {self.samples[index].id}) of {self.samples.path}: its "
                    f"{changed_since(changed, self.store)}; restore it, or cache again"
                )
        return payload

    def aligned(self, count: int) -> float:
        """Return the share of the student's positions that have a partner among the teacher's, over the first samples."""
        assert self.teacher_encoder is not None
        partners = []
        for index in map(int, self.usable[:count]):
            try:
                sides = [
                    encoder.encode(self.samples[index], pixels=False)
                    for encoder in (self.encoder, self.teacher_encoder)
                ]
            except BadSample:  # left out of its step
                continue
            partners.append(aligned_positions([replace(sides[0], teacher=sides[1])]))
        return float((np.concatenate(partners) >= 0).mean()) if partners else 0.0

    @cached_property
    def image_tokens(self) -> int:
        """Tokens of an image, for estimates of lengths: where the image decides, the mean over some of the data file's."""
        if not self.encoder.reader.is_variable:
            return self.encoder.image_tokens
        shown = self.usable[self.samples.has_image()[self.usable]]
        counts: list[int] = []
        for row in shown[:: max(1, len(shown) // ESTIMATED_BY)][:ESTIMATED_BY]:
            with suppress(BadSample):
                counts += self.encoder.encode(self.samples[int(row)]).image_tokens
        return round(sum(counts) / len(counts)) if counts else 0

    def order(self, grouping: str, seed: int, global_batch: int) -> EpochOrder:
        """Return the order in which epochs take the samples; see `EpochOrder`.

        Lengths are those that the store records. Without them they are estimated from characters, so that no text need be
        tokenized before the first step.
        """
        return EpochOrder(grouping, seed, len(self), self.lengths, self.has_image, global_batch)

    @property
    def has_image(self) -> NDArray[np.bool_]:
        """Which of the usable samples name an image, [n]."""
        return self.samples.has_image()[self.usable]

    @cached_property
    def _recorded(self) -> NDArray[np.int64]:
        """Tokens of every usable sample as the store records them, [n]; 0 where it does not.

        With a teacher of another tokenizer or processor, what is recorded are the teacher's tokens, and all are 0.
        """
        if self.store is None or self.teacher_encoder is not None:
            return np.zeros(len(self), np.int64)
        return self.store.tokens()[self.usable]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every usable sample, image tokens included, [n]: recorded or estimated."""
        known = self._recorded
        if known.all():
            return known
        of_images = self.samples.image_counts()[self.usable] * self.image_tokens
        estimated = self.samples.characters()[self.usable] // CHARACTERS_PER_TOKEN + of_images
        return np.where(known > 0, known, estimated)

    def longest(self) -> int:
        """Return the estimated length of the longest sample, in tokens, at most the encoder's limit."""
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
                f"{self.samples.path} differs in {counted(len(wrong), 'sample')} from what {self.store.path} was made from:\n  "
                + "\n  ".join(wrong[:5])
                + ("\n  …" if len(wrong) > 5 else "")
                + "\nRestore the data file, or cache again; images may also be decoded otherwise by this version of switchkd"
            )

    def order_identity(self) -> str:
        """Return what the order of epochs is made of, besides seed and grouping; equal if a resumed run takes the same samples."""
        made_of = [self.usable]
        if self._recorded.any():
            made_of.append(self._recorded)
        rows = hashlib.blake2b(b"".join(each.astype("<i8").tobytes() for each in made_of), digest_size=8).hexdigest()
        return f"{len(self):,} of {len(self.samples):,}, {rows}"


def _skipped(statuses: NDArray[np.uint8]) -> Counter[str]:
    return Counter(Status(int(code)).label for code in statuses[statuses != Status.OK])


def _statuses(samples: SampleFile, inspector: SampleInspector, workers: int, max_skipped: float) -> NDArray[np.uint8]:
    """Return the status of every row, [n], as far as it is known before the first step; see `TrainingSamples`.

    Raises:
        DataError: more are unusable than `max_skipped` allows, by all of them or by a part.
    """
    limit = SkipLimit(samples.path, len(samples), max_skipped)
    if len(samples) <= SURVEYED_ROWS:
        return survey(samples, inspector, workers, limit).status
    statuses = np.zeros(len(samples), np.uint8)
    for row in map(int, np.flatnonzero(samples.characters() == 0)):  # a row that could not be read has no turns
        statuses[row] = samples[row].status
    limit.add(_skipped(statuses))
    found = probe(samples, inspector, workers)
    unusable = {row: one for row, one in found.items() if one.status is not Status.OK}
    limit.foresee(
        Counter(one.status.label for one in unusable.values()),
        len(found),
        next((one.detail for one in unusable.values()), ""),
    )
    return statuses
