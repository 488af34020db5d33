"""Writes an array of a part as one file, its shard, and reads individual inner chunks of it.

zarr reads and writes the same files with the same results, but processes a shard's inner chunks one by one, each through its event
loop, which takes several times as long as encoding and decoding them. Only the codecs of this format are supported here.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.pcodec import PCodec
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from pcodec.standalone import simple_decompress

from switchkd.stores.storage.base import Request

_EMPTY = int(np.iinfo(np.uint64).max)  # in an index: this inner chunk contains only the fill value
_CHECKSUM = 4  # bytes of a crc32c

Step = Callable[[Any], Any]
Entries = list[list[int]]  # of an index: an inner chunk's begin and its number of bytes


@dataclass(frozen=True)
class Description:
    """Parsed metadata of an array, a table of rows or a list, in one shard.

    Raises:
        ValueError: the metadata are not those of an array of this format.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: tuple[int, ...]  # shape of an inner chunk
    grid: tuple[int, ...]  # number of inner chunks along each axis
    fill: int | float
    steps: list[tuple[Step, Step]]  # (encode, decode) of each codec

    @classmethod
    def parse(cls, key: str, metadata: bytes) -> "Description":
        """Read an array's zarr.json; `key` is the array's, for error messages."""
        try:
            data = json.loads(metadata)
            shape, dtype = tuple(data["shape"]), np.dtype(data["data_type"])
            (sharding,) = data["codecs"]
            chunks = tuple(sharding["configuration"]["chunk_shape"])
            steps = [_steps(codec, dtype) for codec in sharding["configuration"]["codecs"]]
            shard, fill = data["chunk_grid"]["configuration"]["chunk_shape"], data["fill_value"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{key}/zarr.json does not describe an array of a store: {error!r}") from error
        if any(size > room for size, room in zip(shape, shard, strict=True)):
            raise ValueError(f"{key} lies in several shards; a part has one an array")
        return cls(shape, dtype, chunks, tuple(n // c for n, c in zip(shard, chunks, strict=True)), fill, steps)

    @property
    def file(self) -> str:
        """The shard's name below the array's folder."""
        return "/".join(["c", *("0" for _ in self.shape)])

    @property
    def index_bytes(self) -> int:
        """The size of the index at the shard's end."""
        return math.prod(self.grid) * 16 + _CHECKSUM


def encode_shard(description: Description, values: NDArray[Any]) -> bytes | None:
    """Return the bytes of the shard that holds an array; None if its values are 0 throughout, which needs no file.

    Inner chunks are in the file in array order, so that those of consecutive rows are read in one request.
    """
    whole = np.zeros([n * c for n, c in zip(description.grid, description.chunks, strict=True)], description.dtype)
    whole[tuple(slice(size) for size in description.shape)] = values
    contents: list[bytes] = []
    index = np.full((math.prod(description.grid), 2), _EMPTY, "<u8")
    end = 0
    for entry, where in zip(index, product(*map(range, description.grid)), strict=True):
        corner = zip(where, description.chunks, strict=True)
        chunk = np.ascontiguousarray(whole[tuple(slice(at * n, (at + 1) * n) for at, n in corner)])
        if not chunk.view(np.uint8).any():
            continue
        data: Any = chunk
        for code, _ in description.steps:
            data = code(data)
        contents.append(data)
        entry[:] = end, len(data)
        end += len(data)
    return b"".join([*contents, _with_checksum(index.tobytes())]) if contents else None


class Shard:
    """An array of a part, read by chunks of `chunk_rows` rows.

    It computes the byte ranges of its file that are needed and decodes them to chunks; `Storage.read_ranges` reads them, for many
    arrays at once. If `index_request` returns a request, the bytes of the index must be read first.

    Args:
        key: the array's, inside the store. metadata: the contents of its zarr.json.
        sizes: the bytes of every file of the part, by its path inside the store. A shard that is not listed was not
            written, since all its values are the fill value.

    Raises:
        ValueError: the metadata are not those of an array of this format; on reading: damage.
    """

    def __init__(self, key: str, metadata: bytes, sizes: dict[str, int]) -> None:
        self.key = key
        self._about = Description.parse(key, metadata)
        self._file = f"{key}/{self._about.file}"
        self._undo = [undo for _, undo in reversed(self._about.steps)]
        self._chunk_size = math.prod(self._about.chunks)
        self._size = sizes.get(self._file)
        # Begin and number of bytes of each chunk's inner chunks, [chunks, inner chunks per chunk, 2].
        self._index: NDArray[np.uint64] | None = None
        if self._size is None:
            self._index = np.full((self.chunk_count, math.prod(self._about.grid[1:]), 2), _EMPTY, np.uint64)

    def __len__(self) -> int:
        return int(self._about.shape[0])

    @property
    def chunk_rows(self) -> int:
        """Rows of an inner chunk."""
        return self._about.chunks[0]

    @property
    def chunk_count(self) -> int:
        """Number of chunks along the rows; 1 if there are no rows."""
        return self._about.grid[0]

    def index_request(self) -> Request | None:
        """Return the request for the index, which must be read before chunks; None if the index is already available."""
        if self._index is not None or self._size is None:
            return None
        return self._file, [(self._size - self._about.index_bytes, self._size)]

    def set_index(self, data: bytes) -> None:
        """Parse the bytes that `index_request` requested."""
        self._index = np.frombuffer(_checked(data), "<u8").reshape(self.chunk_count, math.prod(self._about.grid[1:]), 2)

    def entries(self, numbers: Sequence[int]) -> Entries:
        """Return the byte ranges of chunks by their numbers, which must ascend."""
        assert self._index is not None
        together = numbers[-1] - numbers[0] == len(numbers) - 1
        rows = self._index[numbers[0] : numbers[-1] + 1] if together else self._index[list(numbers)]
        found: Entries = rows.reshape(-1, 2).tolist()
        return found

    def request(self, entries: Entries) -> Request:
        """Return the request for these byte ranges."""
        return self._file, [(begin, begin + size) for begin, size in entries if begin != _EMPTY]

    def chunks(self, entries: Entries, contents: Iterable[bytes]) -> list[NDArray[Any]]:
        """Decode chunks, each [chunk_rows, …], from their requested bytes; rows beyond the array's end have the fill value."""
        about, coming = self._about, iter(contents)
        pieces = [
            np.full(about.chunks, about.fill, about.dtype) if begin == _EMPTY else self._decode(next(coming))
            for begin, _ in entries
        ]
        wide = math.prod(about.grid[1:])
        if wide == 1:
            return pieces
        columns = about.shape[1]
        return [np.concatenate(pieces[i : i + wide], axis=1)[:, :columns] for i in range(0, len(pieces), wide)]

    def _decode(self, data: bytes) -> NDArray[Any]:
        about = self._about
        value: Any = data
        for undo in self._undo:
            value = undo(value)
        if value.dtype != about.dtype or value.size != self._chunk_size:
            raise ValueError(
                f"a chunk of {self.key} holds {value.size} {value.dtype}, not {about.chunks} {about.dtype}"
            )
        decoded: NDArray[Any] = value.reshape(about.chunks)
        return decoded


def _steps(codec: dict[str, Any], dtype: np.dtype[Any]) -> tuple[Step, Step]:
    """Return the (encode, decode) functions of one codec of a chain."""
    match codec["name"]:
        case "crc32c":
            return _with_checksum, _checked
        case "zstd":
            zstd = Zstd(**codec["configuration"])
            return zstd.encode, zstd.decode
        case "numcodecs.pcodec":
            pcodec = PCodec(**codec["configuration"])
            return pcodec.encode, simple_decompress
        case "bytes" if dtype.itemsize == 1 or codec["configuration"]["endian"] == "little":
            stored = dtype.newbyteorder("<")
            return lambda values: values.astype(stored).tobytes(), lambda data: np.frombuffer(data, stored)
    raise ValueError(f"unknown codec {codec}")


def _with_checksum(data: bytes) -> bytes:
    """Return the bytes, followed by their crc32c."""
    checksum: int = google_crc32c.value(data)
    return data + checksum.to_bytes(_CHECKSUM, "little")


def _checked(data: bytes) -> bytes:
    """Return the bytes before a crc32c, after verifying it."""
    content = data[:-_CHECKSUM]
    if len(data) < _CHECKSUM or google_crc32c.value(content) != int.from_bytes(data[-_CHECKSUM:], "little"):
        raise ValueError("a checksum does not match")
    return content
