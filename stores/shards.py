"""Reading an array of a part straight from its shard: the shard's index once, then the inner chunks that are asked for.

zarr gives the same numbers, but reads a shard's inner chunks one after the other, each through its event loop, and that costs
several times what decoding them does. Only the codecs that this format uses are known here.
"""

import json
import math
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.pcodec import PCodec
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from switchkd.stores.place import Place

_EMPTY = np.iinfo(np.uint64).max  # in an index: this inner chunk holds nothing but the fill value
_CHECKSUM = 4  # bytes of a crc32c


class Shard:
    """An array of a part that lies in one shard; `shard[rows]` reads along the first axis.

    Args:
        place: where the store lies. key: the array's, inside the store.
        metadata: the contents of the array's zarr.json.
        sizes: the bytes of every file of the part, by its path inside the store. A shard that is not among them was not
            written since all its values are the fill value.

    Raises:
        ValueError: the metadata are not those of an array of this format; on reading: damage.
        OSError, RunError: the place cannot be read.
    """

    def __init__(self, place: Place, key: str, metadata: bytes, sizes: dict[str, int]) -> None:
        try:
            data = json.loads(metadata)
            self.shape = tuple(data["shape"])
            self.dtype = np.dtype(data["data_type"])
            (sharding,) = data["codecs"]
            inner = sharding["configuration"]
            self.chunks = tuple(inner["chunk_shape"])
            self._steps = [_step(codec, self.dtype) for codec in reversed(inner["codecs"])]
            grid = data["chunk_grid"]["configuration"]["chunk_shape"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{key}/zarr.json does not describe an array of a store: {error!r}") from error
        if any(size > shard for size, shard in zip(self.shape, grid, strict=True)):
            raise ValueError(f"{key} lies in several shards; a part has one an array")
        self.place, self.key = place, key
        self._file = "/".join([key, "c", *("0" for _ in self.shape)])
        self._size = sizes.get(self._file)
        self._fill = data["fill_value"]
        self._grid = tuple(size // chunk for size, chunk in zip(grid, self.chunks, strict=True))
        self._index: NDArray[np.uint64] | None = None  # [*grid, 2]: offset and bytes of every inner chunk

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        start, stop, _ = rows.indices(len(self))
        step = self.chunks[0]
        first, last = start // step, -(-stop // step)
        if self._size is None or stop <= start:
            return np.full((max(stop - start, 0), *self.shape[1:]), self._fill, self.dtype)
        wanted = list(product(range(first, last), *(range(size) for size in self._grid[1:])))
        whole = np.empty(((last - first) * step, *(n * c for n, c in zip(self._grid[1:], self.chunks[1:], strict=True))),
                         self.dtype)  # fmt: skip
        for where, chunk in zip(wanted, self._read(wanted), strict=True):
            corner = (where[0] - first, *where[1:])
            whole[tuple(slice(at * n, (at + 1) * n) for at, n in zip(corner, self.chunks, strict=True))] = chunk
        return whole[(slice(start - first * step, stop - first * step), *(slice(size) for size in self.shape[1:]))]

    def _read(self, wanted: list[tuple[int, ...]]) -> Iterable[NDArray[Any] | int | float]:
        """Return the decoded inner chunks at these places of the grid."""
        if self._index is None:
            self._index = self._read_index()
        entries = [tuple(map(int, self._index[where])) for where in wanted]
        spans = [(offset, offset + size) for offset, size in entries if offset != _EMPTY]
        contents = iter(self.place.ranges(self._file, spans))
        return [self._fill if offset == _EMPTY else self._decode(next(contents)) for offset, _ in entries]

    def _read_index(self) -> NDArray[np.uint64]:
        assert self._size is not None
        length = math.prod(self._grid) * 16 + _CHECKSUM
        (data,) = self.place.ranges(self._file, [(self._size - length, self._size)])
        return np.frombuffer(_checked(data), "<u8").reshape(*self._grid, 2)

    def _decode(self, data: bytes) -> NDArray[Any]:
        value: Any = data
        for step in self._steps:
            value = step(value)
        if value.dtype != self.dtype or value.size != math.prod(self.chunks):
            raise ValueError(f"a chunk of {self.key} holds {value.size} {value.dtype}, not {self.chunks} {self.dtype}")
        decoded: NDArray[Any] = value.reshape(self.chunks)
        return decoded


def _step(codec: dict[str, Any], dtype: np.dtype[Any]) -> Callable[[Any], Any]:
    """Return what undoes one codec of a chain."""
    match codec["name"]:
        case "crc32c":
            return _checked
        case "zstd":
            return Zstd().decode  # type: ignore[no-any-return]
        case "numcodecs.pcodec":
            return PCodec().decode  # type: ignore[no-any-return]
        case "bytes" if dtype.itemsize == 1 or codec["configuration"]["endian"] == "little":
            return lambda data: np.frombuffer(data, dtype.newbyteorder("<"))
    raise ValueError(f"unknown codec {codec}")


def _checked(data: bytes) -> bytes:
    """Return the bytes before a crc32c, which must be theirs."""
    content, checksum = data[:-_CHECKSUM], data[-_CHECKSUM:]
    if google_crc32c.value(content).to_bytes(_CHECKSUM, "little") != checksum:
        raise ValueError("a checksum does not match")
    return content
