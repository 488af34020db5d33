"""Stores in a folder of a file system: data is written to a temporary folder, synced to disk and renamed."""

import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from switchkd.settings import StoreLocation
from switchkd.stores.storage import paths
from switchkd.stores.storage.base import Files, R, Request, T
from switchkd.stores.storage.paths import MARKER

ONE_CALL = 1 << 26  # bytes read at once; some systems return less than requested from 2 GiB on

AHEAD = 64  # files of a folder that are open at once


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
        return self.path.exists()

    def stores(self) -> list[StoreLocation]:
        """Return this folder, or those in it that end in .zarr."""
        if (self.path / MARKER).is_file():
            return [self.path]
        return sorted(file.parent for file in self.path.glob(f"*.zarr/{MARKER}"))

    def read(self, key: str) -> bytes:
        """Return a file's bytes."""
        return (self.path / key).read_bytes()

    def read_ranges(self, requests: Sequence[Request]) -> Iterator[list[bytes]]:
        """Open files ahead and prefetch their byte ranges; a range is shorter if its file ends before it does."""
        handles: deque[int] = deque()
        coming = (request for request in requests if request[1])
        try:
            for _, spans in requests:
                if not spans:
                    yield []
                    continue
                for key, ahead in islice(coming, AHEAD - len(handles)):
                    # The path is built as a string, since joining `Path` objects takes longer than opening the file.
                    handles.append(os.open(f"{self.path}/{key}", os.O_RDONLY))
                    _expect(handles[-1], ahead)
                handle = handles.popleft()
                try:
                    found = _read(handle, spans)
                finally:
                    os.close(handle)
                yield found
        finally:
            for handle in handles:
                os.close(handle)

    def file_sizes(self, key: str = "") -> dict[str, int]:
        """Return the size of every file below a folder."""
        folder = self.path / key
        files = (file for file in folder.rglob("*") if file.is_file())
        return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}

    def parts(self) -> set[str]:
        """Return the names in `parts/`."""
        folder = self.path / paths.PARTS
        return {entry.name for entry in folder.iterdir()} if folder.exists() else set()

    def has_part(self, part: int) -> bool:
        """Whether the part's folder exists."""
        return paths.part_path(self.path, part).exists()

    def read_array(self, key: str) -> NDArray[Any]:
        """Read with zarr."""
        return np.asarray(zarr.open_array(self.path / key, mode="r", zarr_format=3)[...])

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Process the items one by one."""
        return [function(item) for item in items]

    def commit_store(self, files: Files) -> bool:
        """Write to a folder next to the store's path, so that the rename stays on one file system."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _staged(self.path.parent, f".{self.path.name}.", files) as folder:
            (folder / paths.WRITING).mkdir()
            return _rename(folder, self.path)

    def commit_part(self, part: int, files: Files) -> bool:
        """Write into `.writing/` and rename."""
        with _staged(self.path / paths.WRITING, "", files, paths.part_name(part)) as folder:
            return _rename(folder, paths.part_path(self.path, part))

    def remove_part(self, part: int) -> None:
        """Make the part invisible by one rename, then delete it: an interrupted removal leaves no incomplete part."""
        hidden = self.path / paths.WRITING / f"{paths.writer_prefix()}-{paths.part_name(part)}-dropped"
        paths.part_path(self.path, part).rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def remove_stale(self) -> None:
        """Remove unfinished folders next to the store's path and in `.writing/`."""
        _remove_stale(self.path.parent, f".{self.path.name}.")
        _remove_stale(self.path / paths.WRITING, "")


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
        return [os.pread(handle, end - begin, begin) for begin, end in spans]
    first, last = spans[0][0], spans[-1][1]
    data = os.pread(handle, last - first, first)
    return [data[begin - first : end - first] for begin, end in spans]


@contextmanager
def _staged(place: Path, prefix: str, files: Files, name: str = "") -> Iterator[Path]:
    """Write files to an unfinished folder whose name identifies its writer for `_remove_stale`; delete what is left at the end."""
    words = [paths.writer_prefix(), name, uuid.uuid4().hex[:8]]
    folder = place / (prefix + "-".join(filter(None, words)))
    try:
        for key, data in files.items():
            file = folder / key
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(place: Path, prefix: str) -> None:
    """Delete the unfinished folders in `place` that dead processes of this machine created."""
    begin = f"{prefix}{paths.host()}-"
    for leftover in list(place.glob(f"{begin}*")):
        process = leftover.name.removeprefix(begin).split("-")[0]
        if process.isdecimal() and not _is_alive(int(process)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _rename(source: Path, target: Path) -> bool:
    """Sync a folder to disk and rename it to `target`; return False if the target already exists."""
    _sync_folder(source)
    committed = True
    try:
        source.rename(target)
    except OSError:
        if (
            not target.exists()
        ):  # a rename cannot replace a folder that is not empty, so if it exists, another writer was first
            raise
        committed = False
    _sync(target.parent)
    return committed


def _sync_folder(folder: Path) -> None:
    """Sync a folder's files and folders to disk, so that after a crash a renamed folder is never incomplete."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
