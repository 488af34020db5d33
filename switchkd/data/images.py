"""Reads and decodes the images of a data file, only from below the image folder and only up to a size limit."""

import io
import warnings
from pathlib import Path, PurePosixPath

from PIL import Image

from switchkd.data.files import read_file
from switchkd.data.samples import BadSample, Sample, Status
from switchkd.errors import DataError, ReadFailure
from switchkd.printable import printable
from switchkd.settings import MAX_IMAGE_PIXELS

# 64 million pixels: above any photograph of the usual data sets, far below a decompression bomb.


def image_bytes_of(sample: Sample, folder: Path | None) -> bytes | None:
    """Return the bytes of a sample's image, from the data set or from the image folder; None for a text-only sample.

    Raises:
        BadSample: see `read_image_bytes`.
        DataError: the image lies in a folder and none was given.
    """
    if sample.image is None:
        return None
    if sample.embedded is not None:
        return sample.embedded()
    if folder is None:
        raise DataError(f"row {sample.index} has the image {sample.image!r}: --images must name the image folder")
    return read_image_bytes(folder, sample.image)


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
    """Decode an image to RGB (the first frame of an animation).

    Raises:
        BadSample: more than `max_pixels`, checked before decoding, or not an image, or cut short.
        ReadFailure: out of memory.
    """
    name = printable(name, 200)
    try:
        # Pillow's own limit first warns and then raises; the check below is stricter, and its error names the sample.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > max_pixels:
                raise BadSample(
                    Status.IMAGE_TOO_LARGE,
                    f"{name!r} has {image.width}×{image.height} pixels, the limit is {max_pixels}",
                )
            return image.convert("RGB")
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample(Status.IMAGE_TOO_LARGE, f"{name!r}: {error}") from None
    except MemoryError:
        raise ReadFailure(f"{name!r} could not be decoded: out of memory; use fewer --workers") from None
    # Pillow's decoders raise many kinds of errors on broken input; none of them may stop a run over thousands of images.
    except Exception as error:
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # Pillow's own errors about the content have no number
            raise ReadFailure(f"{name!r} could not be decoded: {error}; run the same command again") from error
        raise BadSample(Status.IMAGE_UNREADABLE, f"{name!r}: {error}") from None


def extension_mismatch(data: bytes, name: str) -> str:
    """Return a description of a mismatch between an image's format and its suffix, as "GIF behind .jpg"; "" if they agree.

    Decoders use the bytes, so a mismatch is harmless; it is frequent in data sets collected from the web.

    Args:
        data: bytes that `decode_image` takes. name: the file's name.
    """
    suffix = PurePosixPath(name).suffix.lower()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Image.open(io.BytesIO(data)).format or ""
    named = Image.registered_extensions().get(suffix, found)
    return "" if found in (named, "MPO") else f"{found} behind {suffix}"  # MPO: JPEG followed by more pictures
