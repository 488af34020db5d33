"""Reading a store: random access by sample, from any process."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from switchkd.errors import RunError, StoreError, StoreMismatch
from switchkd.stores import layout
from switchkd.stores.codec import decode_hidden, decode_topk
from switchkd.stores.manifest import Manifest
from switchkd.stores.payload import Payload, no_position
from switchkd.stores.place import MARKER, Location, place_of
from switchkd.stores.shards import Shard

_REWRITE = (
    "it was damaged after writing: delete its part's folder and run the same `switchkd cache-teacher` command again"
)
_RECREATE = "it was damaged after writing: restore it, or delete the store and cache again"


@dataclass(frozen=True)
class StoredSample:
    """What a store holds of one sample."""

    status: int  # 0: usable
    digest: tuple[int, int, int]  # text, supervised mask, image
    payload: Payload  # read-only arrays; copy before changing them

    @property
    def nbytes(self) -> int:
        """Bytes of its payload in memory."""
        return self.payload.nbytes


@dataclass(frozen=True)
class _Part:
    arrays: dict[str, Shard]
    entry: dict[str, Any]
    offset: NDArray[np.int64]
    status: NDArray[np.uint8]
    digest: NDArray[np.uint64]


class TeacherStore:
    """A store opened for reading: `len(store)`, `store[i]`.

    Keeps up to `cache_bytes` of what was read last: samples, so that reading one again costs nothing, and the chunks that they
    lie in, so that reading their neighbours costs little. May be sent to DataLoader workers, forked or spawned; each opens the
    files anew. On an object store: spawned ones only.

    Args:
        path: the store's folder, or its URL on an object store.

    Raises:
        StoreError: no store at `path`, a newer format, or damage; raised when it is touched, naming the file and what to do.
        RunError: an object store cannot be reached, at any touch.
    """

    def __init__(self, path: Location, cache_bytes: int = 256 << 20) -> None:
        self.place = place_of(path)
        self.path = self.place.path
        self.cache_bytes = cache_bytes
        self.manifest = read_manifest(self.path)
        self.id_of_rank = self._read_rank_table()
        self._ids = self.id_of_rank.astype(np.int32)  # the type that a payload has
        self._parts: dict[int, _Part] = {}
        # Chunks [rows, …] as they are stored by (part, array, number), and samples by index.
        self._cache: LRUCache[Any, Any] = LRUCache(cache_bytes, getsizeof=attrgetter("nbytes"))
        self._nothing = no_position(self.manifest)

    @classmethod
    def open(cls, path: Location) -> "TeacherStore":
        """Open a store, or the only one in a folder (or below a URL) of stores.

        Raises:
            StoreError: nothing there, or several stores (all are named).
        """
        found = _stores_at(path)
        if len(found) > 1:
            raise StoreError(f"{path} holds {len(found)} stores, name one: " + ", ".join(map(str, found)))
        return cls(found[0])

    def __len__(self) -> int:
        return self.manifest.samples

    def __getitem__(self, index: int) -> StoredSample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a store with {len(self)}")
        kept: StoredSample | None = self._cache.get(index)
        if kept is not None:
            return kept
        number, row = divmod(index, self.manifest.part_size)
        part = self._part(number)
        begin, end = int(part.offset[row]), int(part.offset[row + 1])
        text, supervised, image = part.digest[row].tolist()
        payload = self._unpack(number, self._rows(number, begin, end)) if end > begin else self._nothing
        for array in payload.arrays().values():
            array.flags.writeable = False  # every later reader of this sample sees these very arrays
        sample = StoredSample(int(part.status[row]), (text, supervised, image), payload)
        self._keep(index, sample)
        return sample

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "cache_bytes": self.cache_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def parts(self) -> list[int]:
        """Return the numbers of the parts that are there."""
        there = self.place.parts()
        return [part for part in range(self.manifest.part_count) if layout.part_name(part) in there]

    def require_whole(self) -> None:
        """Raise StoreError unless every part is there."""
        there = len(self.parts())
        if there < self.manifest.part_count:
            raise StoreError(
                f"{self.path} holds {there} of {self.manifest.part_count} parts; "
                "run the same `switchkd cache-teacher` command again to finish it"
            )

    def statuses(self) -> NDArray[np.uint8]:
        """Return the status of every sample of a whole store, [samples] uint8."""
        return np.concatenate(self.place.each(self.part_statuses, range(self.manifest.part_count)))

    def part_statuses(self, part: int) -> NDArray[np.uint8]:
        """Return the status of every sample of one part, [n] uint8."""
        return self._part(part).status

    def part_offsets(self, part: int) -> NDArray[np.int64]:
        """Return where each sample's positions of one part begin, [n + 1] int64."""
        return self._part(part).offset

    def part_entry(self, part: int) -> dict[str, Any]:
        """Return what a part says about itself: its files with sizes and digests, its numbers."""
        return self._part(part).entry

    def part_payload(self, part: int) -> Payload:
        """Return the payload of all positions of one part; not cached."""
        arrays, names = self._part(part).arrays, self.manifest.position_arrays
        found = self.place.each(lambda name: self._read_all(arrays[name]), names)
        return self._unpack(part, dict(zip(names, found, strict=True)))

    def part_positions(self, part: int) -> int:
        """Return the number of positions of one part."""
        return int(self._part(part).offset[-1])

    def part_stats(self, part: int) -> NDArray[np.float32]:
        """Return the statistics of all positions of one part, [P, 5]."""
        return np.asarray(self._read_all(self._part(part).arrays[layout.STATS]))

    def _part(self, number: int) -> _Part:
        if number not in self._parts:
            self._parts[number] = self._open_part(number)
        return self._parts[number]

    def _open_part(self, number: int) -> _Part:
        if not self.place.has_part(number):
            raise StoreError(f"{self.path} has no part {number}; run the same `switchkd cache-teacher` command again")
        key = layout.part_key(number)
        entry, where = self._part_entry(key), self.place.at(key)
        samples = len(self.manifest.part_samples(number))
        if not isinstance(entry, dict) or entry.get("part") != number or entry.get("samples") != samples:
            raise StoreError(f"{where} is not part {number} of this store ({samples} samples); {_REWRITE}")
        if entry.get("store") != self.manifest.identity:
            raise StoreError(f"{where} was written for another store; {_REWRITE}")
        if "files" not in entry:
            raise StoreError(f"{where} does not list its files; {_REWRITE}")
        arrays = self._arrays(key, entry["files"])
        offset, status, digest = (
            self._read_all(arrays[name]) for name in (layout.OFFSET, layout.STATUS, layout.DIGEST)
        )
        return _Part(arrays, entry, offset, status, digest)

    def _part_entry(self, part_key: str) -> Any:
        try:
            return json.loads(self.place.read(f"{part_key}/{MARKER}"))["attributes"].get(layout.PART_KEY)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"cannot open {self.place.at(part_key)}: {error}; {_REWRITE}") from error

    def _arrays(self, part_key: str, listed: dict[str, dict[str, Any]]) -> dict[str, Shard]:
        """Check a part's files and open its arrays."""
        # A shard that is not there reads as fill values without an error, so the files are counted first.
        sizes = self.place.sizes(part_key)
        for name, expected in listed.items():
            if sizes.get(name) != expected.get("bytes"):
                found = f"{sizes[name]} bytes" if name in sizes else "nothing"
                where = self.place.at(f"{part_key}/{name}")
                raise StoreError(f"{where} should have {expected.get('bytes')} bytes, found {found}; {_REWRITE}")
        # Chunks have their own checksums, these have none: a flipped bit may give another fill value or shape.
        metadata = [name for name in listed if name.rpartition("/")[2] == MARKER]
        contents = self.place.each(self.place.read, [f"{part_key}/{name}" for name in metadata])
        for name, content in zip(metadata, contents, strict=True):
            if layout.digest_bytes(content) != listed[name].get("blake2b"):
                raise StoreError(f"{self.place.at(f'{part_key}/{name}')} is not what was written; {_REWRITE}")
        found_at = {f"{part_key}/{name}": size for name, size in sizes.items()}
        described = dict(zip(metadata, contents, strict=True))
        arrays = {}
        for name in (layout.OFFSET, layout.STATUS, layout.DIGEST, *self.manifest.position_arrays):
            if f"{name}/{MARKER}" not in described:
                raise StoreError(f"{self.place.at(part_key)} has no array {name}; {_REWRITE}")
            try:
                arrays[name] = Shard(self.place, f"{part_key}/{name}", described[f"{name}/{MARKER}"], found_at)
            except ValueError as error:
                raise StoreError(f"{self.place.at(part_key)}: {error}; {_REWRITE}") from error
        return arrays

    def _rows(self, part: int, begin: int, end: int) -> dict[str, NDArray[Any]]:
        """Return positions begin … end - 1 of a part's arrays as they are stored, from chunks that were kept or are read now."""
        shards = self._part(part).arrays
        numbers = {name: shards[name].chunks_of(begin, end) for name in self.manifest.position_arrays}
        chunks: dict[tuple[str, int], NDArray[Any]] = {}
        wanted: dict[str, list[int]] = {}
        for name, those in numbers.items():
            for at in those:
                kept = self._cache.get((part, name, at))
                if kept is None:
                    wanted.setdefault(name, []).append(at)
                else:
                    chunks[name, at] = kept
        read = self.place.each(lambda name: self._read(shards[name], wanted[name]), wanted)
        for name, arrays in zip(wanted, read, strict=True):
            for at, array in zip(wanted[name], arrays, strict=True):
                chunks[name, at] = array
                self._keep((part, name, at), array)
        rows: dict[str, NDArray[Any]] = {}
        for name, those in numbers.items():
            pieces, size = [chunks[name, at] for at in those], shards[name].chunk_rows
            pieces[-1] = pieces[-1][: end - those[-1] * size]
            pieces[0] = pieces[0][begin - those[0] * size :]
            rows[name] = np.concatenate(pieces)
        return rows

    def _keep(self, key: Any, value: Any) -> None:
        """Put something into the cache, if there is room for it at all."""
        if value.nbytes <= self.cache_bytes:
            self._cache[key] = value

    def _unpack(self, part: int, found: dict[str, NDArray[Any]]) -> Payload:
        """Unpack a run of positions of one part."""
        manifest, stats = self.manifest, found[layout.STATS]
        ids = logits = hidden = None
        if manifest.has_topk:
            packed = found[layout.GAP], found[layout.HEIGHT], found[layout.BOTTOM]
            logsumexp = stats[:, layout.STAT_COLUMNS.index("logsumexp")]
            try:
                ids, logits = decode_topk(*packed, logsumexp, self._ids, manifest.fine, manifest.coarse)
            except ValueError as error:
                raise StoreError(f"{self.place.at(layout.part_key(part))}: {error}; {_REWRITE}") from error
        if manifest.has_hidden:
            hidden = decode_hidden(found[layout.STATE], found.get(layout.SCALE), manifest.hidden_dtype)
        return Payload(stats, ids, logits, hidden)

    def _read_rank_table(self) -> NDArray[np.uint32]:
        try:
            table: NDArray[np.uint32] = self.place.load(layout.ID_OF_RANK)
        except RunError:
            raise
        # Each codec has its own way to say that bytes are damaged; there is nothing else to fail here.
        except Exception as error:
            raise StoreError(f"{self.place.at(layout.ID_OF_RANK)}: {error}; {_RECREATE}") from error
        # A chunk that is not there reads as zeros without an error.
        if not np.array_equal(np.sort(table), np.arange(self.manifest.vocab_rows)):
            raise StoreError(
                f"{self.path}, array {layout.ID_OF_RANK}: not each of {self.manifest.vocab_rows} ids once; {_RECREATE}"
            )
        return table

    def _read_all(self, array: Shard) -> NDArray[Any]:
        whole = self._read(array, range(array.chunk_count))
        return np.concatenate(whole)[: len(array)]

    def _read(self, array: Shard, numbers: Sequence[int]) -> list[NDArray[Any]]:
        try:
            return array.read(numbers)
        except RunError:
            raise
        # As above; PCodec and Zstd raise what they like.
        except Exception as error:
            raise StoreError(f"{self.place.at(array.key)}: {error}; {_REWRITE}") from error


def read_manifest(path: Location) -> Manifest:
    """Read a store's manifest.

    Raises:
        StoreError: no store there, not a store, or a newer format. RunError: an object store cannot be reached.
    """
    try:
        attributes = json.loads(place_of(path).read(MARKER).decode())["attributes"]
        data = attributes.get(layout.MANIFEST_KEY)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is not a teacher store: {error}") from None
    return Manifest.from_attributes(data, str(path))


def pick_store(path: Location, wanted: dict[str, Any]) -> TeacherStore:
    """Open the store at `path`, or the one in that folder, or below that URL, whose manifest fits.

    Args:
        wanted: manifest field → what the run needs it to be.

    Raises:
        StoreMismatch: the store does not fit, none of them fits, or several do; lists what was seen.
        StoreError: no store there.
    """
    misfits = {store: read_manifest(store).misfits(wanted) for store in _stores_at(path)}
    fitting = [store for store, lines in misfits.items() if not lines]
    if len(fitting) == 1:
        return TeacherStore(fitting[0])
    if fitting:
        raise StoreMismatch(f"{len(fitting)} stores in {path} fit, name one: " + ", ".join(map(str, fitting)))
    seen = "\n".join(f"{store}\n  " + "\n  ".join(lines) for store, lines in misfits.items())
    raise StoreMismatch(f"no store fits this run:\n{seen}\nTrain with what the store was made with, or cache again")


def _stores_at(path: Location) -> list[Location]:
    """Return `path` itself if it is a store, else the stores directly inside it; StoreError if there is none."""
    found = place_of(path).stores()
    if not found:
        raise StoreError(f"no teacher store at {path}; `switchkd cache-teacher --out {path}/NAME.zarr` makes one")
    return found
