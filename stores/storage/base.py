"""Defines the storage interface that reading and writing a store need, for folders and for prefixes of an object store.

No other module of `stores/` depends on the kind of storage. A key is a path inside the store, with `/`; "" is the store itself.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from switchkd.settings import StoreLocation

Files = dict[str, bytes]  # by their paths inside a store or part
# A file's key, and byte ranges of it: (begin, end), the end exclusive.
Request = tuple[str, Sequence[tuple[int, int]]]

T = TypeVar("T")
R = TypeVar("R")


class Storage(Protocol):
    """Storage of one store, which may not exist yet: a folder, or a prefix of an object store.

    Raises:
        FileNotFoundError: nothing at a key.
        StoreError: what lies at a key is not a regular file of the store, or far larger than it may be.
        StoreUnreadable: a folder could not be read now. RunError: an object store cannot be reached, or refuses the request. Both
            state the remedy.
        OSError: a folder could not be written.
    """

    survives_fork: bool  # if False, DataLoader workers must be spawned

    @property
    def path(self) -> StoreLocation:
        """The folder or URL."""

    def uri_of(self, key: str) -> StoreLocation:
        """Return the path or URL of `key`, for messages."""

    def exists(self) -> bool:
        """Whether anything exists here that prevents the creation of a store."""

    def stores(self) -> list[StoreLocation]:
        """Return this path if it is a store, else the stores directly inside it, sorted."""

    def read(self, key: str, at_most: int | None = None) -> bytes:
        """Return the bytes of one file. Raises FileNotFoundError; StoreError: it has more than `at_most` bytes."""

    def read_ranges(self, requests: Sequence[Request]) -> Iterator[list[bytes]]:
        """Yield the byte ranges of one file after another; later files are read while the caller processes earlier ones.

        A file with no requested ranges need not exist. Raises FileNotFoundError.
        """

    def file_sizes(self, key: str = "") -> dict[str, int]:
        """Return the size in bytes of every file below `key`, by its path relative to `key`."""

    def parts(self) -> set[str]:
        """Return the names of the committed parts, those whose own zarr.json exists."""

    def has_part(self, part: int) -> bool:
        """Whether a part is committed."""

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return `function` of every item, in order; concurrently if that hides latency."""

    def commit_store(self, files: Files) -> bool:
        """Write a new store and make it visible atomically; return False, without changes, if another writer was first."""

    def commit_part(self, part: int, files: Files) -> bool:
        """Write a part and make it visible atomically; return False, without changes, if another writer was first."""

    def remove_part(self, part: int) -> None:
        """Make a part invisible atomically, then delete it."""

    def remove_stale(self) -> None:
        """Remove unfinished data of dead writers on this machine; writers on other machines may still be running."""
