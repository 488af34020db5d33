"""A part's arrays as files: zarr reads what is written here, and what zarr writes is read here."""

import errno
import os
import re

import numpy as np
import pytest
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from switchkd.errors import StoreError, StoreUnreadable
from switchkd.stores import layout
from switchkd.stores.part import read_chunks
from switchkd.stores.shards import Description, Shard, encode_shard
from switchkd.stores.storage.local import AHEAD, LocalStorage

POSITIONS = (0, 1, 255, 256, 257, 600)


def arrays(positions):
    """One array of each kind, by its name: some zeros, some chunks of nothing but zeros."""
    random = np.random.default_rng(positions)
    made = {
        layout.GAP: random.integers(0, 1 << 16, (positions, 100)).astype(np.uint16),
        layout.HEIGHT: random.integers(0, 400, (positions, 100)).astype(np.uint16),
        layout.BOTTOM: random.integers(0, 400, positions).astype(np.uint16),
        layout.STATS: random.normal(size=(positions, 5)).astype(np.float32),
        layout.STATE: random.normal(size=(positions, 40)).astype(np.float16),
        layout.SCALE: random.random((positions, 2)).astype(np.float16),
        layout.OFFSET: np.arange(positions + 1),
        layout.DIGEST: random.integers(0, 1 << 64, (positions, 3), dtype=np.uint64),
        layout.STATUS: np.zeros(positions, np.uint8),
    }
    made[layout.GAP][:300, :32] = made[layout.HEIGHT][300:] = made[layout.STATS][:] = 0
    return made


def described(name, values):
    """An empty array of a part, its metadata and the files of its group."""
    files = {}
    group = zarr.create_group(MemoryStore(files))
    array = group.create_array(name, dtype=values.dtype, **layout.array_options(name, values.shape))
    return array, Description.parse(name, files[f"{name}/zarr.json"].to_bytes()), files


def shard_of(folder, name, files):
    """Open an array whose files are laid into a folder."""
    for key, content in files.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(content.to_bytes())
    return Shard(name, files[f"{name}/zarr.json"].to_bytes(), {key: len(files[key]) for key in files})


def written(folder, name, values):
    """Write an array as the writer does, and open it."""
    _, description, files = described(name, values)
    content = encode_shard(description, values)
    files[f"{name}/{description.file}"] = default_buffer_prototype().buffer.from_bytes(content)
    return shard_of(folder, name, files)


def read(folder, wanted):
    return list(read_chunks(LocalStorage(folder), wanted))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", arrays(0))
def test_zarr_reads_what_is_written_here(name, positions):
    values = arrays(positions)[name]
    array, description, files = described(name, values)
    content = encode_shard(description, values)
    assert (content is None) == (not values.any())
    if content is not None:
        files[f"{name}/{description.file}"] = default_buffer_prototype().buffer.from_bytes(content)
    assert np.array_equal(array[...], values)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", arrays(0))
def test_what_zarr_writes_is_read_here(tmp_path, name, positions):
    values = arrays(positions)[name]
    array, _, files = described(name, values)
    array[...] = values
    shard = shard_of(tmp_path, name, files)
    assert len(shard) == len(values)
    last = shard.chunk_count - 1
    wanted = [(shard, numbers) for numbers in (range(shard.chunk_count), [last], sorted({0, last}), range(last + 1))]
    for (_, numbers), found in zip(wanted, read(tmp_path, wanted), strict=True):
        for number, chunk in zip(numbers, found, strict=True):
            begin = number * shard.chunk_rows
            expected = values[begin : begin + shard.chunk_rows]
            assert np.array_equal(chunk[: len(expected)], expected)
            assert chunk.shape == (shard.chunk_rows, *values.shape[1:])


def test_both_write_the_same_chunks():
    """Only their order in the file differs: rows after rows here, so that a sample's chunks are read in one go."""
    values = arrays(600)[layout.GAP]
    array, description, files = described(layout.GAP, values)
    array[...] = values
    here, there = encode_shard(description, values), files[f"{layout.GAP}/{description.file}"].to_bytes()
    assert len(here) == len(there) and here != there

    def chunks(content):
        index = np.frombuffer(content[-description.index_bytes : -4], "<u8").reshape(-1, 2)
        return [content[begin : begin + size] for begin, size in index.tolist() if size < len(content)]

    assert chunks(here) == chunks(there)
    assert b"".join(chunks(here)) == here[: -description.index_bytes]


def test_many_files_are_asked_for_at_once_and_not_too_many_are_open(tmp_path, monkeypatch):
    values = arrays(600)[layout.STATE]
    shard = written(tmp_path, layout.STATE, values)
    numbers = np.random.default_rng(0).integers(0, shard.chunk_count, 3 * AHEAD).tolist()
    now, most = set(), []
    opened, closed = os.open, os.close
    monkeypatch.setattr(os, "open", lambda *a: now.add(handle := opened(*a)) or most.append(len(now)) or handle)
    monkeypatch.setattr(os, "close", lambda handle: now.discard(handle) or closed(handle))
    found = read(tmp_path, [(shard, [number]) for number in numbers])
    for number, (chunk,) in zip(numbers, found, strict=True):
        expected = values[number * shard.chunk_rows :][: shard.chunk_rows]
        assert np.array_equal(chunk[: len(expected)], expected)
    assert max(most) == AHEAD and not now
    some = read_chunks(LocalStorage(tmp_path), [(shard, [number]) for number in numbers])
    next(some)
    assert now
    some.close()
    assert not now  # a reader that stops early leaves nothing open


def test_an_index_is_asked_for_once(tmp_path, monkeypatch):
    values = arrays(600)[layout.STATE]
    shard, asked, ranges = written(tmp_path, layout.STATE, values), [], LocalStorage.read_ranges
    monkeypatch.setattr(
        LocalStorage, "read_ranges", lambda self, requests: asked.append(len(requests)) or ranges(self, requests)
    )
    read(tmp_path, [(shard, [0]), (shard, [1]), (shard, [0, 2])])
    assert asked == [1, 3]


@pytest.mark.parametrize("where", (layout.STATE, layout.STATS))
@pytest.mark.parametrize("indexed", (True, False))
@pytest.mark.parametrize("left", (0, 3, 60))
def test_a_file_cut_short_after_it_was_opened_is_named(tmp_path, where, indexed, left):
    values = np.random.default_rng(0).normal(size=(600, 5)).astype(np.float32)  # a chunk has far more than 60 bytes
    shards = [written(tmp_path, name, values) for name in (layout.STATE, layout.STATS)]
    wanted = [(shard, [0]) for shard in shards]
    if indexed:
        read(tmp_path, wanted)
    file = tmp_path / where / "c/0/0"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(StoreError, match=f"^{re.escape(str(tmp_path / where))}: .*; it was damaged after writing"):
        read(tmp_path, wanted)


def test_a_disk_that_fails_is_told_of_the_right_array(tmp_path, monkeypatch):
    shards = [written(tmp_path, name, np.ones((600, 5), np.float32)) for name in (layout.STATE, layout.STATS)]
    wanted = [(shard, [0]) for shard in shards]
    read(tmp_path, wanted)
    pread, calls = os.pread, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", failing)
    where = re.escape(str(tmp_path / layout.STATS))
    with pytest.raises(StoreUnreadable, match=f"^{where}.* could not be read: Input/output error"):
        read(tmp_path, wanted)


def test_runs_of_bytes_in_any_order(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(100)))
    orders = ([(0, 10), (50, 60), (20, 30)], [(0, 10), (10, 40), (40, 41)], [(40, 50), (30, 40)], [(5, 9)], [])
    found = list(LocalStorage(tmp_path).read_ranges([("file", spans) for spans in orders]))
    assert found == [[bytes(range(begin, end)) for begin, end in spans] for spans in orders]


def test_a_file_that_has_gone_is_named(tmp_path):
    shards = [written(tmp_path, name, np.ones((600, 5), np.float32)) for name in (layout.STATE, layout.STATS)]
    wanted = [(shard, [0]) for shard in shards]
    read(tmp_path, wanted)
    gone = tmp_path / layout.STATS / "c/0/0"
    gone.unlink()
    with pytest.raises(StoreError, match=f"^{re.escape(str(gone))}: .*No such file"):
        read(tmp_path, wanted)


@pytest.mark.parametrize("metadata", (b"", b"[]", b'{"shape": [3]}'))
def test_metadata_of_something_else_are_refused(metadata):
    with pytest.raises(ValueError, match=r"^a/zarr\.json does not describe an array of a store"):
        Description.parse("a", metadata)
