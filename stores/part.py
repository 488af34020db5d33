"""Opens committed parts and reads chunks of their arrays; an error names the damaged file and the remedy."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.errors import RunError, StoreError
from switchkd.stores import layout
from switchkd.stores.manifest import Manifest
from switchkd.stores.shards import Shard
from switchkd.stores.storage import paths
from switchkd.stores.storage.base import Storage
from switchkd.stores.storage.paths import MARKER

DAMAGED_PART_ADVICE = (
    "it was damaged after writing: delete its part's folder and run the same `switchkd cache-teacher` command again"
)
_TABLES = (layout.OFFSET, layout.STATUS, layout.DIGEST)


class OtherTables(StoreError):
    """A part and the store's tables do not belong together."""


@dataclass(frozen=True)
class Part:
    """An open part of n samples: its position arrays, which are read by chunks, and its tables in memory."""

    arrays: dict[str, Shard]
    entry: dict[str, Any]  # the part's own record: its files with sizes and digests, its counts
    offset: NDArray[np.int64]  # [n + 1], where each sample's positions begin
    status: NDArray[np.uint8]  # [n]
    digest: NDArray[np.uint64]  # [n, 3]

    @cached_property
    def by_chunk_rows(self) -> dict[int, list[str]]:
        """The names of its arrays, grouped by the number of rows of their chunks."""
        found: dict[int, list[str]] = {}
        for name, array in self.arrays.items():
            found.setdefault(array.chunk_rows, []).append(name)
        return found


def open_part(
    storage: Storage, manifest: Manifest, number: int, tables_digest: str, position_arrays: Sequence[str]
) -> Part:
    """Check a part's files against its own list, and read its tables.

    Args:
        tables_digest: that of the store's tables. position_arrays: names of the arrays to read, of `manifest.position_arrays`.

    Raises:
        StoreError: no such part, a part of another store, or damage. OtherTables: see there.
        RunError: an object store cannot be reached.
    """
    if not storage.has_part(number):
        raise StoreError(f"{storage.path} has no part {number}; run the same `switchkd cache-teacher` command again")
    key = paths.part_key(number)
    entry, where = _entry(storage, key), storage.uri_of(key)
    samples = len(manifest.part_samples(number))
    if not isinstance(entry, dict) or entry.get("part") != number or entry.get("samples") != samples:
        raise StoreError(f"{where} is not part {number} of this store ({samples} samples); {DAMAGED_PART_ADVICE}")
    if entry.get("store") != manifest.identity:
        raise StoreError(f"{where} was written for another store; {DAMAGED_PART_ADVICE}")
    if entry.get("tables", tables_digest) != tables_digest:
        raise OtherTables(
            f"{where} was encoded with other tables than the store's ({layout.ID_OF_RANK}, {layout.STEP}, {layout.MEAN}), so its "
            "integers have no meaning; restore the tables, or delete the part and run the same command again"
        )
    if "files" not in entry:
        raise StoreError(f"{where} does not list its files; {DAMAGED_PART_ADVICE}")
    arrays = _arrays(storage, key, entry["files"], [*_TABLES, *position_arrays])
    offset, status, digest = read_whole(storage, [arrays.pop(name) for name in _TABLES])
    for name, array in arrays.items():
        if len(array) != offset[-1]:
            raise StoreError(
                f"{where}: {name} has {len(array)} positions, its samples have {offset[-1]}; {DAMAGED_PART_ADVICE}"
            )
    return Part(arrays, entry, offset, status, digest)


def read_whole(storage: Storage, arrays: Sequence[Shard]) -> list[NDArray[Any]]:
    """Return all rows of several arrays. Raises as `read_chunks` does."""
    found = read_chunks(storage, [(array, range(array.chunk_count)) for array in arrays])
    return [np.concatenate(chunks)[: len(array)] for array, chunks in zip(arrays, found, strict=True)]


def read_chunks(storage: Storage, wanted: Sequence[tuple[Shard, Sequence[int]]]) -> Iterator[list[NDArray[Any]]]:
    """Yield the wanted chunks, each [chunk_rows, …], array by array. Their numbers must ascend; all are requested at once.

    Raises:
        StoreError: a file is damaged or missing. RunError: an object store cannot be reached.
    """
    array: Shard | None = None
    try:
        # A part's arrays are listed once for each of its samples; each index is requested only once.
        unknown = {array.key: (array, request) for array, _ in wanted if (request := array.index_request()) is not None}
        indexes = storage.read_ranges([request for _, request in unknown.values()])
        for array, _ in unknown.values():
            array.set_index(next(indexes)[0])
        entries, requests = [], []
        for array, numbers in wanted:
            entries.append(array.entries(numbers))
            requests.append(array.request(entries[-1]))
        contents = storage.read_ranges(requests)
        for (array, _), those in zip(wanted, entries, strict=True):
            yield array.chunks(those, next(contents))
    except RunError:
        raise
    # Codecs report damaged bytes by different exceptions (PCodec and Zstd by any type), and nothing else can fail here. A folder's
    # files are opened ahead, so only the error itself gives the name of a missing one.
    except Exception as error:
        where: Any = getattr(error, "filename", None) or (storage.path if array is None else storage.uri_of(array.key))
        raise StoreError(f"{where}: {error}; {DAMAGED_PART_ADVICE}") from error


def _entry(storage: Storage, part_key: str) -> Any:
    try:
        return json.loads(storage.read(f"{part_key}/{MARKER}"))["attributes"].get(layout.PART_KEY)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"cannot open {storage.uri_of(part_key)}: {error}; {DAMAGED_PART_ADVICE}") from error


def _arrays(
    storage: Storage, part_key: str, listed: dict[str, dict[str, Any]], names: Sequence[str]
) -> dict[str, Shard]:
    """Check a part's files and open its arrays."""
    # A missing shard reads as fill values without an error, so the files are checked first.
    sizes = storage.file_sizes(part_key)
    for name, expected in listed.items():
        if sizes.get(name) != expected.get("bytes"):
            found = f"{sizes[name]} bytes" if name in sizes else "nothing"
            where = storage.uri_of(f"{part_key}/{name}")
            raise StoreError(f"{where} should have {expected.get('bytes')} bytes, found {found}; {DAMAGED_PART_ADVICE}")
    # Unlike chunks, metadata files have no checksums of their own: a flipped bit may give another fill value or shape.
    metadata = [name for name in listed if name.rpartition("/")[2] == MARKER]
    contents = storage.map(storage.read, [f"{part_key}/{name}" for name in metadata])
    for name, content in zip(metadata, contents, strict=True):
        if layout.digest_bytes(content) != listed[name].get("blake2b"):
            raise StoreError(f"{storage.uri_of(f'{part_key}/{name}')} is not what was written; {DAMAGED_PART_ADVICE}")
    found_at = {f"{part_key}/{name}": size for name, size in sizes.items()}
    described = dict(zip(metadata, contents, strict=True))
    arrays = {}
    for name in names:
        if f"{name}/{MARKER}" not in described:
            raise StoreError(f"{storage.uri_of(part_key)} has no array {name}; {DAMAGED_PART_ADVICE}")
        try:
            arrays[name] = Shard(f"{part_key}/{name}", described[f"{name}/{MARKER}"], found_at)
        except ValueError as error:
            raise StoreError(f"{storage.uri_of(part_key)}: {error}; {DAMAGED_PART_ADVICE}") from error
    return arrays
