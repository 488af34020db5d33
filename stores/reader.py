"""Reads a store: random access by sample, from any process."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from switchkd.counting import counted
from switchkd.errors import StoreError, StoreMismatch
from switchkd.settings import StoreLocation
from switchkd.stores import layout
from switchkd.stores.checks import METADATA_BYTES, attribute
from switchkd.stores.codec import TopKCodes, decode_hidden, decode_topk
from switchkd.stores.manifest import Manifest
from switchkd.stores.part import DAMAGED_PART_ADVICE, Part, open_part, read_chunks, read_whole
from switchkd.stores.payload import Payload, empty_payload
from switchkd.stores.shards import Shard
from switchkd.stores.storage import paths
from switchkd.stores.storage.failures import unreadable
from switchkd.stores.storage.open import open_storage
from switchkd.stores.storage.paths import MARKER
from switchkd.stores.stored_sample import StoredSample
from switchkd.stores.tables import read_hidden_steps, read_rank_table

MIN_DECODE_POSITIONS = 256  # positions: below this number, the overhead of numpy calls exceeds the computation

_Span = tuple[int, int, int]  # a part, and the begin and end of a run of its positions
_Key = tuple[int, int, int]  # a part, the rows of a chunk, and the chunk's number
_Chunks = dict[str, NDArray[Any]]  # all arrays with this number of rows per chunk: [rows, …], still encoded
_PENDING: _Chunks = {}


class TeacherStore:
    """A store opened for reading: `len(store)`, `store[i]`.

    Caches up to `cache_bytes` of the chunks that were read last, still encoded, so that reading a sample again, or its neighbours,
    is faster. May be sent to DataLoader workers, forked or spawned; each reopens the files. With an object store, workers must
    be spawned.

    Args:
        path: the store's folder, or its URL on an object store.
        cache_bytes: of encoded chunks, in memory.
        payload: "topk" or "hidden" reads only this payload of a store that has both; None reads all that there is.
        visual_advantage: False leaves visual advantages unread.

    Raises:
        StoreError: no store at `path`, a newer format, or damage. Damage is raised when it is read; the error names the file and
            the remedy.
        StoreUnreadable: a file could not be read now, or memory ran out; RunError: an object store cannot be reached. Both may be
            raised by any access, and say nothing about the store.
    """

    def __init__(
        self,
        path: StoreLocation,
        cache_bytes: int = 256 << 20,
        payload: str | None = None,
        visual_advantage: bool = True,
    ) -> None:
        self.storage = open_storage(path)
        self.path = self.storage.path
        self.cache_bytes = cache_bytes
        self.manifest = read_manifest(self.path)
        self.read_payload, self.read_advantage = payload, visual_advantage
        # What is read: the store's own description, with what was requested alone.
        self._reading = self.manifest if payload is None else replace(self.manifest, payload=payload)
        if not visual_advantage:
            self._reading = replace(self._reading, visual_advantage=0.0)
        self.id_of_rank = read_rank_table(self.storage, self.manifest)
        self.hidden_steps = read_hidden_steps(self.storage, self.manifest)
        self._ids = self.id_of_rank.astype(np.int32)  # the type that a payload has
        self._parts: dict[int, Part] = {}
        self._cache: LRUCache[_Key, _Chunks] = LRUCache(cache_bytes, getsizeof=_nbytes)

    @classmethod
    def open(cls, path: StoreLocation) -> "TeacherStore":
        """Open a store, or the only one in a folder (or below a URL) of stores.

        Raises:
            StoreError: no store, or several stores (all are named).
        """
        found = _stores_at(path)
        if len(found) > 1:
            raise StoreError(f"{path} holds {len(found)} stores, name one: " + ", ".join(map(str, found)))
        return cls(found[0])

    def only(self, payload: str, visual_advantage: bool = False) -> "TeacherStore":
        """Return the store opened to read one of its payloads, "topk" or "hidden", and its visual advantages only if asked."""
        return TeacherStore(self.path, self.cache_bytes, payload, visual_advantage=visual_advantage)

    @cached_property
    def tables_digest(self) -> str:
        """Digest of the store's tables, which every part records; without them, its integers have no meaning."""
        steps = self.hidden_steps
        tables = [self.id_of_rank] if steps is None else [self.id_of_rank, steps.step, steps.mean]
        return layout.digest_bytes(b"".join(table.astype(table.dtype.newbyteorder("<")).tobytes() for table in tables))

    def __len__(self) -> int:
        return self.manifest.samples

    def __getitem__(self, index: int) -> StoredSample:
        number, row = self._locate(index)
        status = int(self._part(number).status[row])
        reason = self.manifest.statuses.get(str(status), str(status))
        return StoredSample(int(index), status, reason, self.digest(index), self.payload([index]))

    def digest(self, index: int) -> tuple[int, int, int]:
        """Return a sample's digest at the time of caching: hashes of its text, its supervised mask, its image.

        Raises:
            IndexError: no such sample. StoreError, RunError: see above.
        """
        number, row = self._locate(index)
        text, supervised, image = self._part(number).digest[row].tolist()
        return text, supervised, image

    def payload(self, indices: Sequence[int]) -> Payload:
        """Return the positions of several samples, joined in the order of `indices`.

        Faster than reading the samples one by one: all their chunks are requested at once, reading overlaps with decoding, and
        short samples are decoded together.

        Raises:
            IndexError: no such sample. StoreError, RunError: see above.
        """
        try:
            return self._payload([self._locate(index) for index in indices])
        except MemoryError as error:
            raise unreadable(self.path, error) from error

    def _payload(self, places: Sequence[tuple[int, int]]) -> Payload:
        self.storage.map(self._part, {number for number, _ in places} - self._parts.keys())
        every = ((number, *self._parts[number].offset[row : row + 2].tolist()) for number, row in places)
        spans: list[_Span] = [(number, begin, end) for number, begin, end in every if begin < end]
        counts = [end - begin for _, begin, end in spans]
        joined = empty_payload(self._reading, sum(counts))
        pieces, done = self._pieces(spans), 0
        for run in _runs(counts, MIN_DECODE_POSITIONS):
            taken = list(islice(pieces, len(counts[run])))
            rows = {name: np.concatenate([array for each in taken for array in each[name]]) for name in taken[0]}
            begin, done = done, done + sum(counts[run])
            self._unpack(rows, [part for part, _, _ in spans[run]], joined.slice(begin, done))
        return joined

    def __getstate__(self) -> dict[str, Any]:
        read = {"payload": self.read_payload, "visual_advantage": self.read_advantage}
        return {"path": self.path, "cache_bytes": self.cache_bytes, **read}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def parts(self) -> list[int]:
        """Return the numbers of the committed parts."""
        numbers = (
            int(name) for name in self.storage.parts() if name.isdecimal() and name == paths.part_name(int(name))
        )
        return sorted(part for part in numbers if part < self.manifest.part_count)

    def check_complete(self) -> None:
        """Raise StoreError unless every part is committed."""
        there = len(self.parts())
        if there < self.manifest.part_count:
            raise StoreError(
                f"{self.path} holds {there} of {counted(self.manifest.part_count, 'part')}; "
                "run the same `switchkd cache-teacher` command again to finish it"
            )

    def statuses(self) -> NDArray[np.uint8]:
        """Return the status of every sample of a complete store, [samples] uint8."""
        return np.concatenate(self.storage.map(self.part_statuses, range(self.manifest.part_count)))

    def tokens(self) -> NDArray[np.int64]:
        """Return the tokens of every sample of a complete store, image tokens included, [samples] int64.

        0 for a sample that is not usable, and for the samples of parts that do not record them (written before they were stored).
        """
        return np.concatenate(self.storage.map(self._part_tokens, range(self.manifest.part_count)))

    def _part_tokens(self, number: int) -> NDArray[np.int64]:
        part = self._part(number)
        return np.zeros(len(part.status), np.int64) if part.tokens is None else part.tokens.astype(np.int64)

    def part_statuses(self, part: int) -> NDArray[np.uint8]:
        """Return the status of every sample of one part, [n] uint8."""
        return self._part(part).status

    def part_offsets(self, part: int) -> NDArray[np.int64]:
        """Return where each sample's positions of one part begin, [n + 1] int64."""
        return self._part(part).offset

    def part_entry(self, part: int) -> dict[str, Any]:
        """Return a part's own record: its files with sizes and digests, its counts."""
        return self._part(part).entry

    def part_payload(self, part: int) -> Payload:
        """Return the payload of all positions of one part; not cached."""
        arrays = self._part(part).arrays
        try:
            rows = dict(zip(arrays, read_whole(self.storage, list(arrays.values())), strict=True))
            found = empty_payload(self._reading, self.part_positions(part))
            self._unpack(rows, [part], found)
        except MemoryError as error:
            raise unreadable(self.storage.uri_of(paths.part_key(part)), error) from error
        return found

    def part_positions(self, part: int) -> int:
        """Return the number of positions of one part."""
        return int(self._part(part).offset[-1])

    def part_stats(self, part: int) -> NDArray[np.float32]:
        """Return the statistics of all positions of one part, [P, 5]."""
        return read_whole(self.storage, [self._part(part).arrays[layout.STATS]])[0]

    def _part(self, number: int) -> Part:
        if number not in self._parts:
            arrays = self._reading.position_arrays
            self._parts[number] = open_part(self.storage, self.manifest, number, self.tables_digest, arrays)
        return self._parts[number]

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the number of a sample's part, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a store with {len(self)}")
        return divmod(index, self.manifest.part_size)

    def _pieces(self, spans: Sequence[_Span]) -> Iterator[dict[str, list[NDArray[Any]]]]:
        """Yield, for each run of positions, the pieces of its encoded arrays, from cached or newly read chunks."""
        known: dict[_Key, _Chunks] = {}
        plans: list[list[tuple[list[str], list[_Key]]]] = []  # what is read for each run
        requests: list[tuple[Shard, list[int]]] = []
        for number, begin, end in spans:
            part, plan = self._parts[number], []
            for size, names in part.by_chunk_rows.items():
                missing = []
                for at in range(begin // size, -(-end // size)):
                    key = number, size, at
                    if key not in known:
                        known[key] = kept = self._cache.get(key, _PENDING)
                        if kept is _PENDING:
                            missing.append(key)
                if missing:
                    plan.append((names, missing))
                    numbers = [at for _, _, at in missing]
                    requests += [(part.arrays[name], numbers) for name in names]
            plans.append(plan)
        coming = read_chunks(self.storage, requests)
        for (number, begin, end), plan in zip(spans, plans, strict=True):
            for names, keys in plan:
                for key, *chunks in zip(keys, *islice(coming, len(names)), strict=True):
                    known[key] = dict(zip(names, chunks, strict=True))
                    self._keep(key, known[key])
            pieces = {}
            for size, names in self._parts[number].by_chunk_rows.items():
                whole = [
                    (known[number, size, at], slice(max(begin - at * size, 0), end - at * size))
                    for at in range(begin // size, -(-end // size))
                ]
                for name in names:
                    pieces[name] = [chunks[name][rows] for chunks, rows in whole]
            yield pieces

    def _keep(self, key: _Key, chunks: _Chunks) -> None:
        """Put chunks into the cache, unless they exceed its size."""
        if _nbytes(chunks) <= self.cache_bytes:
            self._cache[key] = chunks

    def _unpack(self, rows: dict[str, NDArray[Any]], parts: Sequence[int], out: Payload) -> None:
        """Decode positions, which come from these parts, into `out`."""
        manifest = self.manifest
        out.stats[...] = rows[layout.STATS]
        if out.visual_advantage is not None:
            out.visual_advantage[...] = rows[layout.VISUAL_ADVANTAGE]
        if out.ids is not None and out.logits is not None:
            codes = TopKCodes(rows[layout.GAP], rows[layout.HEIGHT], rows[layout.BOTTOM], rows.get(layout.ORDER))
            steps = manifest.fine, manifest.coarse
            try:
                decode_topk(codes, out.stat("logsumexp"), self._ids, *steps, (out.ids, out.logits))
            except ValueError as error:
                where = " or ".join(str(self.storage.uri_of(paths.part_key(part))) for part in sorted(set(parts)))
                raise StoreError(f"{where}: {error}; {DAMAGED_PART_ADVICE}") from error
        if out.hidden is not None:
            scale = rows.get(layout.SCALE)
            decode_hidden(rows[layout.STATE], manifest.hidden_dtype, self.hidden_steps, scale, out.hidden)


def _nbytes(chunks: _Chunks) -> int:
    return sum(array.nbytes for array in chunks.values())


def _runs(counts: Sequence[int], least: int) -> Iterator[slice]:
    """Split a list into runs that each sum to at least `least`, except the last."""
    begin = total = 0
    for at, count in enumerate(counts, 1):
        total += count
        if total >= least or at == len(counts):
            yield slice(begin, at)
            begin, total = at, 0


def read_manifest(path: StoreLocation) -> Manifest:
    """Read a store's manifest.

    Raises:
        StoreError: no store at `path`, not a store, or a newer format.
        StoreUnreadable: it could not be read now. RunError: an object store cannot be reached.
    """
    try:
        data = attribute(open_storage(path).read(MARKER, METADATA_BYTES), layout.MANIFEST_KEY)
    except StoreError:
        raise
    except (FileNotFoundError, ValueError) as error:
        raise StoreError(f"{path} is not a teacher store: {error}") from None
    except MemoryError as error:
        raise unreadable(path, error) from error
    return Manifest.from_attributes(data, str(path))


def pick_store(
    path: StoreLocation, wanted: dict[str, Any], preferred: Sequence[Callable[[TeacherStore], bool]] = ()
) -> TeacherStore:
    """Open the store at `path`, or the one in that folder, or below that URL, whose manifest matches.

    Args:
        wanted: manifest field → value that the run needs.
        preferred: what decides between several stores that match, the most important first: each leaves those for which it
            holds, if there are any.

    Raises:
        StoreMismatch: the store does not match, none of them matches, or several do; lists what was found.
        StoreError: no store at `path`.
    """
    mismatches = {store: read_manifest(store).mismatches(wanted) for store in _stores_at(path)}
    fitting = [store for store, lines in mismatches.items() if not lines]
    if len(fitting) == 1:
        return TeacherStore(fitting[0])
    stores = [TeacherStore(store) for store in fitting]
    for holds in preferred:
        stores = [store for store in stores if holds(store)] or stores
    if len(stores) == 1:
        return stores[0]
    if stores:
        fitting = [store.path for store in stores]
        raise StoreMismatch(f"{len(fitting)} stores in {path} fit, name one: " + ", ".join(map(str, fitting)))
    seen = "\n".join(f"{store}\n  " + "\n  ".join(lines) for store, lines in mismatches.items())
    raise StoreMismatch(f"no store fits this run:\n{seen}\nTrain with what the store was made with, or cache again")


def _stores_at(path: StoreLocation) -> list[StoreLocation]:
    """Return `path` itself if it is a store, else the stores directly inside it; StoreError if there is none."""
    found = open_storage(path).stores()
    if not found:
        raise StoreError(f"no teacher store at {path}; `switchkd cache-teacher --out {path}/NAME.zarr` makes one")
    return found
