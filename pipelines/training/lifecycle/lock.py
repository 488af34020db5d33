"""One run at a time in an output folder: a lock on a file, which the system releases when its process ends, however it ends."""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from switchkd.errors import ConfigError, InUse

LOCK = ".lock"
# What file systems without locks answer (some network and FUSE file systems).
UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG}
log = logging.getLogger(__name__)
_held: set[int] = set()  # descriptors


@contextmanager
def one_run(folder: Path, first: bool) -> Iterator[None]:
    """Hold the lock of an output folder, which is created if need be, and removed again if nothing was written into it.

    The lock of a folder on a network file system excludes runs on other hosts only if that file system passes locks on (NFS
    and Lustre with `flock` do).

    Args:
        first: whether this is the first of the run's processes, the only one that locks.

    Raises:
        InUse: another run holds the lock, named by host and process id. ConfigError: the folder cannot be written.
    """
    if not first:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _lock(folder)
    except OSError as error:
        if error.errno not in UNUSABLE:
            raise
        raise ConfigError(
            f"--output {folder} cannot be written: {error}. Pass another one, or make it writable"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()  # while it is held, so that nobody else can hold the file that is removed
        _held.discard(handle)
        os.close(handle)
        with suppress(OSError):
            for path in made:
                path.rmdir()  # fails if something was written


def _lock(folder: Path) -> int:
    """Return the descriptor of the locked file. Raises InUse if another process holds the lock."""
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                log.warning("%s cannot be locked (%s): take care that no second run writes into it", folder, error)
                break
            os.close(handle)
            if not isinstance(error, BlockingIOError):
                raise
            raise InUse(
                f"{folder} belongs to a run that is still going, {_holder(path)}: wait for its end or stop it, or pass another "
                "--output"
            ) from None
        if _is_at(handle, path):
            break
        os.close(handle)  # its last holder removed it between our two calls
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
    _held.add(handle)
    return handle


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text())
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "whose process is not known"


def _drop_in_child() -> None:
    """Close the descriptors in a forked process: a loader process must not keep the lock when the run has died."""
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)
