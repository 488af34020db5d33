"""Inspection of single samples: whether one is usable, its length, and anything unusual about it. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from switchkd.data.images import check_enlarged, decode, extension_mismatch, images_of
from switchkd.data.samples import BadSample, Sample, Status
from switchkd.errors import ReadFailure
from switchkd.settings import MAX_IMAGE_PIXELS

if TYPE_CHECKING:
    from switchkd.data.encoding import SampleEncoder

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


class SampleInspector:
    """Inspects single samples: text and mask with an encoder, the image decoded but not processed.

    Args:
        encoder: None inspects rows and images only, since nothing can be tokenized.
        images: the image folder; None, without an encoder, leaves images unread.
    """

    def __init__(
        self, encoder: "SampleEncoder | None", images: Path | None = None, max_image_pixels: int = MAX_IMAGE_PIXELS
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
        """Decode the images, and return (notes, conversions) about them. Raises BadSample."""
        if self.images is None and any(image.embedded is None for image in sample.images):
            return (), ()
        notes: dict[str, None] = {}
        conversions: dict[str, None] = {}
        try:
            for data, image in zip(images_of(sample, self.images), sample.images, strict=True):
                converted = decode(data, image.name, self.max_image_pixels)
                if self.encoder is not None:
                    processor = self.encoder.reader.image_processor
                    check_enlarged(converted.image, processor, image.name, self.max_image_pixels)
                width, height = converted.image.size
                if max(width, height) > THIN * min(width, height):
                    notes[f"image over {THIN} times as long as wide"] = None
                if mismatch := extension_mismatch(data, image.name):
                    notes[mismatch] = None
                conversions |= dict.fromkeys(converted.conversions)
        except BadSample as bad:
            raise BadSample(bad.status, f"row {sample.index}: {bad.detail}") from None
        except ReadFailure as failure:
            raise ReadFailure(f"row {sample.index}: {failure}") from failure
        return tuple(notes), tuple(conversions)
