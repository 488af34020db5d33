"""The training data: samples joined with the stored teacher's output, each checked against the store's digest."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from switchkd.data.encoding import EncodedSample, SampleEncoder
from switchkd.data.files import check_folder
from switchkd.data.samples import BadSample, SampleFile, Status
from switchkd.errors import DataError, StoreMismatch
from switchkd.fingerprints import SampleDigest
from switchkd.pipelines.preflight.skip_limit import SkipLimit
from switchkd.pipelines.preflight.survey import SampleInspector, survey
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.training.collator import aligned_positions, reads_own_media
from switchkd.pipelines.training.sampler import EpochOrder
from switchkd.stores import Payload, TeacherStore

# Typical for English. It is used only to add text to image tokens where lengths of samples are estimated and compared.
CHARACTERS_PER_TOKEN = 4


class TrainingSamples(Dataset[tuple[EncodedSample, int]]):
    """The usable samples of a data file, each with its index in the file, and the stored teacher's output for them.

    Args:
        store: a complete store of this data file; None trains without a store (`sft`, a live teacher), in which case
            every sample is inspected first, with its image decoded.
        workers: processes for that inspection.
        teacher_encoder: encodes samples for the teacher, if its tokenizer or number of image tokens differs from the student's; the
            store's digests are then those of its encodings, and every sample has both.
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
    ) -> None:
        self.samples, self.encoder, self.store = samples, encoder, store
        self.teacher_encoder = teacher_encoder
        if max_skipped < 1:
            check_folder(samples, encoder.images)
        if store is None:
            limit = SkipLimit(samples.path, len(samples), max_skipped)
            statuses = survey(samples, SampleInspector(encoder), workers, limit).status
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
                own_media = reads_own_media(self.encoder, self.teacher_encoder)
                encoded = replace(encoded, teacher=self.teacher_encoder.encode(sample, pixels=own_media))
        except BadSample as bad:
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
            partners.append(aligned_positions([replace(sides[0], teacher=sides[1])]))
        return float((np.concatenate(partners) >= 0).mean())

    def order(self, grouping: str, seed: int, global_batch: int) -> EpochOrder:
        """Return the order in which epochs take the samples; see `EpochOrder`.

        Lengths are estimated from characters, so that no text need be tokenized before the first step.
        """
        has_image = self.samples.has_image()[self.usable]
        image_tokens = self.encoder.usual_image_tokens
        lengths = self.samples.characters()[self.usable] // CHARACTERS_PER_TOKEN + has_image * image_tokens
        return EpochOrder(grouping, seed, len(self), lengths, has_image, global_batch)

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
                f"{len(wrong)} samples of {self.samples.path} differ from what {self.store.path} was made from:\n  "
                + "\n  ".join(wrong[:5])
                + ("\n  …" if len(wrong) > 5 else "")
                + "\nRestore the data file, or cache again"
            )
