"""Reads the files of images, and tells failures of the data (no such file) from failures around it (disk, network, permission).

Only the former may become the status of a sample, which is final. The latter stop the run: the same row may be readable later.
"""

import errno
import os
import stat
import time
from pathlib import Path

from switchkd.data.samples import BadSample, SampleFile, Status
from switchkd.errors import DataError, ReadFailure
from switchkd.printable import printable

RETRY_SECONDS = (0.1, 1.0)  # waited before the second and the third attempt
PROBED_IMAGES = 64  # of the whole data file, when the image folder is checked

# The file does not exist, or the path names no file.
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# No file can have this name: too long, a loop of links, characters that the file system does not take.
_IMPOSSIBLE_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ)
# A second attempt does not help.
_LASTING = (errno.EACCES, errno.EPERM)


def read_file(folder: Path, name: str) -> bytes:
    """Return the bytes of an image file.

    Args:
        folder: the image folder. If it does not exist or is empty, then a missing file says nothing about the data.
        name: the path below it.

    Raises:
        BadSample: no such file, or something that is not a regular file.
        ReadFailure: the file could not be read for another reason, after three attempts.
    """
    path, quoted = folder / name, printable(repr(name), 200)
    for wait in (*RETRY_SECONDS, None):
        try:
            return _read(path)
        except ValueError as error:  # a name with a zero byte or half of a surrogate pair
            raise BadSample(Status.IMAGE_UNREADABLE, f"{quoted}: {error}") from None
        except MemoryError:
            raise ReadFailure(f"{printable(path)} could not be read: out of memory; use fewer --workers") from None
        except OSError as error:
            if error.errno in _MISSING:
                require_folder(folder)
                raise BadSample(Status.IMAGE_MISSING, f"no image {printable(path, 300)}") from None
            if error.errno in _IMPOSSIBLE_NAMES:
                raise BadSample(Status.IMAGE_UNREADABLE, f"{quoted}: {os.strerror(error.errno)}") from None
            if error.errno in _LASTING or wait is None:
                raise ReadFailure(
                    f"{printable(path)} could not be read: {os.strerror(error.errno or 0)}. This says nothing about the image, so "
                    "it is not skipped: mend permissions, disk or network, and run the same command again"
                ) from error
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _read(path: Path) -> bytes:
    # Without O_NONBLOCK, opening a FIFO would wait for a writer.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise IsADirectoryError(errno.EISDIR, "a folder")
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise BadSample(Status.IMAGE_UNREADABLE, f"{printable(path, 300)} is not a regular file")
        return file.read()


def require_folder(folder: Path) -> None:
    """Raise ReadFailure if the image folder does not exist (any more) or is empty, as where a file system is not mounted."""
    try:
        with os.scandir(folder) as entries:
            if next(entries, None) is not None:
                return
        found = "is empty"
    except OSError as error:
        found = f"cannot be listed: {os.strerror(error.errno or 0)}"
    raise ReadFailure(
        f"the image folder {printable(folder)} {found}; is its file system mounted? No row was skipped for it: run the same "
        "command again when it is there"
    )


def check_folder(samples: SampleFile, folder: Path | None) -> None:
    """Check that an image folder is the one that a data file's paths start from, by images from all over the file.

    Raises:
        DataError: not one of them exists; names a folder near by that holds the first one, if there is one.
        ReadFailure: the folder is empty, or cannot be listed.
    """
    rows = samples.rows_in_folder()
    if folder is None or not len(rows):
        return
    probed = rows[:: -(-len(rows) // PROBED_IMAGES)]
    names = [str(samples[int(row)].image) for row in probed]
    if any(_exists(folder, name) for name in names):
        return
    require_folder(folder)
    better = _folder_with(folder, names[0])
    raise DataError(
        f"not one of {len(names)} images of {printable(samples.path)} exists below {printable(folder)}; the first is "
        f"{printable(folder / names[0], 300)} (row {probed[0]}). "
        + (
            f"Pass --images {printable(better)}, where it lies"
            if better
            else "--images takes the folder that paths start from"
        )
        + ". --max-skipped 1 records them all as skipped"
    )


def _exists(folder: Path, name: str) -> bool:
    """Whether a path exists; True if that cannot be told, since a later attempt to read it gives the reason."""
    try:
        os.stat(folder / name.replace("\\", "/"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError as error:
        return error.errno not in _IMPOSSIBLE_NAMES
    return True


def _folder_with(folder: Path, name: str) -> Path | None:
    """Return a folder next to, above or directly below `folder` from which the path leads to a file."""
    try:
        below = sorted(child for child in folder.iterdir() if child.is_dir())
    except OSError:
        below = []
    return next(
        (place for place in (folder.parent, *below) if not Path(name).is_absolute() and _exists(place, name)), None
    )
