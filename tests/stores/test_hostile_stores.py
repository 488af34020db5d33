"""Row 21: stores whose checksums are right and whose contents are not. Every one is refused, by name and at once."""

import json
import os
import shutil
import socket
import struct
import time
import tracemalloc

import numpy as np
import pytest
import resealed
import synthetic
from click.testing import CliRunner
from numcodecs.pcodec import PCodec
from numcodecs.zstd import Zstd

from switchkd.cli.main import main
from switchkd.errors import StoreError
from switchkd.stores import TeacherStore
from switchkd.stores.chunk_codecs import with_checksum
from switchkd.stores.info import describe
from switchkd.stores.layout import GAP, OFFSET, PART_KEY, STATE, STATS
from switchkd.stores.status import status
from switchkd.stores.storage.paths import part_path
from switchkd.stores.verify import repair, verify

MANIFEST = synthetic.manifest(payload="both", hidden_dtype="steps", hidden_width=8, samples=4, part_size=2)
MOST_BYTES = 128 << 20
MOST_SECONDS = 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return synthetic.fill(tmp_path_factory.mktemp("whole") / "s.zarr", MANIFEST, lengths=(3, 40))


@pytest.fixture
def path(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "s.zarr")


def use(path):
    """Everything that reads a store."""
    store = TeacherStore(path)
    store.payload(list(range(len(store))))
    describe(path)
    status(path)
    return [finding.message for _, findings in verify(store) for finding in findings]


def refused(path, match=None):
    """Assert that reading is refused by a StoreError, in little time and memory; return its message."""
    begun = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(StoreError, match=match) as caught:
            use(path)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begun < MOST_SECONDS
    assert str(path) in str(caught.value)
    done = CliRunner().invoke(main, ["store", "info", str(path)])
    assert done.exit_code == 2 and not isinstance(done.exception, (TypeError, KeyError))
    return str(caught.value)


HUGE = (10**9, 10**12, 10**15, 10**30, -1, 0.5, True, None, "4", [4], {})


@pytest.mark.parametrize("value", HUGE, ids=str)
@pytest.mark.parametrize(
    "name",
    ("samples", "part_size", "top_k", "vocab_rows", "hidden_width", "max_length", "image_tokens", "fine", "coarse"),
)
def test_row_21_a_number_of_the_manifest(path, name, value):
    allowed = {
        "samples": (10**9, 10**12),  # checked against the parts
        "max_length": (10**9,),
        "image_tokens": (10**9,),
        "coarse": (0.5,),
        "part_size": (),
    }
    manifest = resealed.manifest_of(path)
    resealed.write_manifest(path, manifest | {name: value})
    if type(value) in (int, float) and value in allowed.get(name, ()) and name != "samples":
        use(path)  # decodes to other values, as the manifest says
    else:
        refused(path)


@pytest.mark.parametrize("value", (None, 1, "x", [], {"a": 1}, {"a": None}, {"1": ["ok"]}, "\ud800", "x" * (2 << 20)))
@pytest.mark.parametrize(
    "name",
    ("payload", "hidden_dtype", "teacher", "template", "tokenizer", "data", "statuses", "written_by", "stats_dtype"),
)
def test_row_21_a_text_of_the_manifest(path, name, value):
    resealed.write_manifest(path, resealed.manifest_of(path) | {name: value})
    if isinstance(value, str) and name in ("tokenizer", "data", "stats_dtype") and value == "x":
        assert use(path) == []
    else:
        refused(path)


@pytest.mark.parametrize(
    "statuses", ({}, {"1": "a"}, {"0": "ok", "x": "a"}, {"0": "ok", "256": "a"}, {"0": "ok", "01": "a"})
)
def test_row_21_statuses_that_are_no_codes(path, statuses):
    resealed.write_manifest(path, resealed.manifest_of(path) | {"statuses": statuses})
    refused(path, "statuses")


@pytest.mark.parametrize(
    "text",
    (
        "[" * 100_000,
        '{"attributes": ' * 50_000,
        '{"attributes": {"switchkd": ' + "9" * 5000 + "}}",
        '{"attributes": {"switchkd": NaN}}',
        '{"attributes": {"switchkd": 1e999}}',
        '{"attributes": []}',
        "\udcff",
        " " * (40 << 20),
    ),
    ids=("nested lists", "nested objects", "digits", "NaN", "infinity", "list", "no UTF-8", "large"),
)
@pytest.mark.parametrize("where", ("zarr.json", "parts/00001/zarr.json", "vocab/id_of_rank/zarr.json"))
def test_row_21_json_that_is_no_metadata(path, where, text):
    (path / where).write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(path)


@pytest.mark.parametrize(
    "name",
    (
        "../x",
        "a/../../x",
        "/etc/passwd",
        "a//b",
        "./a",
        "a\\b",
        "..\\x",
        "a/",
        "",
        "a\0b",
        "a\nb",
        "C:/x",
        ".writing/x",
    ),
)
def test_row_21_a_file_name_that_leaves_the_part(path, name):
    (path / "parts/x").write_text("")
    record = resealed.record_of(part_path(path, 1))
    record["files"][name] = {"bytes": 0, "blake2b": "0" * 16}
    resealed.write_record(part_path(path, 1), record)
    refused(path, "which is not a path below the part's folder")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, value) for key in ("part", "samples", "positions") for value in (True, 1.0, "1", -1, 10**15, 10**400)),
        *((key, value) for key in ("store", "tables") for value in (None, 1, ["x"], {})),
        *(
            ("files", value)
            for value in (None, [], "x", {"a": 1}, {"a": {}}, {"a": {"bytes": "3", "blake2b": "0" * 16}})
        ),
        ("files", {"a": {"bytes": 10**30, "blake2b": "0" * 16}}),
        ("files", {"a": {"bytes": 3, "blake2b": None}}),
        ("files", {"a": {"bytes": 3, "blake2b": "0" * 16, "crc32c": 7}}),
        ("files", {"a": {"bytes": 3, "blake2b": "0" * 16, "crc32c": "0" * 9}}),
    ],
)
def test_row_21_a_field_of_a_parts_record(path, key, value):
    record = resealed.record_of(part_path(path, 1))
    resealed.write_record(part_path(path, 1), record | {key: value})
    refused(path, "00001")


@pytest.mark.parametrize(
    "written",
    (
        None,
        {},
        {"by": 1, "at": 2},
        {"by": "x", "at": "yesterday"},
        {"by": "x", "at": "0001-01-01T00:00:00+23:59"},
    ),
)
def test_row_21_a_record_that_does_not_say_who_wrote_it(path, written):
    resealed.write_record(part_path(path, 1), resealed.record_of(part_path(path, 1)) | {"written": written})
    with pytest.raises(StoreError, match="does not say who wrote the part"):
        status(path)


@pytest.mark.parametrize("record", (None, [], 1, "x", {}))
def test_row_21_a_record_that_is_none(path, record):
    data = resealed.load(part_path(path, 1) / "zarr.json")
    data["attributes"][PART_KEY] = record
    (part_path(path, 1) / "zarr.json").write_text(json.dumps(data))
    refused(path, "00001")


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


@pytest.mark.parametrize(
    "where",
    (
        "zarr.json",
        "parts/00001/zarr.json",
        "parts/00001/stats/c/0/0",
        "parts/00001/samples/offset/c/0",
        "vocab/id_of_rank/c/0",
        "hidden/step/zarr.json",
    ),
)
@pytest.mark.parametrize("kind", ("pipe", "link out", "link in", "folder", "socket", "device", "dangling link"))
def test_row_21_only_regular_files_are_opened(path, tmp_path, monkeypatch, where, kind):
    file = path / where
    kept = tmp_path / "kept"
    file.rename(kept)
    match kind:
        case "pipe":
            os.mkfifo(file)
        case "link out":
            file.symlink_to(kept)
        case "link in":
            file.with_name("beside").write_bytes(kept.read_bytes())
            file.symlink_to(file.with_name("beside"))
        case "folder":
            file.mkdir()
        case "socket":
            monkeypatch.chdir(file.parent)  # the path of a socket is short
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(file.name)
        case "device":
            try:
                os.mknod(file, 0o020666, os.makedev(1, 5))  # /dev/zero
            except PermissionError:
                pytest.skip("needs root")
        case _:
            file.symlink_to(tmp_path / "nowhere")
    if kind == "dangling link" and where in ("zarr.json", "parts/00001/zarr.json"):
        with pytest.raises(StoreError):
            TeacherStore(path).check_complete()
    else:
        refused(path)


@pytest.mark.parametrize(
    "where", ("parts", "parts/00001", "parts/00001/stats", "parts/00001/samples", "vocab", "hidden/step")
)
def test_row_21_a_folder_that_is_a_link_out_of_the_store(path, tmp_path, where):
    (path / where).rename(tmp_path / "elsewhere")
    (path / where).symlink_to(tmp_path / "elsewhere")
    refused(path)
    if where == "parts/00001":
        assert repair(TeacherStore(path)).dropped == [1]
        assert not (path / where).is_symlink() and (tmp_path / "elsewhere/zarr.json").exists()
        synthetic.fill(path, MANIFEST, lengths=(3, 40))
        assert use(path) == []


def test_row_21_the_store_itself_may_be_a_link(path, tmp_path):
    (tmp_path / "link.zarr").symlink_to(path)
    assert use(tmp_path / "link.zarr") == []


@pytest.mark.parametrize(
    "where", ("zarr.json", "parts/00001/zarr.json", "parts/00001/stats/zarr.json", "vocab/id_of_rank/c/0")
)
def test_row_21_a_sparse_file_of_a_terabyte(path, where):
    os.truncate(path / where, 1 << 40)
    refused(path)


def test_row_21_names_beside_the_parts_are_no_parts(path):
    for name in ("notes", "0", "1", "000000", "99999999", "-0001", "٠٠٠٠١"):
        folder = path / "parts" / name
        folder.mkdir()
        (folder / "zarr.json").write_text("{}")
    assert TeacherStore(path).parts() == [0, 1]
    assert use(path) == []
