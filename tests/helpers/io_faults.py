"""Fails the n-th file system call below a folder, once or from then on, to see what a reader or writer makes of it."""

import errno
import os
from contextlib import contextmanager
from pathlib import Path

# By path, and by the handle of a file that was opened below the folder.
BY_PATH = ("open", "stat", "lstat", "listdir", "scandir", "mkdir", "rename")
BY_HANDLE = ("pread", "read", "write", "fsync", "fstat")
READ_ERRORS = tuple(
    getattr(errno, name) for name in ("EIO", "ESTALE", "EACCES", "EMFILE", "ENOMEM", "EINTR", "ETIMEDOUT")
)
WRITE_ERRORS = (*READ_ERRORS, errno.ENOSPC, errno.EROFS, errno.EDQUOT)


class Faults:
    """Counts calls, and raises `error` (an errno, or MemoryError) in the n-th; with `lasting`, in all from the n-th on."""

    def __init__(self, below: Path, n: int | None = None, error=errno.EIO, lasting: bool = False) -> None:
        self.below, self.n, self.error, self.lasting = str(below), n, error, lasting
        self.calls: list[str] = []
        self._handles: set[int] = set()

    def _count(self, name: str, where) -> None:
        self.calls.append(name)
        if self.n is not None and (len(self.calls) == self.n or (self.lasting and len(self.calls) > self.n)):
            if self.error is MemoryError:
                raise MemoryError
            raise OSError(self.error, os.strerror(self.error), where if isinstance(where, str) else None)

    def _by_path(self, name, real):
        def call(path=".", *arguments, **options):
            if "dir_fd" in options or isinstance(path, int) or not os.fspath(path).startswith(self.below):
                return real(path, *arguments, **options)
            self._count(name, os.fspath(path))
            done = real(path, *arguments, **options)
            if name == "open":
                self._handles.add(done)
            return done

        return call

    def _by_handle(self, name, real):
        def call(handle, *arguments, **options):
            if handle in self._handles:
                self._count(name, handle)
            return real(handle, *arguments, **options)

        return call

    @contextmanager
    def active(self):
        real = {name: getattr(os, name) for name in (*BY_PATH, *BY_HANDLE, "close")}

        def close(handle):
            self._handles.discard(handle)
            real["close"](handle)

        try:
            for name in BY_PATH:
                setattr(os, name, self._by_path(name, real[name]))
            for name in BY_HANDLE:
                setattr(os, name, self._by_handle(name, real[name]))
            os.close = close
            yield self
        finally:
            for name, function in real.items():
                setattr(os, name, function)


def count(below: Path, act) -> int:
    """How many calls an undisturbed act makes."""
    with Faults(below).active() as counted:
        act()
    return len(counted.calls)
