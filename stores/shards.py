"""Writes an array of a part as one file, its shard, and reads individual inner chunks of it.

zarr reads and writes the same files with the same results, but processes a shard's inner chunks one by one, each through its event
loop, which takes several times as long as encoding and decoding them. Only the codecs of this format are supported here.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.stores.checks import mapping, number, one_of, parse, whole
from switchkd.stores.chunk_codecs import CHECKSUM_BYTES, Codecs, check_chain, checked, decode, encoder, with_checksum
from switchkd.stores.storage.base import Request

_EMPTY = int(np.iinfo(np.uint64).max)  # in an index: this inner chunk contains only the fill value
_ANY = 1 << 32  # in place of an inner chunk's crc32c: the part does not record it

# Larger ones are refused before anything is allocated. Writers make chunks of 16 KiB to some MiB.
CHUNK_BYTES = 1 << 26
ROWS = 1 << 40
DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32")

Entries = list[list[int]]  # of an index: an inner chunk's begin, its number of bytes and its crc32c


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
    codecs: Codecs  # of an inner chunk
    chain: tuple[str, ...]  # their names

    @classmethod
    def parse(cls, key: str, metadata: bytes) -> "Description":
        """Read an array's zarr.json; `key` is the array's, for error messages."""
        try:
            return cls._parsed(mapping(parse(metadata), "it"))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{key}/zarr.json does not describe an array of a store: {error}") from error

    @classmethod
    def _parsed(cls, data: dict[str, Any]) -> "Description":
        one_of(data.get("node_type"), "node_type", ("array",))
        shape = _sizes(data.get("shape"), "shape", 0)
        dtype = np.dtype(one_of(data.get("data_type"), "data_type", DTYPES))
        (sharding,) = data["codecs"]
        one_of(sharding["name"], "its codec", ("sharding_indexed",))
        inside = mapping(sharding["configuration"], "the codec's configuration")
        one_of(inside.get("index_location", "end"), "index_location", ("end",))
        check_chain(inside["index_codecs"], (("bytes", "crc32c"),))
        chunks, shard = (_sizes(of, "chunk_shape", 1) for of in (inside["chunk_shape"], _grid_shape(data)))
        if not len(shape) == len(chunks) == len(shard) or not 1 <= len(shape) <= 2:
            raise ValueError(f"shape {shape}, chunks {chunks} and shard {shard} do not go together")
        grid = tuple(max(-(-size // chunk), 1) for size, chunk in zip(shape, chunks, strict=True))
        if shard != tuple(n * chunk for n, chunk in zip(grid, chunks, strict=True)):
            raise ValueError(f"a shard of {shard} is not the array of {shape}, rounded up to whole chunks of {chunks}")
        if (size := math.prod(chunks) * dtype.itemsize) > CHUNK_BYTES:
            raise ValueError(f"a chunk has {size} bytes, expected at most {CHUNK_BYTES}")
        chain = check_chain(inside["codecs"])
        fill = number(data.get("fill_value"), "fill_value", 0, 0)
        return cls(shape, dtype, chunks, grid, fill, list(inside["codecs"]), chain)

    @property
    def file(self) -> str:
        """The shard's name below the array's folder."""
        return "/".join(["c", *("0" for _ in self.shape)])

    @property
    def index_bytes(self) -> int:
        """The size of the index at the shard's end."""
        return math.prod(self.grid) * 16 + CHECKSUM_BYTES

    @property
    def chunk_numbers(self) -> int:
        """Numbers of an inner chunk."""
        return math.prod(self.chunks)

    @property
    def most_chunk_bytes(self) -> int:
        """More bytes than any encoder makes of an inner chunk."""
        return 2 * self.chunk_numbers * self.dtype.itemsize + (1 << 14)


def _sizes(value: Any, name: str, least: int) -> tuple[int, ...]:
    return tuple(whole(each, name, least, ROWS) for each in list(value))


def _grid_shape(data: dict[str, Any]) -> Any:
    one_of(data["chunk_grid"]["name"], "chunk_grid", ("regular",))
    encoding = mapping(data.get("chunk_key_encoding"), "chunk_key_encoding")
    one_of(encoding.get("name"), "chunk_key_encoding", ("default",))
    one_of((encoding.get("configuration") or {}).get("separator", "/"), "separator", ("/",))
    return data["chunk_grid"]["configuration"]["chunk_shape"]


def checksums_of(description: Description, shard: bytes) -> str:
    """Return the `crc32c` of a part's record: 4 bytes each, in hexadecimal, of the index and of the inner chunks that it lists."""
    index = np.frombuffer(shard[-description.index_bytes : -CHECKSUM_BYTES], "<u8").reshape(-1, 2).tolist()
    ends = [begin + size for begin, size in index if begin != _EMPTY]
    return b"".join(shard[end - CHECKSUM_BYTES : end] for end in (len(shard), *ends)).hex()


def encode_shard(description: Description, values: NDArray[Any]) -> bytes | None:
    """Return the bytes of the shard that holds an array; None if its values are 0 throughout, which needs no file.

    Inner chunks are in the file in array order, so that those of consecutive rows are read in one request.
    """
    padded = np.zeros([n * c for n, c in zip(description.grid, description.chunks, strict=True)], description.dtype)
    padded[tuple(slice(size) for size in description.shape)] = values
    contents: list[bytes] = []
    index = np.full((math.prod(description.grid), 2), _EMPTY, "<u8")
    end = 0
    encode = encoder(description.codecs, description.dtype)
    for entry, where in zip(index, product(*map(range, description.grid)), strict=True):
        corner = zip(where, description.chunks, strict=True)
        chunk = np.ascontiguousarray(padded[tuple(slice(at * n, (at + 1) * n) for at, n in corner)])
        if not chunk.view(np.uint8).any():
            continue
        data = encode(chunk)
        contents.append(data)
        entry[:] = end, len(data)
        end += len(data)
    return b"".join([*contents, with_checksum(index.tobytes())]) if contents else None


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
        self.file = f"{key}/{self._about.file}"
        self.dense = False  # whether every chunk was written, because none contains only the fill value
        self._checksums: NDArray[np.uint32] | None = None
        self._wide = math.prod(self._about.grid[1:])
        self._size = sizes.get(self.file)
        # Begin, number of bytes and crc32c of each chunk's inner chunks, [chunks, inner chunks per chunk, 3].
        self._index: NDArray[np.uint64] | None = None
        if self._size is not None:
            least, chunks = self._about.index_bytes, math.prod(self._about.grid)
            most = least + chunks * self._about.most_chunk_bytes
            if not least <= self._size <= most:
                raise ValueError(f"{self.file} has {self._size} bytes, expected {least} to {most} of {chunks} chunks")

    def bind(self, checksums: str | None) -> None:
        """Accept only the chunks of which the part's record says the checksums, see `checksums_of`; None: it does not.

        Without this, chunks of another part, which are whole in themselves, would be read as those of this part.
        """
        self._checksums = None if checksums is None else np.frombuffer(bytes.fromhex(checksums), "<u4")

    def __len__(self) -> int:
        return int(self._about.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self._about.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its values."""
        return self._about.dtype

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
        return self.file, [(self._size - self._about.index_bytes, self._size)]

    def set_index(self, data: bytes) -> None:
        """Parse the bytes that `index_request` requested. Raises ValueError: not the index that was written."""
        assert self._size is not None
        content = checked(data)
        if len(data) != self._about.index_bytes:
            raise ValueError(f"its index has {len(data)} bytes, expected {self._about.index_bytes}")
        index = np.full((self.chunk_count * self._wide, 3), _ANY, np.uint64)
        index[:, :2] = np.frombuffer(content, "<u8").reshape(-1, 2)
        there = index[:, 0] != _EMPTY
        if self.dense and not there.all():
            raise ValueError("its index lacks a chunk, and no chunk of this array contains only zeros")
        begin, size = index[there, 0], index[there, 1]
        room = np.uint64(self._size - len(data))
        if ((begin > room) | (size > room - np.minimum(begin, room)) | (size > self._about.most_chunk_bytes)).any():
            raise ValueError("its index points out of the file, or to chunks that are too large")
        if self._checksums is not None:
            of_index = int.from_bytes(data[-CHECKSUM_BYTES:], "little")
            if len(self._checksums) != 1 + len(begin) or self._checksums[0] != of_index:
                raise ValueError("its index is that of another file")
            index[there, 2] = self._checksums[1:]
        self._index = index.reshape(self.chunk_count, self._wide, 3)

    def whole(self, content: bytes | None) -> NDArray[Any]:
        """Decode all rows from the bytes of the file; None if it was not written."""
        if content is not None:
            self.set_index(content[-self._about.index_bytes :])
        entries = self.entries(range(self.chunk_count))
        pieces = [(content or b"")[begin : begin + size] for begin, size, _ in entries if begin != _EMPTY]
        return np.concatenate(self.chunks(entries, pieces))[: len(self)]

    def entries(self, numbers: Sequence[int]) -> Entries:
        """Return the byte ranges of chunks by their numbers, which must ascend."""
        if self._size is None:
            return [[_EMPTY, 0, _ANY]] * (len(numbers) * self._wide)
        assert self._index is not None
        together = numbers[-1] - numbers[0] == len(numbers) - 1
        rows = self._index[numbers[0] : numbers[-1] + 1] if together else self._index[list(numbers)]
        found: Entries = rows.reshape(-1, 3).tolist()
        return found

    def request(self, entries: Entries) -> Request:
        """Return the request for these byte ranges."""
        return self.file, [(begin, begin + size) for begin, size, _ in entries if begin != _EMPTY]

    def chunks(self, entries: Entries, contents: Iterable[bytes]) -> list[NDArray[Any]]:
        """Decode chunks, each [chunk_rows, …], from their requested bytes; rows beyond the array's end have the fill value."""
        about, coming = self._about, iter(contents)
        pieces = [
            np.full(about.chunks, about.fill, about.dtype) if begin == _EMPTY else self._decode(next(coming), checksum)
            for begin, _, checksum in entries
        ]
        wide = self._wide
        if wide == 1:
            return pieces
        columns = about.shape[1]
        return [np.concatenate(pieces[i : i + wide], axis=1)[:, :columns] for i in range(0, len(pieces), wide)]

    def _decode(self, data: bytes, checksum: int) -> NDArray[Any]:
        about = self._about
        if checksum != _ANY and int.from_bytes(data[-CHECKSUM_BYTES:], "little") != checksum:
            raise ValueError("a chunk is not the one that was written: the part records another checksum")
        return decode(about.chain, data, about.dtype, about.chunk_numbers).reshape(about.chunks)
