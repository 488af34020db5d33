"""Row 21: stores whose checksums are right and whose metadata are not. Every one is refused, by name and at once."""

import json

import hostile
import pytest
import resealed

from switchkd.errors import StoreError
from switchkd.stores.layout import PART_KEY
from switchkd.stores.status import status
from switchkd.stores.storage.paths import part_path

whole, path, use, refused = hostile.whole, hostile.path, hostile.use, hostile.refused


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
