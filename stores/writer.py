"""Writes a store: creates it once and fills it part by part; each part becomes visible atomically (a rename, or a last object).

There is no lock and no coordinator. Sample i belongs to part i // part_size. A part is first written without being visible and
then committed. If two workers finish the same part, the first commit wins and the other part is discarded. A killed writer loses
only its unfinished part.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.buffer import Buffer
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from switchkd.counting import counted
from switchkd.errors import RunError, StoreError
from switchkd.settings import StoreLocation
from switchkd.stores import layout
from switchkd.stores.codec import HiddenSteps, encode_advantage, encode_hidden, encode_topk, invert, round_stats
from switchkd.stores.manifest import Manifest
from switchkd.stores.payload import Payload
from switchkd.stores.reader import TeacherStore, read_manifest
from switchkd.stores.shards import Description, checksums_of, encode_shard
from switchkd.stores.storage import paths
from switchkd.stores.storage.base import Files
from switchkd.stores.storage.open import open_storage
from switchkd.stores.storage.paths import MARKER


@dataclass(frozen=True)
class PartArrays:
    """The data of one part, as capture passes it to the writer: n samples, P positions in sample order."""

    status: NDArray[np.uint8]  # [n]
    digest: NDArray[np.uint64]  # [n, 3]
    positions: NDArray[np.int64]  # [n], positions of each sample; 0 unless its status is 0
    tokens: NDArray[np.uint32]  # [n], tokens of each sample, image tokens included; 0 unless its status is 0
    payload: Payload  # of all P positions, in sample order


@dataclass(frozen=True)
class StoreTables:
    """What a store has once, and all its parts are encoded with."""

    id_of_rank: NDArray[np.uint32]  # [N], the vocabulary by frequency; see `codec.ranks_by_frequency`
    hidden_steps: HiddenSteps | None = None  # for hidden states stored as steps


class StoreWriter:
    """Fills a store; any number of writers on any number of machines may do so concurrently.

    Args:
        path: the store's folder, `NAME.zarr`, or its URL on an object store.
        manifest: manifest of this run; an existing store must have the same identity. A store of an earlier format version is
            continued as one of that version.
        tables: function that returns the store's tables; called only if the store does not exist yet.

    Raises:
        StoreMismatch: the store at `path` was created with other settings.
        StoreError: `path` exists and is not a store, or it cannot be written.
        RunError: an object store cannot be reached.
    """

    def __init__(self, path: StoreLocation, manifest: Manifest, tables: Callable[[], StoreTables]) -> None:
        self._storage = open_storage(path)
        self.path = self._storage.path
        self.manifest = manifest
        self.written_bytes = 0  # by this writer, in committed parts
        if not self._storage.exists():
            self._create(tables)
        there = read_manifest(self.path)
        self.manifest = manifest.as_version(there.version)
        there.check_same(self.manifest, str(self.path))
        self._store = TeacherStore(self.path)
        self._rank_of_id = invert(self._store.id_of_rank)
        self._storage.remove_stale()

    def missing_parts(self, shard: tuple[int, int] = (0, 1)) -> list[int]:
        """Return the parts still to be written by worker i of n: i, i + n, … without the committed ones."""
        index, count = shard
        there = self._storage.parts()
        return [part for part in range(index, self.manifest.part_count, count) if paths.part_name(part) not in there]

    def has_part(self, part: int) -> bool:
        """Whether a part has been committed."""
        return self._storage.has_part(part)

    def remove_part(self, part: int) -> None:
        """Make a committed part invisible and delete it, so that it can be written anew; nothing if another writer removed it.

        Raises:
            RunError: the storage cannot be written or reached.
        """
        try:
            if self.has_part(part):
                self._storage.remove_part(part)
        except FileNotFoundError:  # another writer was first
            return
        except OSError as error:
            raise RunError(
                f"cannot remove part {part} of {self.path}: {error}; mend the folder and try again"
            ) from error

    def write_part(self, part: int, arrays: PartArrays) -> bool:
        """Write and commit one part; returns False if another writer committed it first.

        Raises:
            RunError: the disk is full, the storage cannot be written or reached, or the payload has values that the codec cannot
                encode; committed parts are unchanged.
        """
        if self.has_part(part):
            return False
        try:
            data = self._encode(arrays)
        except ValueError as error:
            raise RunError(f"part {part} cannot be stored: {error}") from error
        try:
            with _interruptions_held():
                files = self._part_files(part, data)
                committed = self._storage.commit_part(part, files)
        except (OSError, MemoryError) as error:
            done = self.manifest.part_count - len(self.missing_parts())
            raise RunError(
                f"cannot write part {part} of {self.path}: {_reason(error)}. What was written so far, "
                f"{counted(done, 'part')}, is whole; "
                "make room or mend the folder and run the same command again"
            ) from error
        self.written_bytes += sum(map(len, files.values())) if committed else 0
        return committed

    def _encode(self, arrays: PartArrays) -> dict[str, NDArray[Any]]:
        """Return a part's arrays by their names in the store."""
        manifest, payload = self.manifest, arrays.payload
        stats = round_stats(payload.stats)
        data: dict[str, NDArray[Any]] = {
            layout.OFFSET: np.concatenate([[0], np.cumsum(arrays.positions)]).astype(np.int64),
            layout.DIGEST: arrays.digest,
            layout.STATUS: arrays.status,
            layout.STATS: stats,
        }
        if manifest.version > 1:
            data[layout.TOKENS] = arrays.tokens
        if manifest.visual_advantage:
            assert payload.visual_advantage is not None
            data[layout.VISUAL_ADVANTAGE] = encode_advantage(payload.visual_advantage)
        if manifest.has_topk:
            assert payload.ids is not None and payload.logits is not None
            # Levels are relative to the rounded logsumexp, which is the one that a reader gets.
            logsumexp = stats[:, layout.STAT_COLUMNS.index("logsumexp")]
            codes = encode_topk(
                payload.ids, payload.logits, logsumexp, self._rank_of_id, manifest.fine, manifest.coarse
            )
            data[layout.GAP], data[layout.HEIGHT], data[layout.BOTTOM] = codes[:3]
            if manifest.version > 1 and codes.order is not None:
                data[layout.ORDER] = codes.order
        if manifest.has_hidden:
            assert payload.hidden is not None
            data[layout.STATE] = encode_hidden(payload.hidden, manifest.hidden_dtype, self._store.hidden_steps)
        return data

    def _part_files(self, part: int, data: dict[str, NDArray[Any]]) -> Files:
        """Return the files of a part: zarr creates the metadata, `encode_shard` the shards, and the part's own record is added."""
        buffers: dict[str, Buffer] = {}
        group = zarr.create_group(MemoryStore(buffers))
        for name, values in data.items():
            group.create_array(name, dtype=values.dtype, **layout.array_options(name, values.shape))
        group[layout.STATS].attrs["columns"] = list(layout.STAT_COLUMNS)
        group[layout.DIGEST].attrs["columns"] = list(layout.DIGEST_COLUMNS)
        files = _contents(buffers)
        del files[MARKER]  # written last, since it contains the list of the other files
        checksums: dict[str, dict[str, str]] = {}
        for name, values in data.items():
            about = Description.parse(name, files[f"{name}/{MARKER}"])
            shard = encode_shard(about, values)
            if shard is not None:
                files[f"{name}/{about.file}"] = shard
                checksums[f"{name}/{about.file}"] = {"crc32c": checksums_of(about, shard)}
        group.attrs[layout.PART_KEY] = {
            "part": part,
            "store": self.manifest.identity,
            **({"tables": self._store.tables_digest} if self.manifest.version > 1 else {}),
            "samples": len(data[layout.STATUS]),
            "positions": len(data[layout.STATS]),
            "written": {"by": paths.writer_prefix(), "at": layout.now()},
            "files": {
                name: {"bytes": len(content), "blake2b": layout.digest_bytes(content)} | checksums.get(name, {})
                for name, content in sorted(files.items())
            },
        }
        return files | {MARKER: buffers[MARKER].to_bytes()}

    def _create(self, tables: Callable[[], StoreTables]) -> None:
        found, buffers = tables(), dict[str, Buffer]()
        root = zarr.create_group(MemoryStore(buffers), attributes={layout.MANIFEST_KEY: self.manifest.as_attributes()})
        root.create_group(paths.PARTS)
        codecs: dict[str, Any] = {"compressors": [ZstdCodec(level=3), Crc32cCodec()]}
        ranks = found.id_of_rank.astype(np.uint32)
        root.create_array(layout.ID_OF_RANK, data=ranks, chunks=ranks.shape, **codecs)
        if (steps := found.hidden_steps) is not None:
            for name, values in ((layout.STEP, steps.step), (layout.MEAN, steps.mean)):
                values = np.asarray(values, np.float32)
                # If the chunk is lost, zarr returns the fill value: NaN, which a reader refuses.
                root.create_array(name, data=values, chunks=values.shape, fill_value=np.nan, **codecs)
        try:
            self._storage.commit_store(_contents(buffers))
        except MemoryError as error:
            raise RunError(f"cannot create {self.path}: {_reason(error)}; run the same command again") from error
        except OSError as error:
            raise StoreError(f"cannot create {self.path}: {error}") from error


def _reason(error: OSError | MemoryError) -> str:
    return str(error) if isinstance(error, OSError) else "not enough memory"


def _contents(buffers: dict[str, Buffer]) -> Files:
    return {name: buffer.to_bytes() for name, buffer in buffers.items()}


@contextmanager
def _interruptions_held() -> Iterator[None]:
    """Delay SIGINT and SIGTERM until a part is finished: zarr's threads cannot be cancelled and would print errors at exit."""
    caught: list[int] = []
    held = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(handler := signal.getsignal(number)):  # otherwise no Python handler is installed
                held[number] = handler
                signal.signal(number, lambda received, _: caught.append(received))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])
