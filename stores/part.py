"""Opens committed parts and reads chunks of their arrays; an error names the damaged file and the remedy."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.counting import counted
from switchkd.errors import RunError, StoreError
from switchkd.stores import layout
from switchkd.stores.checks import METADATA_BYTES, attribute
from switchkd.stores.manifest import Manifest
from switchkd.stores.record import NotThePart, array_form, check_record
from switchkd.stores.shards import Shard
from switchkd.stores.storage import paths
from switchkd.stores.storage.base import Storage
from switchkd.stores.storage.failures import unreadable
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
    tokens: NDArray[np.uint32] | None  # [n], image tokens included; None if the part does not record them

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
        StoreUnreadable: its files could not be read now, or memory ran out. RunError: an object store cannot be reached.
    """
    if not storage.has_part(number):
        raise StoreError(f"{storage.path} has no part {number}; run the same `switchkd cache-teacher` command again")
    key = paths.part_key(number)
    try:
        return _open(storage, manifest, number, tables_digest, position_arrays)
    except MemoryError as error:
        raise unreadable(storage.uri_of(key), error) from error


def read_record(storage: Storage, manifest: Manifest, number: int) -> dict[str, Any]:
    """Return a part's own record, checked as far as this is possible without its files and the store's tables.

    Raises:
        StoreError: it is damaged, or of another part or store. StoreUnreadable, RunError: as `open_part`.
    """
    key = paths.part_key(number)
    where = storage.uri_of(key)
    samples = len(manifest.part_samples(number))
    try:
        entry = check_record(
            attribute(storage.read(f"{key}/{MARKER}", METADATA_BYTES), layout.PART_KEY), number, manifest
        )
    except StoreError:
        raise
    except FileNotFoundError as error:
        raise StoreError(f"cannot open {where}: {error}; {DAMAGED_PART_ADVICE}") from error
    except NotThePart:
        raise StoreError(
            f"{where} is not part {number} of this store ({counted(samples, 'sample')}); {DAMAGED_PART_ADVICE}"
        ) from None
    except ValueError as error:
        raise StoreError(f"{where}/{MARKER}: {error}; {DAMAGED_PART_ADVICE}") from error
    if entry["store"] != manifest.identity:
        raise StoreError(f"{where} was written for another store; {DAMAGED_PART_ADVICE}")
    return entry


def _open(
    storage: Storage, manifest: Manifest, number: int, tables_digest: str, position_arrays: Sequence[str]
) -> Part:
    entry, key = read_record(storage, manifest, number), paths.part_key(number)
    where = storage.uri_of(key)
    if entry.get("tables", tables_digest) != tables_digest:
        raise OtherTables(
            f"{where} was encoded with other tables than the store's ({layout.ID_OF_RANK}, {layout.STEP}, {layout.MEAN}), so its "
            "integers have no meaning; restore the tables, or delete the part and run the same command again"
        )
    arrays, tables = _arrays(storage, manifest, key, entry, position_arrays)
    offset, status, digest = (tables[name] for name in _TABLES)
    for name, array in arrays.items():
        if len(array) != offset[-1]:
            raise StoreError(
                f"{where}: {name} has {counted(len(array), 'position')}, its samples have {offset[-1]}; {DAMAGED_PART_ADVICE}"
            )
    for problem in _table_problems(manifest, offset, status):
        raise StoreError(f"{where}: {problem}; {DAMAGED_PART_ADVICE}")
    return Part(arrays, entry, offset, status, digest, tables.get(layout.TOKENS))


def read_whole(storage: Storage, arrays: Sequence[Shard]) -> list[NDArray[Any]]:
    """Return all rows of several arrays. Raises as `read_chunks` does."""
    found = read_chunks(storage, [(array, range(array.chunk_count)) for array in arrays])
    return [np.concatenate(chunks)[: len(array)] for array, chunks in zip(arrays, found, strict=True)]


def read_chunks(storage: Storage, wanted: Sequence[tuple[Shard, Sequence[int]]]) -> Iterator[list[NDArray[Any]]]:
    """Yield the wanted chunks, each [chunk_rows, …], array by array. Their numbers must ascend; all are requested at once.

    Raises:
        StoreError: a file is damaged or missing.
        StoreUnreadable: a file could not be read now, or memory ran out. RunError: an object store cannot be reached.
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
    except RunError:  # what could not be read now, or not be reached
        raise
    except (OSError, MemoryError) as error:
        where: Any = getattr(error, "filename", None) or (storage.path if array is None else storage.uri_of(array.key))
        if isinstance(error, FileNotFoundError):
            # A folder's files are opened ahead, so only the error itself gives the name of a missing one.
            raise StoreError(f"{where}: {error}; {DAMAGED_PART_ADVICE}") from error
        raise unreadable(where, error) from error
    # Codecs report damaged bytes by different exceptions (PCodec and Zstd by any type), and nothing else can fail here.
    except Exception as error:
        where = storage.path if array is None else storage.uri_of(array.key)
        raise StoreError(f"{where}: {error}; {DAMAGED_PART_ADVICE}") from error


def _arrays(
    storage: Storage, manifest: Manifest, part_key: str, entry: dict[str, Any], position_arrays: Sequence[str]
) -> tuple[dict[str, Shard], dict[str, NDArray[Any]]]:
    """Check a part's files; open its position arrays and read its tables."""
    listed: dict[str, dict[str, Any]] = entry["files"]
    # A missing shard reads as fill values without an error, so the files are checked first.
    sizes = storage.file_sizes(part_key)
    for name, expected in listed.items():
        if sizes.get(name) != expected["bytes"]:
            found = f"{sizes[name]} bytes" if name in sizes else "nothing"
            where = storage.uri_of(f"{part_key}/{name}")
            raise StoreError(f"{where} should have {expected['bytes']} bytes, found {found}; {DAMAGED_PART_ADVICE}")
    # Metadata files have no checksums of their own: a flipped bit may give another fill value or shape.
    described = _as_listed(storage, part_key, listed, [n for n in listed if n.rpartition("/")[2] == MARKER])
    files = {f"{part_key}/{name}": sizes[name] for name in listed}
    arrays = {}
    named = (*_TABLES, layout.TOKENS) if f"{layout.TOKENS}/{MARKER}" in described else _TABLES
    for name in (*named, *position_arrays):
        if f"{name}/{MARKER}" not in described:
            raise StoreError(f"{storage.uri_of(part_key)} has no array {name}; {DAMAGED_PART_ADVICE}")
        try:
            arrays[name] = _shard(part_key, name, described[f"{name}/{MARKER}"], files, listed)
            if (file := arrays[name].file.removeprefix(f"{part_key}/")) in sizes and file not in listed:
                raise ValueError(f"its list lacks {file}, which is there")  # else it would read as fill values
            _check_form(name, arrays[name], array_form(name, manifest, entry["samples"], entry["positions"]))
        except ValueError as error:
            raise StoreError(f"{storage.uri_of(part_key)}: {error}; {DAMAGED_PART_ADVICE}") from error
    arrays[layout.STATS].dense = entry["positions"] > 0  # a knee is never 0
    if entry["positions"] and arrays[layout.STATS].file not in files:
        raise StoreError(f"{storage.uri_of(part_key)} has positions without statistics; {DAMAGED_PART_ADVICE}")
    tables = {name: arrays.pop(name) for name in named}
    # These are small and say where everything else is, so they are bound to the part by their digests, as the metadata are.
    written = {name: array.file.removeprefix(f"{part_key}/") for name, array in tables.items() if array.file in files}
    contents = _as_listed(storage, part_key, listed, list(written.values()))
    found_tables = {}
    for name, array in tables.items():
        try:
            found_tables[name] = array.whole(contents[written[name]] if name in written else None)
        except MemoryError:
            raise
        except Exception as error:  # see `read_chunks`
            raise StoreError(f"{storage.uri_of(array.key)}: {error}; {DAMAGED_PART_ADVICE}") from error
    return arrays, found_tables


def _as_listed(storage: Storage, part_key: str, listed: dict[str, Any], names: list[str]) -> dict[str, bytes]:
    """Read files, whose digests must be those that the part lists."""
    keys = [f"{part_key}/{name}" for name in names]
    try:
        contents = storage.map(lambda key: storage.read(key, 2 * METADATA_BYTES * len(_TABLES)), keys)
    except FileNotFoundError as error:  # it was there when the files were listed
        raise StoreError(f"{storage.uri_of(part_key)}: {error}; {DAMAGED_PART_ADVICE}") from error
    for name, content in zip(names, contents, strict=True):
        if layout.digest_bytes(content) != listed[name]["blake2b"]:
            raise StoreError(f"{storage.uri_of(f'{part_key}/{name}')} is not what was written; {DAMAGED_PART_ADVICE}")
    return dict(zip(names, contents, strict=True))


def _shard(part_key: str, name: str, metadata: bytes, sizes: dict[str, int], listed: dict[str, Any]) -> Shard:
    shard = Shard(f"{part_key}/{name}", metadata, sizes)
    about = listed.get(shard.file.removeprefix(f"{part_key}/"), {})
    shard.bind(about.get("crc32c"))
    return shard


def _check_form(name: str, array: Shard, form: tuple[tuple[int, ...], tuple[np.dtype[Any], ...]]) -> None:
    """Raise ValueError unless an array has the shape and type that the manifest and the part's record give it."""
    shape, dtypes = form
    if array.shape != shape or array.dtype not in dtypes:
        types = " or ".join(map(str, dtypes))
        raise ValueError(f"{name} should be {list(shape)} {types}, found {list(array.shape)} {array.dtype}")


def _table_problems(manifest: Manifest, offset: NDArray[np.int64], status: NDArray[np.uint8]) -> Iterator[str]:
    """Yield what is wrong with the tables of a part, whose offsets end with its number of positions."""
    # Compared and not subtracted: a difference may overflow.
    if offset[0] != 0 or (offset[1:] < offset[:-1]).any():
        yield "samples/offset does not rise from 0"
    counts = np.diff(offset)
    if (counts > manifest.max_length).any():
        yield f"a sample has {counts.max()} positions, more than {manifest.max_length} tokens"
    if ((counts > 0) & (status != 0)).any():
        yield "a skipped sample has positions"
    if unknown := sorted({int(code) for code in status} - {int(code) for code in manifest.statuses}):
        yield f"samples/status holds unknown codes {unknown}"
