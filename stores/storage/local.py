"""Stores in a folder of a file system: data is written to a temporary folder, synced to disk and renamed.

Files are opened only if they are regular files below the folder and no link leads to them. A failure of the system while reading is
StoreUnreadable, and never taken for a missing or damaged file.
"""

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path

from switchkd.settings import StoreLocation
from switchkd.stores.storage import paths, staging
from switchkd.stores.storage.base import Files, R, Request, T
from switchkd.stores.storage.failures import failure, not_regular, too_large
from switchkd.stores.storage.paths import MARKER

ONE_CALL = 1 << 26  # bytes read at once; some systems return less than requested from 2 GiB on

AHEAD = 64  # files of a folder that are open at once
# Without O_NONBLOCK, opening a pipe waits for its writer.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)


class LocalStorage:
    """Storage in a folder: a rename makes data visible, and fails if another writer's folder exists."""

    survives_fork = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def uri_of(self, key: str) -> Path:
        """Return the path of `key`."""
        return self.path / key

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        return _mode(self.path) is not None

    def stores(self) -> list[StoreLocation]:
        """Return this folder, or those in it that end in .zarr."""
        if _has_marker(self.path):
            return [self.path]
        with _reading(self.path):
            try:
                names = [name for name in os.listdir(self.path) if name.endswith(".zarr")]
            except (FileNotFoundError, NotADirectoryError):
                return []
        return sorted(self.path / name for name in names if _has_marker(self.path / name))

    def read(self, key: str, at_most: int | None = None) -> bytes:
        """Return a file's bytes."""
        path = self.path / key
        with _reading(path):
            self._refuse_links(key)
            handle = os.open(path, _FLAGS)
            try:
                size = os.fstat(handle).st_size
                if at_most is not None and size > at_most:
                    raise too_large(path, size, at_most)
                # One byte more than its size, so that the end of the file is seen; a file may grow while it is read.
                return _pread(handle, size + 1, 0)
            finally:
                os.close(handle)

    def read_ranges(self, requests: Sequence[Request]) -> Iterator[list[bytes]]:
        """Open files ahead and prefetch their byte ranges; a range is shorter if its file ends before it does."""
        handles: deque[int] = deque()
        coming = (request for request in requests if request[1])
        key = ""
        try:
            for wanted, spans in requests:
                if not spans:
                    yield []
                    continue
                try:
                    for key, ahead in islice(coming, AHEAD - len(handles)):
                        # The path is built as a string, since joining `Path` objects takes longer than opening the file.
                        handles.append(os.open(f"{self.path}/{key}", _FLAGS))
                        _expect(handles[-1], ahead)
                    key = wanted
                    handle = handles.popleft()
                    try:
                        found = _read(handle, spans)
                    finally:
                        os.close(handle)
                except FileNotFoundError:
                    raise
                except (OSError, MemoryError) as error:
                    raise failure(self.path / key, error) from error
                yield found
        finally:
            for handle in handles:
                os.close(handle)

    def file_sizes(self, key: str = "") -> dict[str, int]:
        """Return the size of every regular file below a folder; links are not followed."""
        folder = self.path / key
        found: dict[str, int] = {}
        pending = [""]
        with _reading(folder):
            while pending:
                prefix = pending.pop()
                try:
                    entries = list(os.scandir(f"{folder}/{prefix}"))
                except FileNotFoundError:  # it was removed meanwhile, as unfinished parts are
                    continue
                for entry in entries:
                    name = f"{prefix}{entry.name}"
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{name}/")
                    elif entry.is_file(follow_symlinks=False):
                        try:
                            found[name] = entry.stat(follow_symlinks=False).st_size
                        except FileNotFoundError:
                            continue
        return found

    def parts(self) -> set[str]:
        """Return the names in `parts/` whose folders have their zarr.json, the file that is written last."""
        folder = self.path / paths.PARTS
        with _reading(folder):
            try:
                names = os.listdir(folder)
            except FileNotFoundError:
                return set()
        return {name for name in names if name != MARKER and _has_marker(folder / name)}

    def has_part(self, part: int) -> bool:
        """Whether the part's folder exists and has its zarr.json."""
        return _has_marker(paths.part_path(self.path, part))

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Process the items one by one."""
        return [function(item) for item in items]

    def commit_store(self, files: Files) -> bool:
        """Write to a folder next to the store's path, so that the rename stays on one file system."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with staging.staged(self.path.parent, f".{self.path.name}.", files) as folder:
            os.mkdir(folder / paths.WRITING)
            return staging.commit(folder, self.path, files)

    def commit_part(self, part: int, files: Files) -> bool:
        """Write into `.writing/` and rename."""
        target = paths.part_path(self.path, part)
        with staging.staged(self.path / paths.WRITING, "", files, paths.part_name(part)) as folder:
            if staging.commit(folder, target, files):
                return True
            if _has_marker(target):
                return False
            # What is there is not a part: it is moved away, unless another writer has replaced it by a part meanwhile.
            with self._moved_away(part) as moved:
                if _has_marker(moved):
                    staging.commit(moved, target, {})
                    return False
            return staging.commit(folder, target, files)

    def remove_part(self, part: int) -> None:
        """Make the part invisible by one rename, then delete it: an interrupted removal leaves no incomplete part."""
        with self._moved_away(part):
            pass

    def remove_stale(self) -> None:
        """Remove unfinished folders next to the store's path and in `.writing/`."""
        staging.remove_stale(self.path.parent, f".{self.path.name}.")
        staging.remove_stale(self.path / paths.WRITING, "")

    @contextmanager
    def _moved_away(self, part: int) -> Iterator[Path]:
        """Rename a part's folder to one in `.writing/`, which is deleted at the end if it is still there."""
        moved = self.path / paths.WRITING / staging.unfinished_name(f"{paths.part_name(part)}-dropped")
        moved.parent.mkdir(exist_ok=True)
        os.rename(paths.part_path(self.path, part), moved)
        try:
            yield moved
        finally:
            staging.delete(moved)

    def _refuse_links(self, key: str) -> None:
        """Raise StoreError unless `key` is a regular file and none of the folders on the way to it, inside the store, is a link."""
        path = str(self.path)
        if stat.S_ISREG(os.stat(path).st_mode):
            raise FileNotFoundError(errno.ENOENT, "it is a file and not a folder", path)
        *folders, file = key.split("/")
        for folder in folders:
            path = f"{path}/{folder}"
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise not_regular(path)
        if not stat.S_ISREG(os.lstat(f"{path}/{file}").st_mode):
            raise not_regular(f"{path}/{file}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Convert an error of the system; see `failure`."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, MemoryError) as error:
        raise failure(getattr(error, "filename", None) or path, error) from error


def _mode(path: Path) -> int | None:
    """Return the kind of what lies at a path, following links; None if nothing does.

    `Path.exists` and `Path.is_file` take every failure for an absent file, in newer versions of Python.
    """
    with _reading(path):
        try:
            return os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None


def _has_marker(folder: Path) -> bool:
    return _mode(folder / MARKER) is not None


def _together(spans: Sequence[tuple[int, int]]) -> bool:
    """Whether the byte ranges are contiguous and small enough in total for one call."""
    return spans[-1][1] - spans[0][0] <= ONE_CALL and all(a[1] == b[0] for a, b in pairwise(spans))


def _expect(handle: int, spans: Sequence[tuple[int, int]]) -> None:
    """Ask the system, if it supports this, to prefetch byte ranges of a file in the background."""
    if hasattr(os, "posix_fadvise"):
        for begin, end in [(spans[0][0], spans[-1][1])] if _together(spans) else spans:
            os.posix_fadvise(handle, begin, end - begin, os.POSIX_FADV_WILLNEED)


def _read(handle: int, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return byte ranges of a file; contiguous ranges are read by one call."""
    if not _together(spans):
        return [_pread(handle, end - begin, begin) for begin, end in spans]
    first, last = spans[0][0], spans[-1][1]
    data = _pread(handle, last - first, first)
    return [data[begin - first : end - first] for begin, end in spans]


def _pread(handle: int, size: int, begin: int) -> bytes:
    """Return `size` bytes from `begin` on, less only at the file's end: a single call may return less before it."""
    data = os.pread(handle, min(size, ONE_CALL), begin)
    if len(data) == size or not data:
        return data
    pieces, done = [data], len(data)
    while done < size and (data := os.pread(handle, min(size - done, ONE_CALL), begin + done)):
        pieces.append(data)
        done += len(data)
    return b"".join(pieces)
