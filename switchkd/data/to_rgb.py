"""Converts decoded images of any mode to RGB as a person sees them: turned as EXIF says, on white, with the whole range of grey.

Earlier versions left this to Pillow alone, which ignores the orientation, shows what lies below transparent pixels, and clips wide
ranges of grey to white or black. `Converted.changed` says whether that gives other pixels, so that stores with ordinary images stay
valid and those with affected ones do not; see `stores/README.md`.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

# Value of EXIF's orientation → what turns the image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Tags of TIFF.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0

TURNED = "turned as its EXIF orientation says"
ON_WHITE = "transparent, put on white"
GREY_16 = "16-bit grey, of 0 to 65535"
INTEGER = "integers, of the image's smallest to largest"
FLOAT = "floating-point numbers, of 0 to 1 or smallest to largest"
CHANGED = frozenset({TURNED, ON_WHITE, GREY_16, INTEGER, FLOAT})
_PLAIN = {
    "L": "grey",
    "LA": "grey",
    "1": "black and white",
    "P": "palette",
    "PA": "palette",
    "CMYK": "CMYK",
    "YCbCr": "YCbCr",
}


class NotFinite(ValueError):
    """An image of floating-point numbers holds NaN or infinity."""


@dataclass(frozen=True)
class Converted:
    """An image as RGB, and what was done to it."""

    image: Image.Image
    conversions: tuple[str, ...]  # kinds, for reports; () for an ordinary RGB image

    @property
    def changed(self) -> bool:
        """Whether its pixels are others than those of Pillow's own conversion, which versions before used."""
        return not CHANGED.isdisjoint(self.conversions)


def to_rgb(image: Image.Image) -> Converted:
    """Convert an opened image to RGB.

    Raises:
        NotFinite: a floating-point image with NaN or infinity. What Pillow's decoders raise on broken content.
    """
    image.load()
    turn = _TURNS.get(_orientation(image))
    if image.mode.startswith(("I", "F")):
        kind, flat = _of_wide_grey(image)
    elif image.has_transparency_data and (clear := _on_white(image)) is not None:
        kind, flat = ON_WHITE, clear
    else:
        kind = _PLAIN.get(image.mode, "")
        # Pillow warns that a palette's transparency given as bytes is lost, also where no pixel is transparent.
        layers = image.convert("RGBA") if image.mode == "P" and "transparency" in image.info else image
        flat = layers.convert("RGB")
    done = [] if turn is None else [TURNED]
    return Converted(flat if turn is None else flat.transpose(turn), (*done, *filter(None, [kind])))


def conversion_is_certain(image: Image.Image, data: bytes) -> bool:
    """Whether an image that was opened, but not decoded, is known to be converted as by Pillow alone.

    True for almost every image of the usual data sets; False means that `to_rgb` must decode it to tell.
    """
    if image.mode.startswith(("I", "F")) or image.has_transparency_data:
        return False
    if image.format == "TIFF":  # Pillow has always turned these
        return True
    if (
        image.format == "PNG"
    ):  # EXIF may come after the pixels, and Pillow decodes these to read it; the text is that of XMP
        return "exif" not in image.info and b"eXIf" not in data and b"rientation" not in data
    return _orientation(image) not in _TURNS


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 if there is none or EXIF is damaged. That of a TIFF file is applied and removed by Pillow."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(found)
    except MemoryError:
        raise
    except Exception:  # Pillow's parsers of EXIF and XMP raise many kinds of errors; viewers ignore damaged EXIF
        return 1


def _of_wide_grey(image: Image.Image) -> tuple[str, Image.Image]:
    """Return (kind of conversion, RGB image) of grey with more than 8 bits: Pillow would clip it to 0 … 255."""
    values = np.asarray(image, np.float64)
    tags = getattr(image, "tag_v2", {})  # of TIFF
    if image.mode.startswith("I;16"):
        kind, grey = GREY_16, _grey(values, 0, 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1)
    elif image.mode == "I" and image.format in ("PNG", "PPM"):  # Pillow opens some of their 16-bit grey as integers
        kind, grey = GREY_16, _grey(values, 0, 65535)
    elif image.mode == "I":
        kind, grey = INTEGER, _grey_of_own_range(values)
    elif not np.isfinite(values).all():
        raise NotFinite("it holds floating-point numbers that are not finite")
    else:
        unit = values.min() >= 0 and values.max() <= 1
        kind, grey = FLOAT, _grey(values, 0, 1) if unit else _grey_of_own_range(values)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts it for 8 bits only
        grey = ImageOps.invert(grey)
    return kind, grey.convert("RGB")


def _grey(values: NDArray[np.float64], low: float, high: float) -> Image.Image:
    scaled = np.clip((values - low) * 255 / (high - low), 0, 255)
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _grey_of_own_range(values: NDArray[np.float64]) -> Image.Image:
    low, high = float(values.min()), float(values.max())
    return _grey(values, low, high) if low < high else _grey(values, 0, 255)


def _on_white(image: Image.Image) -> Image.Image | None:
    """Return the image on a white ground; None if none of its pixels is transparent."""
    layers = image.convert("RGBA")
    lowest, _ = layers.getchannel("A").getextrema()
    if lowest == 255:
        return None
    ground = Image.new("RGBA", layers.size, "white")
    ground.alpha_composite(layers)
    return ground.convert("RGB")
