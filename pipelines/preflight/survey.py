"""Inspection of every sample before capture or training: whether it is usable, its length, and anything unusual about it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from switchkd.data.encoding import SampleEncoder
from switchkd.data.images import check_enlarged, decode, extension_mismatch, image_bytes_of
from switchkd.data.samples import BadSample, Sample, SampleFile, Status
from switchkd.errors import ReadFailure
from switchkd.pipelines.preflight.skip_limit import SkipLimit
from switchkd.pipelines.progress import Progress
from switchkd.settings import MAX_IMAGE_PIXELS

ROWS_PER_ITEM = 64  # rows that a worker process takes at a time
THIN = 100  # ratio of sides above which an image is noted
UNKNOWN = -1  # tokens or positions of a sample that could not be tokenized


@dataclass(frozen=True)
class Finding:
    """The result of inspecting one sample."""

    status: Status
    detail: str = ""  # why it cannot be used
    tokens: int = UNKNOWN  # image tokens included
    positions: int = UNKNOWN
    notes: tuple[str, ...] = ()  # unusual, but usable: "GIF behind .jpg"
    conversions: tuple[str, ...] = ()  # what makes its image RGB, see `data.to_rgb`


@dataclass(frozen=True)
class Survey:
    """The result of inspecting all n samples."""

    status: NDArray[np.uint8]  # [n]
    tokens: NDArray[np.int64]  # [n]
    positions: NDArray[np.int64]  # [n]
    details: dict[int, str] = field(default_factory=dict)  # row → why it cannot be used
    notes: dict[str, list[int]] = field(default_factory=dict)  # note → rows
    conversions: dict[str, list[int]] = field(default_factory=dict)  # kind of conversion to RGB → rows

    def skipped(self) -> Counter[str]:
        """Return how many samples cannot be used, by reason."""
        return Counter(Status(int(code)).label for code in self.status[self.status != Status.OK])


class SampleInspector:
    """Inspects single samples: text and mask with an encoder, the image decoded but not processed.

    Args:
        encoder: None inspects rows and images only, since nothing can be tokenized.
        images: the image folder; None, without an encoder, leaves images unread.
    """

    def __init__(
        self, encoder: SampleEncoder | None, images: Path | None = None, max_image_pixels: int = MAX_IMAGE_PIXELS
    ) -> None:
        self.encoder, self.images, self.max_image_pixels = encoder, images, max_image_pixels
        if encoder is not None:
            self.images, self.max_image_pixels = encoder.images, encoder.max_image_pixels

    def inspect(self, sample: Sample) -> Finding:
        """Inspect one sample; never raises for a bad one."""
        tokens = positions = UNKNOWN
        try:
            sample.require_ok()
            if self.encoder is not None:
                encoded = self.encoder.encode(sample, pixels=False)
                tokens, positions = len(encoded.input_ids), encoded.positions
            notes, conversions = self._of_image(sample)
        except BadSample as bad:
            return Finding(bad.status, bad.detail, bad.tokens or tokens, positions)
        return Finding(Status.OK, "", tokens, positions, (*sample.notes, *notes), conversions)

    def _of_image(self, sample: Sample) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Decode the image, and return (notes, conversions) about it. Raises BadSample."""
        if sample.image is None or (self.images is None and sample.embedded is None):
            return (), ()
        try:
            data = image_bytes_of(sample, self.images)
            assert data is not None
            converted = decode(data, sample.image, self.max_image_pixels)
            if self.encoder is not None:
                check_enlarged(
                    converted.image, self.encoder.reader.image_processor, sample.image, self.max_image_pixels
                )
        except BadSample as bad:
            raise BadSample(bad.status, f"row {sample.index}: {bad.detail}") from None
        except ReadFailure as failure:
            raise ReadFailure(f"row {sample.index}: {failure}") from failure
        width, height = converted.image.size
        thin = max(width, height) > THIN * min(width, height)
        notes = (extension_mismatch(data, sample.image), f"image over {THIN} times as long as wide" if thin else "")
        return tuple(filter(None, notes)), converted.conversions


class _Chunks(Dataset[list[Finding]]):
    """Groups of `ROWS_PER_ITEM` consecutive samples, inspected."""

    def __init__(self, samples: SampleFile, inspector: SampleInspector) -> None:
        self.samples, self.inspector = samples, inspector

    def __len__(self) -> int:
        return -(-len(self.samples) // ROWS_PER_ITEM)

    def __getitem__(self, item: int) -> list[Finding]:
        rows = range(item * ROWS_PER_ITEM, min((item + 1) * ROWS_PER_ITEM, len(self.samples)))
        return [self.inspector.inspect(self.samples[row]) for row in rows]


def survey(samples: SampleFile, inspector: SampleInspector, workers: int = 0, limit: SkipLimit | None = None) -> Survey:
    """Inspect every sample of a data file, in `workers` processes (0: in this one).

    Args:
        limit: counts the samples that cannot be used, and stops the survey at the first one too many; None inspects all.

    Raises:
        DataError: the data file has images and no folder was given to an encoder, or more samples are skipped than `limit` allows.
        ReadFailure: an image could not be read now, or memory ran out; names the row.
    """
    loader: DataLoader[Any] = DataLoader(_Chunks(samples, inspector), batch_size=None, num_workers=workers)
    status = np.zeros(len(samples), np.uint8)
    tokens = np.full(len(samples), UNKNOWN, np.int64)
    positions = np.full(len(samples), UNKNOWN, np.int64)
    details: dict[int, str] = {}
    notes: dict[str, list[int]] = {}
    conversions: dict[str, list[int]] = {}
    with Progress("checking samples", len(samples), "samples") as progress:
        for row, found in enumerate(_each(loader, progress)):
            status[row], tokens[row], positions[row] = found.status, found.tokens, found.positions
            if found.status is not Status.OK:
                details[row] = found.detail
                if limit is not None:
                    limit.add({found.status.label: 1}, seen=found.detail)
            for note in found.notes:
                notes.setdefault(note, []).append(row)
            for kind in found.conversions:
                conversions.setdefault(kind, []).append(row)
    return Survey(status, tokens, positions, details, notes, conversions)


def _each(chunks: Any, progress: Progress) -> Iterator[Finding]:
    for chunk in chunks:
        yield from chunk
        progress.advance(len(chunk))
