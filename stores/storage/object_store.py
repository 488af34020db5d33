"""Stores on an object store (S3, GCS, Azure) through obstore: one object, written last, makes data visible.

A part's objects are uploaded one by one and its own zarr.json last, with `create`, which succeeds only once. That object is the
marker: a prefix without it is not a part, even if it has other objects. The store's own zarr.json is the store's marker.
Credentials and endpoint come from the environment, as obstore reads it: AWS_ENDPOINT_URL, AWS_REGION, AWS_ALLOW_HTTP, ….
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from switchkd.errors import RunError, StoreError
from switchkd.settings import StoreLocation
from switchkd.stores.storage import paths
from switchkd.stores.storage.base import Files, Request
from switchkd.stores.storage.failures import too_large
from switchkd.stores.storage.paths import MARKER

try:
    import obstore
    from obstore.exceptions import AlreadyExistsError, BaseError
    from obstore.store import from_url
except ImportError:
    raise StoreError("a store at a URL needs obstore: pip install 'switchkd[s3]'") from None

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
AT_ONCE = 8  # concurrent requests; each has a latency of tens of milliseconds

T = TypeVar("T")
R = TypeVar("R")


class ObjectStorage:
    """A prefix of a bucket.

    Args:
        url: `s3://BUCKET/PREFIX`, or another of `SCHEMES`.

    Raises:
        StoreError: obstore cannot parse the URL.
    """

    survives_fork = False

    def __init__(self, url: str) -> None:
        self.path: StoreLocation = url.rstrip("/")
        if url.split("://")[0] not in SCHEMES:
            raise StoreError(f"{url}: a store lies in a folder or at {', '.join(f'{name}://' for name in SCHEMES)}")
        try:
            self._store = from_url(str(self.path))
        except (BaseError, ValueError) as error:
            raise StoreError(f"{url} cannot be used: {_first_line(error)}") from error

    def uri_of(self, key: str) -> str:
        """Return the URL of `key`."""
        return f"{self.path}/{key}" if key else str(self.path)

    def exists(self) -> bool:
        """Whether a store's marker exists; other objects below the prefix are ignored and kept."""
        return self._has(MARKER)

    def stores(self) -> list[StoreLocation]:
        """Return this prefix, or those directly below it that end in .zarr."""
        if self.exists():
            return [self.path]
        with self.reaching():
            below = obstore.list_with_delimiter(self._store)["common_prefixes"]
        names = sorted(name for name in below if name.endswith(".zarr"))
        there = self.map(lambda name: self._has(f"{name}/{MARKER}"), names)
        return [self.uri_of(name) for name, is_store in zip(names, there, strict=True) if is_store]

    def read(self, key: str, at_most: int | None = None) -> bytes:
        """Return an object's bytes."""
        with self.reaching(key):
            found = obstore.get(self._store, key)
            if at_most is not None and found.meta["size"] > at_most:
                raise too_large(self.uri_of(key), found.meta["size"], at_most)
            return bytes(found.bytes())

    def read_ranges(self, requests: Sequence[Request]) -> Iterator[list[bytes]]:
        """Request several objects at once; close byte ranges of an object are merged into one request."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            yield from pool.map(self._ranges_of, requests)

    def file_sizes(self, key: str = "") -> dict[str, int]:
        """Return the size of every object below `key`, from one listing."""
        begin = f"{key}/" if key else ""
        with self.reaching(key):
            found = [meta for chunk in obstore.list(self._store, begin or None) for meta in chunk]
        return {meta["path"].removeprefix(begin): meta["size"] for meta in found}

    def parts(self) -> set[str]:
        """Return the names of the parts whose marker exists, from one listing."""
        split = (name.split("/") for name in self.file_sizes(paths.PARTS))
        return {words[0] for words in split if len(words) == 2 and words[1] == MARKER}

    def has_part(self, part: int) -> bool:
        """Whether a part's marker exists."""
        return self._has(f"{paths.part_key(part)}/{MARKER}")

    @contextmanager
    def reaching(self, key: str = "") -> Iterator[None]:
        """Convert obstore's errors to those of switchkd. Raises FileNotFoundError: no object at `key`. RunError: all else."""
        _refuse_fork(self.uri_of(key))
        try:
            yield
        except FileNotFoundError:
            raise FileNotFoundError(f"nothing at {self.uri_of(key)}: no such object or bucket") from None
        except BaseError as error:
            raise RunError(
                f"cannot reach {self.uri_of(key)}: {_first_line(error)}. Check network, endpoint and credentials (http needs "
                "AWS_ALLOW_HTTP=true) and run the same command again; what is committed is whole"
            ) from error

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Process several items concurrently."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(function, items))

    def commit_store(self, files: Files) -> bool:
        """Upload a store without parts, its marker last.

        Two writers may create the store at the same time with different rank tables. The table is one object that is never
        overwritten, so both of them, and every later writer, read the table that was uploaded first.
        """
        for name in sorted(files.keys() - {MARKER}):
            self._create(name, files[name])
        return self._create(MARKER, files[MARKER])

    def commit_part(self, part: int, files: Files) -> bool:
        """Upload a part, its marker last.

        Two writers of one part, which run the same teacher on the same samples, write the same bytes to the same keys, so
        concurrent uploads are harmless. Objects that a dead writer left without a marker are overwritten.
        """
        key, names = paths.part_key(part), sorted(files.keys() - {MARKER})
        there = self.file_sizes(key)
        if MARKER in there:
            return False
        self._delete(f"{key}/{name}" for name in there.keys() - set(names))
        if not all(self.map(lambda name: self._upload(f"{key}/{name}", files[name], part), names)):
            return False
        return self._create(f"{key}/{MARKER}", files[MARKER])

    def remove_part(self, part: int) -> None:
        """Delete the marker, then the rest."""
        key = paths.part_key(part)
        self._delete([f"{key}/{MARKER}"])
        self._delete(f"{key}/{name}" for name in self.file_sizes(key))

    def remove_stale(self) -> None:
        """Do nothing: objects without a marker may belong to a running writer, and the next commit clears them."""

    def _ranges_of(self, request: Request) -> list[bytes]:
        key, spans = request
        if not spans:
            return []
        starts, ends = zip(*spans, strict=True)
        with self.reaching(key):
            return [bytes(data) for data in obstore.get_ranges(self._store, key, starts=starts, ends=ends)]

    def _has(self, key: str) -> bool:
        try:
            with self.reaching(key):
                obstore.head(self._store, key)
        except FileNotFoundError:
            return False
        return True

    def _create(self, key: str, data: bytes) -> bool:
        """Upload to a key that must not exist; return False, without changes, if it does.

        A retry inside obstore may find the object that its first attempt created. The object then has the same bytes, so returning
        False is harmless.
        """
        with self.reaching(key):
            try:
                obstore.put(self._store, key, data, mode="create")
            except AlreadyExistsError:
                return False
        return True

    def _upload(self, key: str, data: bytes, part: int) -> bool:
        """Upload a file of an uncommitted part; False if the part has been committed meanwhile."""
        if self._create(key, data):
            return True
        if self.has_part(part):
            return False
        with self.reaching(key):
            obstore.put(self._store, key, data)
        return True

    def _delete(self, keys: Iterable[str]) -> None:
        names = list(keys)
        with self.reaching():
            if names:
                obstore.delete(self._store, names)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(": ")


# obstore's threads do not survive a fork: the child process would wait forever, and may block the parent.
_FORKED = False


def _mark_forked() -> None:
    global _FORKED
    _FORKED = True


os.register_at_fork(after_in_child=_mark_forked)


def _refuse_fork(where: str) -> None:
    if _FORKED:
        raise RunError(
            f"{where} cannot be read in a forked process: start workers with spawn, "
            "as in DataLoader(…, multiprocessing_context='spawn')"
        )
