"""Odd and hostile data files end in a message that says what to do, never in a traceback, and no cache gives other rows.

Members: JSON nested deep and huge numbers, packed files, upper-case endings, hubs' layouts, splits, objects around the rows, files
that are no files; caches that were cut, that cannot be written, and files of equal name, size and time.
"""

import bz2
import gzip
import json
import lzma
import os
import shutil
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import tiny
from click.testing import CliRunner

from switchkd.cli.main import main
from switchkd.data import dataset_files, row_cache
from switchkd.data.samples import SampleFile
from switchkd.errors import DataError, RunError

ROWS = [{"conversations": tiny.conversation(("what ?", answer))} for answer in ("red", "blue", "a", "it")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def write_parquet(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, compression="none", use_dictionary=False)
    return path


def answers(path):
    return [sample.turns[0][1] for sample in SampleFile(path)]


def check(path):
    """Run `data check`, and return its exit code and output; a traceback fails."""
    done = CliRunner().invoke(main, ["data", "check", str(path)])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done.exit_code, done.output


DEEP = "[" * 100_000 + "]" * 100_000
HUGE = "1" * 5000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (DEEP, "nested too deep"),
        (json.dumps(ROWS)[:-1] + ', {"id": ' + DEEP + "}]", "nested too deep"),
        ('{"id": ' + DEEP + "}", "line 1, is nested too deep"),
        (json.dumps(ROWS[0]) + "\n" + '{"id": ' + HUGE + "}", "line 2, holds a number that cannot be read"),
        (f'[{{"id": {HUGE}}}]', "holds a number that cannot be read"),
        ('{"data": [\n{"id": 1}\n]}', "one that spans several lines is not read"),
        ("", "is not JSON"),
        ("null", "should hold a list"),
        ('"text"', "should hold a list"),
        ("[]", "should hold a list with at least one row"),
        ("[1, 2", "is not JSON"),
        ("\x1b[31m", r"is not JSON"),
    ],
)  # fmt: skip
def test_json_that_cannot_be_read(text, words, tmp_path):
    (tmp_path / "a.json").write_text(text)
    code, output = check(tmp_path / "a.json")
    assert code == 2 and words in output, output
    assert "\x1b" not in output and len(output) < 1000


@pytest.mark.parametrize("key", ["data", "rows", "annotations", "train"])
def test_rows_inside_an_object_are_named(key, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, key: ROWS}))
    code, output = check(tmp_path / "a.json")
    assert code == 2 and f"the list under its key {key!r}: write that list alone" in output


@pytest.mark.parametrize(
    "value", [10**4000, 1e400, -0.0, True, [[[1]]], {"a": {"b": 1}}, "x" * 100_000, "\ud800", "\x1b[31m"]
)
def test_an_id_of_any_kind_is_text(value, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([ROWS[0] | {"id": value, "question_type": value}]))
    assert SampleFile(tmp_path / "a.json")[0].id
    assert check(tmp_path / "a.json")[0] == 0


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl.bz2", "a.xz"])
@pytest.mark.parametrize(
    ("pack", "tool"), [(gzip.compress, "gunzip"), (bz2.compress, "bunzip2"), (lzma.compress, "unxz")]
)
def test_packed_files_are_refused_with_the_tool(name, pack, tool, tmp_path):
    (tmp_path / name).write_bytes(pack(json.dumps(ROWS).encode()))
    code, output = check(tmp_path / name)
    assert code == 2 and f"is packed: unpack it with `{tool}" in output


@pytest.mark.parametrize("name", ["a.parquet", "a.PARQUET", "a.Parquet"])
def test_endings_in_any_case(name, tmp_path):
    path = write_parquet(tmp_path / "folder" / name)
    assert answers(path) == answers(path.parent) == ["red", "blue", "a", "it"]


def test_parquet_and_arrow_behind_another_ending_are_refused_by_name(tmp_path):
    path = write_parquet(tmp_path / "a.json")
    assert "a parquet file: its name must end in .parquet" in check(path)[1]
    path.write_bytes(b"ARROW1\0\0rest")
    assert "an Arrow file" in check(path)[1]


@pytest.mark.parametrize("folder", ["", "data"])
def test_a_folder_as_hubs_lay_it_out(folder, tmp_path):
    place = tmp_path / "set"
    write_parquet(place / folder / "train-00000-of-00002.parquet", ROWS[:2])
    write_parquet(place / folder / "train-00001-of-00002.parquet", ROWS[2:])
    (place / "README.md").touch()
    assert answers(place) == ["red", "blue", "a", "it"]


@pytest.mark.parametrize("other", ["test-00000-of-00001.parquet", "validation.parquet", "dev-00000-of-00001.PARQUET"])
@pytest.mark.parametrize("folder", ["", "data"])
def test_splits_are_not_mixed(folder, other, tmp_path):
    write_parquet(tmp_path / "set" / folder / "train-00000-of-00001.parquet")
    write_parquet(tmp_path / "set" / folder / other)
    code, output = check(tmp_path / "set")
    assert code == 2 and "holds the splits" in output and "pass one file of it" in output


def test_subsets_below_a_folder_are_named(tmp_path):
    write_parquet(tmp_path / "set/subset/train.parquet")
    code, output = check(tmp_path / "set")
    assert code == 2 and "set/subset: pass one of them" in output


def test_what_is_neither_file_nor_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    code, output = check(tmp_path / "pipe.json")
    assert code == 2 and "neither a file nor a folder" in output


@pytest.mark.parametrize("size", [0, 4, 50, -50])
@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_files_that_were_cut(ending, size, tmp_path):
    path = write_parquet(tmp_path / "a.parquet")
    if ending == "arrow":
        path = tmp_path / "a.arrow"
        table = pa.Table.from_pylist(ROWS)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    path.write_bytes(path.read_bytes()[:size])
    code, output = check(path)
    assert code == 2 and "cannot be read as a data set" in output


@pytest.mark.parametrize("base64", ["data:image/png;base64," + "A" * 50_000, "A" * 50_000])
def test_an_image_as_base64_is_not_printed_whole(base64, tmp_path):
    (tmp_path / "images").mkdir()
    rows = [ROWS[0] | {"image": base64}, ROWS[1]]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    done = CliRunner().invoke(main, ["data", "check", str(tmp_path / "a.json"), "--images", str(tmp_path / "images")])
    assert done.exit_code == 0 and len(done.output) < 3000, done.output[:300]


# Caches


def same_times(path, content):
    """Replace a file's content, keeping its name, size and time of change."""
    about = path.stat()
    assert len(content) == about.st_size and content != path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def twin(path, old, new):
    data = path.read_bytes()
    assert old in data and len(old) == len(new)
    return data.replace(old, new)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "folder of parquet"])
@pytest.mark.parametrize("way", ["overwritten", "replaced", "another folder"])
def test_files_of_equal_name_size_and_time_are_read_each(kind, way, tmp_path):
    path = tmp_path / "one" / ("a.arrow" if kind == "arrow" else "a.parquet")
    write_parquet(path)
    if kind == "arrow":
        table = pa.Table.from_pylist(ROWS)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    opened = path.parent if kind.startswith("folder") else path
    assert answers(opened)[1] == "blue"
    content = twin(path, b"blue", b"what")
    if way == "overwritten":
        same_times(path, content)
    else:
        other = shutil.copy2(path, tmp_path / "copy")
        same_times(other, content)
        target = path if way == "replaced" else tmp_path / "two" / path.name
        target.parent.mkdir(exist_ok=True)
        other.rename(target)
        opened = target.parent if kind.startswith("folder") else target
    assert answers(opened)[1] == "what"


def test_the_identity_covers_content_where_times_say_nothing(tmp_path, monkeypatch):
    """As on a file system that keeps neither inodes nor the time of the last change."""
    paths = [tmp_path / name / "a.parquet" for name in ("one", "two")]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        path.write_bytes(bytes(500_000) + bytes([number]) + bytes(500_000))
    real = Path.stat
    monkeypatch.setattr(
        Path, "stat", lambda path, **more: os.stat_result((*real(path)[:1], 1, 1, *real(path)[3:7], 0, 0, 0))
    )
    assert dataset_files.identity_of(paths[:1]) != dataset_files.identity_of(paths[1:])


@pytest.mark.parametrize("size", [0, 1, 100, 0.5, -8, -1])
def test_a_row_cache_that_was_cut_is_made_again(size, cache, tmp_path):
    rows = ROWS * 1000
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert len(SampleFile(tmp_path / "a.json")) == 4000
    (path,) = cache.rglob("*.arrow")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * size) if 0 < size < 1 else size])
    assert answers(tmp_path / "a.json") == [row["conversations"][1]["value"] for row in rows]


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"null"])
def test_a_row_cache_whose_description_is_damaged_is_made_again(content, cache, tmp_path):
    path = write_parquet(tmp_path / "a.parquet")
    assert len(SampleFile(path)) == 4
    for info in cache.rglob("dataset_info.json"):
        info.write_bytes(content)
    assert answers(path) == ["red", "blue", "a", "it"]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_cache_that_cannot_be_written_is_a_failed_run_with_a_remedy(kind, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "below")
    path = write_parquet(tmp_path / "a.parquet")
    if kind == "json":
        path = tmp_path / "a.json"
        path.write_text(json.dumps(ROWS))
    with pytest.raises(RunError, match="HF_DATASETS_CACHE"):
        SampleFile(path)
    assert check(path)[0] == 1


def test_an_error_of_the_data_is_not_taken_for_one_of_the_cache(cache, tmp_path):
    (tmp_path / "a.json").write_text("[1, 2")
    with pytest.raises(DataError, match="is not JSON"):
        SampleFile(tmp_path / "a.json")
    assert not list(cache.rglob("*.arrow")) and row_cache.cache_folder("x").parent == cache / "switchkd"


def test_the_fingerprint_of_a_data_set_is_that_of_earlier_versions(tmp_path):
    """It is part of the identity of stores. The number was computed by the version before notes and weights."""
    rows = [{"image": None, "question_type": None} | row for row in tiny.rows(7, text_only=(1, 4), two_turns=(2, 4))]
    rows[3]["conversations"] = rows[3]["conversations"][:1]
    found = SampleFile(write_parquet(tmp_path / "a.parquet", rows)).fingerprint
    assert found == "73b2715a2688f3f8c0a5edaabc518df704d39acd64af805f7bc2f9e38af552f1"
