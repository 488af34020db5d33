"""Checks that an image processor makes the pixels that a vision tower takes, on one grey image."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from switchkd.errors import CheckpointError
from switchkd.library_errors import as_checkpoint_error
from switchkd.models.families import family_of
from switchkd.printable import printable

if TYPE_CHECKING:
    from switchkd.models.checkpoint import Checkpoint

MAX_SIDE = 1 << 13  # pixels
_SIZES = ("size", "crop_size", "pad_size")
_ADVICE = "take the preprocessor_config.json that belongs to the vision tower, or pass --image-mode square"


def check_processor(checkpoint: "Checkpoint") -> None:
    """Run a Llava's image processor over a small grey image that is not square, as most images are.

    Other families' pixels have no fixed shape; their processor is tried with a made-up image, see `data.media.MediaReader.probe`.

    Raises:
        CheckpointError: it fails, or its pixels are not those of the tower: another number of channels or size, or not finite.
    """
    path, processor = checkpoint.path, checkpoint.image_processor
    if not family_of(checkpoint.config).is_llava:
        return
    for name, side in _sides(processor):
        if not isinstance(side, int | float) or not 1 <= side <= MAX_SIDE:
            raise CheckpointError(
                f"{path}: its image processor has {name} {printable(repr(side), 60)}, expected 1 to {MAX_SIDE:,} pixels; {_ADVICE}"
            )
    size = checkpoint.config.vision_config.image_size
    with as_checkpoint_error(path, "the image processor of {} fails on a grey image", _ADVICE):
        pixels = processor(images=Image.new("RGB", (size, max(1, size * 3 // 4)), (127, 127, 127)), return_tensors="pt")
        pixels = pixels["pixel_values"][0]
        shape, finite = tuple(pixels.shape), bool(torch.isfinite(pixels).all())
    if shape != (3, size, size):
        raise CheckpointError(
            f"{path}: its image processor makes pixels of shape {shape}, its vision tower takes {(3, size, size)}; {_ADVICE}"
        )
    if not finite:
        raise CheckpointError(
            f"{path}: its image processor makes pixels that are not finite: image_std {processor.image_std}, "
            f"rescale_factor {processor.rescale_factor}; {_ADVICE}"
        )


def _sides(processor: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, pixels) of everything that says how large images become."""
    for name in _SIZES:
        size = getattr(processor, name, None)
        if size is None:
            continue
        try:
            sides = list(dict(size).items())
        except (TypeError, ValueError):
            sides = [("", size)]
        yield from ((f"{name} {side}".strip(), value) for side, value in sides if value is not None)
