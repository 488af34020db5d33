"""Tells two failures of reading apart: what could not be read now, and what is not the file that was written."""

import errno

from switchkd.errors import StoreError, StoreUnreadable

# Errors that say what lies at a path, and not that reading failed: another look finds the same.
_ABOUT_THE_PATH = (errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG)


def unreadable(where: object, error: BaseException) -> StoreUnreadable:
    """Return the error for a file that could not be read; its advice is never to delete anything."""
    if isinstance(error, MemoryError):
        reason = f"not enough memory{f' ({error})' if str(error) else ''}"
        remedy = "free memory, or use fewer --workers,"
    else:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        remedy = "check the disk, its mount, permissions and limits,"
    return StoreUnreadable(
        f"{where} could not be read: {reason}. Nothing says that it is damaged: {remedy} and run the same command again"
    )


def not_regular(where: object) -> StoreError:
    """Return the error for a link, a folder or a special file in the place of a file."""
    return StoreError(
        f"{where} is, or lies behind, a link, a folder, a pipe or a device; a store is read from regular files in its own folders "
        "only: put the file itself in its place"
    )


def too_large(where: object, size: int, at_most: int) -> StoreError:
    """Return the error for a file that is far larger than what a writer makes, before it is read into memory."""
    return StoreError(
        f"{where} has {size:,} bytes, expected at most {at_most:,}: it is not what was written; restore it"
    )


def failure(where: object, error: OSError | MemoryError) -> StoreError | StoreUnreadable:
    """Return StoreError for what is not a file, else StoreUnreadable. Not for FileNotFoundError, which means damage."""
    return not_regular(where) if getattr(error, "errno", None) in _ABOUT_THE_PATH else unreadable(where, error)
