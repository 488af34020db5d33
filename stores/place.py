"""Where a store lies, a folder or a prefix of an object store, and what writing and reading need of either.

Nothing else in `stores/` knows which of the two it is. A key is a path inside the store, with `/`; "" is the store itself.
"""

import os
import re
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import zarr
from numpy.typing import NDArray

from switchkd.errors import StoreError
from switchkd.stores import layout

Location = Path | str  # a folder, or the URL of a prefix
Files = dict[str, bytes]  # by their paths inside a store or part
# A file's key, and runs of its bytes: each from its begin up to its end.
Request = tuple[str, Sequence[tuple[int, int]]]
ONE_CALL = 1 << 26  # bytes read at once; a system may return less than was asked for from 2 GiB on
AHEAD = 64  # files of a folder that are open at once
MARKER = "zarr.json"  # a part or a store on an object store is there if its own group's metadata are

T = TypeVar("T")
R = TypeVar("R")


class Place(Protocol):
    """One store's place, there or not yet.

    Raises:
        OSError: from a folder; FileNotFoundError from either.
        RunError: an object store cannot be reached, or refuses; says what to do.
    """

    survives_fork: bool  # else DataLoader workers must be spawned

    @property
    def path(self) -> Location:
        """The folder or URL."""

    def at(self, key: str) -> Location:
        """Return the name of what lies at `key`, for messages."""

    def exists(self) -> bool:
        """Whether anything lies here that keeps a store from being made."""

    def stores(self) -> list[Location]:
        """Return this place if it is a store, else the stores directly inside it, sorted."""

    def read(self, key: str) -> bytes:
        """Return the bytes of one file. Raises FileNotFoundError."""

    def ranges(self, requests: Sequence[Request]) -> Iterator[list[bytes]]:
        """Yield the runs of bytes of one file after another; later files come while the caller has its hands on earlier ones.

        A file of which nothing is wanted need not be there. Raises FileNotFoundError.
        """

    def sizes(self, key: str = "") -> dict[str, int]:
        """Return the bytes of every file below `key`, by its path from there."""

    def parts(self) -> set[str]:
        """Return the names of the committed parts."""

    def has_part(self, part: int) -> bool:
        """Whether a part is committed."""

    def load(self, key: str) -> NDArray[Any]:
        """Return a whole Zarr array."""

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return `function` of every item, in order; several at once where that hides latency."""

    def commit_store(self, files: Files) -> bool:
        """Write a new store and make it visible by one act; False, and nothing changed, if another was first."""

    def commit_part(self, part: int, files: Files) -> bool:
        """Write a part and make it visible by one act; False, and nothing changed, if another was first."""

    def remove_part(self, part: int) -> None:
        """Make a part invisible by one act, then delete it."""

    def sweep(self) -> None:
        """Remove what dead writers of this machine left unfinished; those of other machines may be alive."""


def place_of(path: Location) -> Place:
    """Return the place that a path or URL names; nothing is opened.

    Raises:
        StoreError: a URL that no store can lie at, or the extra `s3` is not installed.
    """
    if "://" in str(path):
        from switchkd.stores.bucket import Bucket

        return Bucket(str(path))
    if re.match(r"(s3a?|gs|az|abfss?):/", str(path)):
        raise StoreError(f"{path} was a URL and lost a slash as a Path: give it as text")
    return Folder(Path(path))


class Folder:
    """A store in a folder: visible by a rename, which fails if another writer's folder is there."""

    survives_fork = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def at(self, key: str) -> Path:
        """Return the path of `key`."""
        return self.path / key

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        return self.path.exists()

    def stores(self) -> list[Location]:
        """Return this folder, or those in it that end in .zarr."""
        if (self.path / MARKER).is_file():
            return [self.path]
        return sorted(file.parent for file in self.path.glob(f"*.zarr/{MARKER}"))

    def read(self, key: str) -> bytes:
        """Return a file's bytes."""
        return (self.path / key).read_bytes()

    def ranges(self, requests: Sequence[Request]) -> Iterator[list[bytes]]:
        """Open files ahead and have the disk fetch their runs meanwhile; a run is shorter where its file ends before."""
        handles: deque[int] = deque()
        coming = (request for request in requests if request[1])
        try:
            for _, spans in requests:
                if not spans:
                    yield []
                    continue
                for key, ahead in islice(coming, AHEAD - len(handles)):
                    # As text: joining paths takes longer than opening the file.
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

    def sizes(self, key: str = "") -> dict[str, int]:
        """Return the size of every file below a folder."""
        folder = self.path / key
        files = (file for file in folder.rglob("*") if file.is_file())
        return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}

    def parts(self) -> set[str]:
        """Return the names in `parts/`."""
        folder = self.path / layout.PARTS
        return {entry.name for entry in folder.iterdir()} if folder.exists() else set()

    def has_part(self, part: int) -> bool:
        """Whether the part's folder is there."""
        return layout.part_path(self.path, part).exists()

    def load(self, key: str) -> NDArray[Any]:
        """Read with zarr."""
        return np.asarray(zarr.open_array(self.path / key, mode="r", zarr_format=3)[...])

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Take one after the other."""
        return [function(item) for item in items]

    def commit_store(self, files: Files) -> bool:
        """Write beside the store, so that the rename stays on one file system."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _staged(self.path.parent, f".{self.path.name}.", files) as folder:
            (folder / layout.WRITING).mkdir()
            return _rename(folder, self.path)

    def commit_part(self, part: int, files: Files) -> bool:
        """Write into `.writing/` and rename."""
        with _staged(self.path / layout.WRITING, "", files, layout.part_name(part)) as folder:
            return _rename(folder, layout.part_path(self.path, part))

    def remove_part(self, part: int) -> None:
        """Move the part out of sight by one rename, then delete it: an interrupted removal leaves no half part."""
        hidden = self.path / layout.WRITING / f"{layout.writer_prefix()}-{layout.part_name(part)}-dropped"
        layout.part_path(self.path, part).rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def sweep(self) -> None:
        """Look beside the store and into `.writing/`."""
        _sweep(self.path.parent, f".{self.path.name}.")
        _sweep(self.path / layout.WRITING, "")


def _together(spans: Sequence[tuple[int, int]]) -> bool:
    """Whether each run of bytes begins where the one before it ends, and all of them are few enough for one call."""
    return spans[-1][1] - spans[0][0] <= ONE_CALL and all(a[1] == b[0] for a, b in pairwise(spans))


def _expect(handle: int, spans: Sequence[tuple[int, int]]) -> None:
    """Have the system read runs of a file's bytes into memory in the background, where it can be asked to."""
    if hasattr(os, "posix_fadvise"):
        for begin, end in [(spans[0][0], spans[-1][1])] if _together(spans) else spans:
            os.posix_fadvise(handle, begin, end - begin, os.POSIX_FADV_WILLNEED)


def _read(handle: int, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return runs of a file's bytes, those that lie together by one call."""
    if not _together(spans):
        return [os.pread(handle, end - begin, begin) for begin, end in spans]
    first, last = spans[0][0], spans[-1][1]
    data = os.pread(handle, last - first, first)
    return [data[begin - first : end - first] for begin, end in spans]


@contextmanager
def _staged(place: Path, prefix: str, files: Files, name: str = "") -> Iterator[Path]:
    """Write files to an unfinished folder, named so that `_sweep` knows whose it is; delete what is there at the end."""
    words = [layout.writer_prefix(), name, uuid.uuid4().hex[:8]]
    folder = place / (prefix + "-".join(filter(None, words)))
    try:
        for key, data in files.items():
            file = folder / key
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(place: Path, prefix: str) -> None:
    """Delete the unfinished folders in `place` that dead processes of this machine made."""
    begin = f"{prefix}{layout.host()}-"
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
    """Force a folder to disk and rename it into place; False if the target was there first."""
    _sync_folder(source)
    committed = True
    try:
        source.rename(target)
    except OSError:
        if not target.exists():  # else a folder that is not empty, which cannot be renamed over: somebody was first
            raise
        committed = False
    _sync(target.parent)
    return committed


def _sync_folder(folder: Path) -> None:
    """Force a folder's files and folders to disk, so that a rename never outlives what it names."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
