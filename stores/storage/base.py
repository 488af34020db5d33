"""Where a store lies, a folder or a prefix of an object store, and what writing and reading need of either.

Nothing else in `stores/` knows which of the two it is. A key is a path inside the store, with `/`; "" is the store itself.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from switchkd.settings import StoreLocation

Files = dict[str, bytes]  # by their paths inside a store or part
# A file's key, and runs of its bytes: each from its begin up to its end.
Request = tuple[str, Sequence[tuple[int, int]]]

T = TypeVar("T")
R = TypeVar("R")


class Storage(Protocol):
    """What holds one store, there or not yet: a folder, or a prefix of an object store.

    Raises:
        OSError: from a folder; FileNotFoundError from either.
        RunError: an object store cannot be reached, or refuses; says what to do.
    """

    survives_fork: bool  # else DataLoader workers must be spawned

    @property
    def path(self) -> StoreLocation:
        """The folder or URL."""

    def uri_of(self, key: str) -> StoreLocation:
        """Return the name of what lies at `key`, for messages."""

    def exists(self) -> bool:
        """Whether anything lies here that keeps a store from being made."""

    def stores(self) -> list[StoreLocation]:
        """Return this path if it is a store, else the stores directly inside it, sorted."""

    def read(self, key: str) -> bytes:
        """Return the bytes of one file. Raises FileNotFoundError."""

    def read_ranges(self, requests: Sequence[Request]) -> Iterator[list[bytes]]:
        """Yield the runs of bytes of one file after another; later files come while the caller has its hands on earlier ones.

        A file of which nothing is wanted need not be there. Raises FileNotFoundError.
        """

    def file_sizes(self, key: str = "") -> dict[str, int]:
        """Return the bytes of every file below `key`, by its path from there."""

    def parts(self) -> set[str]:
        """Return the names of the committed parts."""

    def has_part(self, part: int) -> bool:
        """Whether a part is committed."""

    def read_array(self, key: str) -> NDArray[Any]:
        """Return a whole Zarr array."""

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return `function` of every item, in order; several at once where that hides latency."""

    def commit_store(self, files: Files) -> bool:
        """Write a new store and make it visible by one act; False, and nothing changed, if another was first."""

    def commit_part(self, part: int, files: Files) -> bool:
        """Write a part and make it visible by one act; False, and nothing changed, if another was first."""

    def remove_part(self, part: int) -> None:
        """Make a part invisible by one act, then delete it."""

    def remove_stale(self) -> None:
        """Remove what dead writers of this machine left unfinished; those of other machines may be alive."""
