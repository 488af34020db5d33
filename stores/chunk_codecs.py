"""Encodes and decodes one chunk: PCodec, or bytes and Zstd, each followed by a crc32c.

No size that the encoded bytes state is believed: a chunk is decoded into as many bytes as its array's metadata allow, or refused.
"""

from collections.abc import Callable
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.pcodec import PCodec
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from pcodec.standalone import simple_decompress_into

from switchkd.stores.checks import mapping, text

CHECKSUM_BYTES = 4
PCODEC, ZSTD = "numcodecs.pcodec", "zstd"
CHAINS = ((PCODEC, "crc32c"), ("bytes", ZSTD, "crc32c"))  # of the arrays of a store; its tables may lack the checksum
_ZSTD_MAGIC = bytes.fromhex("28b52ffd")
_ZSTD = Zstd()

Codecs = list[dict[str, Any]]


def check_chain(codecs: Any, allowed: tuple[tuple[str, ...], ...] = CHAINS) -> tuple[str, ...]:
    """Return the names of a chain of codecs from an array's metadata.

    Raises:
        ValueError: not one of the `allowed` chains, or bytes that are not little endian.
    """
    found = tuple(text(mapping(codec, "a codec").get("name"), "a codec's name") for codec in list(codecs))
    if found not in allowed:
        raise ValueError(f"unknown codecs {found}; expected {' or '.join(map(str, allowed))}")
    for codec in codecs:
        if codec["name"] == "bytes" and (codec.get("configuration") or {}).get("endian", "little") != "little":
            raise ValueError("its bytes are not little endian")
    return found


def encoder(codecs: Codecs, dtype: np.dtype[Any]) -> Callable[[NDArray[Any]], bytes]:
    """Return the function that encodes a chunk as these codecs of an array's metadata say."""
    steps: list[Callable[[Any], Any]] = []
    for codec in codecs:
        match codec["name"]:
            case "crc32c":
                steps.append(with_checksum)
            case "bytes":
                steps.append(lambda values: values.astype(dtype.newbyteorder("<")).tobytes())
            case name:
                steps.append({ZSTD: Zstd, PCODEC: PCodec}[name](**codec["configuration"]).encode)

    def encode(chunk: NDArray[Any]) -> bytes:
        value: Any = chunk
        for step in steps:
            value = step(value)
        return bytes(value)

    return encode


def decode(chain: tuple[str, ...], data: bytes, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """Decode a chunk of `count` numbers, flat.

    Raises:
        ValueError, RuntimeError: damaged bytes, or another number of values.
    """
    if chain[-1] == "crc32c":
        data = checked(data)
    if chain[0] == PCODEC:
        values = np.empty(count, dtype)
        progress = simple_decompress_into(data, values)
        if progress.n_processed != count or not progress.finished:
            found = progress.n_processed if progress.finished else f"more than {progress.n_processed}"
            raise ValueError(f"it holds {found} numbers, not {count}")
        return values
    size = count * dtype.itemsize
    if ZSTD not in chain:
        return np.frombuffer(data[:size], dtype.newbyteorder("<"), count)
    if (stated := _zstd_content_bytes(data)) != size:
        raise ValueError(f"it holds {stated} bytes, not {size}")
    return np.frombuffer(_ZSTD.decode(data), dtype.newbyteorder("<"), count)


def with_checksum(data: bytes) -> bytes:
    """Return the bytes, followed by their crc32c."""
    checksum: int = google_crc32c.value(data)
    return data + checksum.to_bytes(CHECKSUM_BYTES, "little")


def checked(data: bytes) -> bytes:
    """Return the bytes before a crc32c, after verifying it. Raises ValueError."""
    content = data[:-CHECKSUM_BYTES]
    if len(data) < CHECKSUM_BYTES or google_crc32c.value(content) != int.from_bytes(data[-CHECKSUM_BYTES:], "little"):
        raise ValueError("a checksum does not match")
    return content


def _zstd_content_bytes(frame: bytes) -> int | None:
    """Return the size that the header of a Zstd frame states (RFC 8878, 3.1.1.1) and its decoder allocates; None if it has none."""
    if frame[:4] != _ZSTD_MAGIC or len(frame) < 5:
        raise ValueError("it is not a Zstd frame")
    descriptor = frame[4]
    single_segment = bool(descriptor & 0x20)
    begin = 5 + (not single_segment) + (0, 1, 2, 4)[descriptor & 3]
    size = (int(single_segment), 2, 4, 8)[descriptor >> 6]
    if not size:
        return None
    return int.from_bytes(frame[begin : begin + size], "little") + (256 if size == 2 else 0)
