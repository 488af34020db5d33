"""Row 21: arrays, chunks and tables with right checksums that decode to something else than a store holds."""

import json
import struct

import hostile
import numpy as np
import pytest
import resealed
from numcodecs.pcodec import PCodec
from numcodecs.zstd import Zstd

from switchkd.stores.chunk_codecs import with_checksum
from switchkd.stores.layout import GAP, OFFSET, STATE, STATS
from switchkd.stores.storage.paths import part_path

whole, path, refused = hostile.whole, hostile.path, hostile.refused


def change_array(path, name, change):
    file = part_path(path, 1) / name / "zarr.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    resealed.reseal(part_path(path, 1))


def set_at(*keys, value):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


SHARDING = ("codecs", 0, "configuration")
CHANGES = {
    "shape 10^9": set_at("shape", 0, value=10**9),
    "shape 10^15": set_at("shape", 0, value=10**15),
    "shape -1": set_at("shape", 0, value=-1),
    "no shape": set_at("shape", value=[]),
    "shape of texts": set_at("shape", 0, value="3"),
    "dtype object": set_at("data_type", value="object"),
    "dtype struct": set_at("data_type", value=[["a", "<i8"]]),
    "dtype other": set_at("data_type", value="uint8"),
    "chunk 0": set_at(*SHARDING, "chunk_shape", 0, value=0),
    "chunk -1": set_at(*SHARDING, "chunk_shape", 0, value=-1),
    "chunk 10^15": set_at(*SHARDING, "chunk_shape", 0, value=10**15),
    "chunk true": set_at(*SHARDING, "chunk_shape", 0, value=True),
    "shard 10^15": set_at("chunk_grid", "configuration", "chunk_shape", 0, value=10**15),
    "fill 1": set_at("fill_value", value=1),
    "fill NaN": set_at("fill_value", value="NaN"),
    "no codecs": set_at("codecs", value=[]),
    "unknown codec": set_at(*SHARDING, "codecs", 0, value={"name": "pickle", "configuration": {}}),
    "gzip": set_at(*SHARDING, "codecs", 0, value={"name": "gzip", "configuration": {"level": 5}}),
    "without crc32c": lambda data: data["codecs"][0]["configuration"]["codecs"].pop(),
    "index in zstd": set_at(*SHARDING, "index_codecs", value=[{"name": "zstd", "configuration": {}}]),
    "index at the start": set_at(*SHARDING, "index_location", value="start"),
    "codec is a text": set_at(*SHARDING, "codecs", 0, value="zstd"),
    "no configuration": set_at("codecs", 0, "configuration", value=None),
    "other keys": set_at("chunk_key_encoding", value={"name": "v2", "configuration": {"separator": "."}}),
    "a group": set_at("node_type", value="group"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", (STATS, GAP, OFFSET, STATE))
def test_row_21_an_array_that_the_format_does_not_have(path, name, change):
    change_array(path, name, change)
    refused(path, "parts/00001")


def shard(*chunks):
    """A shard of one chunk after the other, with right checksums."""
    index, content = b"", b""
    for data in chunks:
        index += struct.pack("<QQ", len(content), len(data))
        content += data
    return content + with_checksum(index)


def replace_chunk(path, name, content):
    (file,) = [file for file in (part_path(path, 1) / name / "c").rglob("*") if file.is_file()]
    file.write_bytes(content)
    resealed.reseal(part_path(path, 1))


def zstd_of(header):
    return bytes.fromhex("28b52ffd") + header


BOMBS = {
    "pcodec, 10^8 zeros": lambda: with_checksum(PCodec().encode(np.zeros(10**8, np.float32))),
    "pcodec, another type": lambda: with_checksum(PCodec().encode(np.zeros(160, np.int64))),
    "pcodec, too few": lambda: with_checksum(PCodec().encode(np.zeros(3, np.float32))),
    "pcodec, nothing": lambda: with_checksum(b""),
    "pcodec, noise": lambda: with_checksum(bytes(range(256))),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("name", (STATS, OFFSET))
def test_row_21_a_chunk_that_decodes_to_something_else(path, name, bomb):
    replace_chunk(path, name, shard(bomb()))
    refused(path, f"parts/00001/{name}")


ZSTD_BOMBS = {
    "10^9 zeros": lambda: Zstd().encode(bytes(10**9)),
    "2^60 bytes stated": lambda: zstd_of(b"\xe0" + struct.pack("<Q", 1 << 60) + b"\x01\x00\x00"),
    "no size stated": lambda: zstd_of(b"\x00\x58" + struct.pack("<I", 1 | 2 | (100_000 << 3))[:3] + b"\x00"),
    "cut header": lambda: zstd_of(b"\xe0"),
    "no frame": lambda: b"",
    "two frames": lambda: Zstd().encode(bytes(47)) + Zstd().encode(bytes(1 << 20)),
}


@pytest.mark.parametrize("bomb", ZSTD_BOMBS.values(), ids=ZSTD_BOMBS)
def test_row_21_a_zstd_chunk_that_decodes_to_something_else(path, bomb):
    replace_chunk(path, "samples/digest", shard(with_checksum(bomb())))
    refused(path, "parts/00001/samples/digest")


@pytest.mark.parametrize("bomb", ZSTD_BOMBS.values(), ids=ZSTD_BOMBS)
@pytest.mark.parametrize("name", ("vocab/id_of_rank", "hidden/step"))
def test_row_21_a_table_that_decodes_to_something_else(path, name, bomb):
    (path / name / "c/0").write_bytes(with_checksum(bomb()))
    refused(path, name)


@pytest.mark.parametrize(
    "index",
    [
        (1 << 63, 100),
        (0, 1 << 63),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 2, 3),
        (10**15, 10),
        (0, 10**9),
        (0, 3),
    ],
)
@pytest.mark.parametrize("name", (STATS, OFFSET))
def test_row_21_an_index_that_points_elsewhere(path, name, index):
    replace_chunk(path, name, bytes(1000) + with_checksum(struct.pack("<QQ", *index)))
    refused(path, "parts/00001")
