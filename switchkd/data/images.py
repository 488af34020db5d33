"""Reads and decodes the images of a data file, only from below the image folder and only up to a size limit."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageFilter, UnidentifiedImageError

from switchkd.data.files import read_file
from switchkd.data.samples import BadSample, Sample, Status
from switchkd.data.to_rgb import Converted, conversion_is_certain, to_rgb
from switchkd.errors import DataError, ReadFailure
from switchkd.printable import printable
from switchkd.settings import MAX_IMAGE_PIXELS

# The formats of the usual data sets. Pillow knows some forty more, whose decoders see little use (and EPS runs another program).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM")  # Pillow calls a JPEG with further pictures MPO
_OTHER_FORMATS = {
    b"\x00\x00\x00\x0cjP  ": "a JPEG 2000 image",
    b"\xff\x4f\xff\x51": "a JPEG 2000 image",
    b"\xff\x0a": "a JPEG XL image",
    b"\x00\x00\x00\x0cJXL ": "a JPEG XL image",
    b"%PDF": "a PDF file",
    b"%!PS": "a PostScript file",
    b"8BPS": "a Photoshop image",
    b"\x00\x00\x01\x00": "an icon",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a pointer of Git LFS instead of the image (git lfs pull fetches it)",
}


def images_of(sample: Sample, folder: Path | None, count: int | None = None) -> list[bytes]:
    """Return the bytes of a sample's images, from the data set or from the image folder.

    Args:
        count: of the first ones only.

    Raises:
        BadSample: see `read_image_bytes`.
        DataError: an image lies in a folder and none was given.
    """
    found = []
    for image in sample.images[:count]:
        if image.embedded is not None:
            found.append(image.embedded())
        elif folder is None:
            raise DataError(f"row {sample.index} has the image {image.name!r}: --images must name the image folder")
        else:
            found.append(read_image_bytes(folder, image.name))
    return found


def read_image_bytes(folder: Path, relative: str) -> bytes:
    """Return an image file's bytes.

    Args:
        folder: the image folder. relative: the path in the data file, which must stay below it (no `..`; an absolute one must lead
            into it; links that the folder's owner placed inside it are followed).

    Raises:
        BadSample: the path leaves the folder, or there is no such file.
        ReadFailure: the file, which may be sound, could not be read now; see `files.read_file`.
    """
    path = PurePosixPath(relative.replace("\\", "/"))
    base = PurePosixPath(folder.absolute().as_posix())
    if path.is_relative_to(base):
        path = path.relative_to(base)
    if path.is_absolute() or ".." in path.parts or Path(relative).drive:
        raise BadSample(Status.IMAGE_OUTSIDE_FOLDER, f"{printable(repr(relative), 200)} leaves the image folder")
    return read_file(folder, str(path))


def decode_image(data: bytes, name: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode an image to RGB (the first frame of an animation); see `decode`."""
    return decode(data, name, max_pixels).image


def decode(data: bytes, name: str, max_pixels: int = MAX_IMAGE_PIXELS) -> Converted:
    """Decode an image, and convert it to RGB as a person sees it.

    Raises:
        BadSample: more than `max_pixels`, checked before decoding, or not an image of one of `FORMATS`, or cut short.
        ReadFailure: out of memory.
    """
    name = printable(name, 200)
    with _as_bad_sample(name, data):
        image = _open(data)
        if image.width * image.height > max_pixels:
            raise BadSample(
                Status.IMAGE_TOO_LARGE, f"{name!r} has {image.width}×{image.height} pixels, the limit is {max_pixels}"
            )
        return to_rgb(image)


def blurred(image: Image.Image, share: float) -> Image.Image:
    """Return an image of the same size, blurred with a Gaussian.

    Args:
        share: its standard deviation, as a share of the longer side; 0 returns the image itself.
    """
    return image.filter(ImageFilter.GaussianBlur(share * max(image.size))) if share else image


def was_decoded_otherwise(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> bool:
    """Whether versions of switchkd before `to_rgb` gave an image other pixels; False for one that cannot be decoded.

    Only an image that may be transparent or have an orientation is decoded for it.
    """
    try:
        with _as_bad_sample("image", data):
            certain = conversion_is_certain(_open(data), data)
        return not certain and decode(data, "image", max_pixels).changed
    except BadSample:
        return False


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=FORMATS)


@contextmanager
def _as_bad_sample(name: str, data: bytes) -> Iterator[None]:
    """Convert the errors of Pillow's decoders."""
    try:
        # Pillow's own limit first warns and then raises; the check of `decode` is stricter, and its error names the sample.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample(Status.IMAGE_TOO_LARGE, f"{name!r}: {error}") from None
    except MemoryError:
        raise ReadFailure(f"{name!r} could not be decoded: out of memory; use fewer --workers") from None
    except UnidentifiedImageError:
        reason = f"{_kind_of(data)}; convert it to JPEG or PNG. Read are {', '.join(FORMATS)}"
        raise BadSample(Status.IMAGE_UNREADABLE, f"{name!r}: {reason}") from None
    # Pillow's decoders raise many kinds of errors on broken input; none of them may stop a run over thousands of images.
    except Exception as error:
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # Pillow's own errors about the content have no number
            raise ReadFailure(f"{name!r} could not be decoded: {error}; run the same command again") from error
        # Pillow's decoders report a lack of memory so, but some of them also sizes that a damaged file claims.
        if "out of memory" in str(error) and not _has_memory():
            raise ReadFailure(f"{name!r} could not be decoded: out of memory; use fewer --workers") from error
        raise BadSample(Status.IMAGE_UNREADABLE, f"{name!r}: {printable(error, 300)}") from None


def _has_memory() -> bool:
    """Whether there is memory for one of the largest images, 4 bytes a pixel."""
    try:
        bytearray(4 * MAX_IMAGE_PIXELS)
    except MemoryError:
        return False
    return True


def _kind_of(data: bytes) -> str:
    """Return what a file is that Pillow's decoders of `FORMATS` do not know."""
    start = data[:1024].lstrip().lower()
    if not data:
        return "an empty file"
    if data[4:8] == b"ftyp":
        brand = data[8:12].decode("ascii", "replace").strip()
        return "an AVIF image" if brand in ("avif", "avis") else f"a HEIC image or a video (brand {printable(brand)})"
    found = next((kind for mark, kind in _OTHER_FORMATS.items() if data.startswith(mark)), None)
    if found is None and start.startswith((b"<svg", b"<?xml")) and b"<svg" in data[:4096].lower():
        return "an SVG drawing"
    if found is None and start.startswith((b"<!doctype html", b"<html")):
        return "a web page, not an image"
    return found or "not an image, or damaged at its beginning"


def check_enlarged(image: Image.Image, processor: Any, name: str, max_pixels: int) -> None:
    """Refuse a thin image of which an image processor would make a huge one.

    A processor that resizes the shorter edge to 336 makes 336 × 20,160,000 pixels of 1 × 60,000, and one that pads to a square
    60,000 × 60,000.

    Args:
        processor: an image processor of transformers. max_pixels: of the enlarged image.

    Raises:
        BadSample: more pixels than that.
    """
    width, height = image.size
    size = getattr(processor, "size", None) or {}
    if getattr(processor, "do_pad", False):
        width = height = max(width, height)
    shortest = size.get("shortest_edge") if getattr(processor, "do_resize", False) else None
    if shortest:
        scale = max(1.0, int(shortest) / min(width, height))
        width, height = round(width * scale), round(height * scale)
    if width * height > max_pixels:
        raise BadSample(
            Status.IMAGE_TOO_LARGE,
            f"{printable(name, 200)!r}, {image.width}×{image.height} pixels, would become {width:,}×{height:,} before it is made "
            f"square, the limit is {max_pixels}",
        )


def extension_mismatch(data: bytes, name: str) -> str:
    """Return a description of a mismatch between an image's format and its suffix, as "GIF behind .jpg"; "" if they agree.

    Decoders use the bytes, so a mismatch is harmless; it is frequent in data sets collected from the web.

    Args:
        data: bytes that `decode_image` takes. name: the file's name.
    """
    suffix = PurePosixPath(name).suffix.lower()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = _open(data).format or ""
    named = Image.registered_extensions().get(suffix, found)
    return "" if found in (named, "MPO") else f"{found} behind {suffix}"  # MPO: JPEG followed by more pictures
