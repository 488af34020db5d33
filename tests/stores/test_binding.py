"""Row 11: a file is read only in the part that it was written for, and a part only if it is whole.

Row 14: an unfinished part is removed only if its writer is dead, and a part that lost its files is not committed.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import resealed
import synthetic

from switchkd.errors import RunError, StoreError
from switchkd.stores import TeacherStore
from switchkd.stores.layout import BOTTOM, DIGEST, GAP, HEIGHT, OFFSET, ORDER, STATE, STATS, STATUS
from switchkd.stores.storage import staging
from switchkd.stores.storage.paths import WRITING, part_path
from switchkd.stores.verify import repair, verify

MANIFEST = synthetic.manifest(payload="both", hidden_dtype="steps", hidden_width=8, samples=6, part_size=2)
LENGTHS = (40, 300)
POSITION_ARRAYS = (STATS, GAP, HEIGHT, BOTTOM, ORDER, STATE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return synthetic.fill(tmp_path_factory.mktemp("whole") / "s.zarr", MANIFEST, lengths=LENGTHS)


@pytest.fixture
def path(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "s.zarr")


def read_all(path):
    store = TeacherStore(path)
    return store.payload(list(range(len(store)))), [store.digest(index) for index in range(len(store))]


def chunk(path, part, array):
    (found,) = [file for file in (part_path(path, part) / array / "c").rglob("*") if file.is_file()]
    return found


def other_part(of, part):
    """The same samples and positions, other values, as another capture would write them."""
    arrays = synthetic.part_arrays(of, part, LENGTHS)
    payload = arrays.payload
    changed = {
        "stats": payload.stats[::-1].copy(),
        "ids": payload.ids[::-1].copy(),
        "logits": payload.logits[::-1].copy(),
        "hidden": payload.hidden[::-1].copy(),
    }
    return replace(arrays, payload=replace(payload, **changed), digest=arrays.digest[::-1].copy())


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A store of the same identity, tables, shapes and counts, with other values."""
    path = tmp_path_factory.mktemp("stranger") / "s.zarr"
    writer = synthetic.open_writer(path, MANIFEST)
    for part in range(MANIFEST.part_count):
        writer.write_part(part, other_part(MANIFEST, part))
    return path


@pytest.mark.parametrize("array", POSITION_ARRAYS)
def test_row_11_a_shard_of_another_part_is_refused(path, stranger, array):
    """Its checksums are right; if it is longer than the one it replaces, the part's list says the new size."""
    ours, theirs = chunk(path, 1, array), chunk(stranger, 1, array)
    assert ours.read_bytes() != theirs.read_bytes()
    shutil.copy(theirs, ours)
    record = resealed.record_of(part_path(path, 1))
    name = str(ours.relative_to(part_path(path, 1)))
    record["files"][name]["bytes"] = ours.stat().st_size  # the worst case: the same size
    resealed.write_record(part_path(path, 1), record)
    with pytest.raises(StoreError, match=f"parts/00001/{array}: .*; it was damaged"):
        read_all(path)
    assert [part for part, findings in verify(TeacherStore(path)) if findings] == [1]


@pytest.mark.parametrize("array", (OFFSET, DIGEST, STATUS))
def test_row_11_a_table_of_another_part_is_refused(path, array, tmp_path):
    of = replace(MANIFEST, samples=6)
    other = tmp_path / "other.zarr"
    writer = synthetic.open_writer(other, of)
    arrays = synthetic.part_arrays(of, 1, LENGTHS)
    changed = {
        OFFSET: {"positions": arrays.positions[::-1] + np.array([-1, 1])},
        DIGEST: {"digest": arrays.digest + np.uint64(1)},
        STATUS: {"status": np.array([0, 1], np.uint8)},
    }[array]
    writer.write_part(1, replace(arrays, **changed))
    target = part_path(path, 1) / chunk(other, 1, array).relative_to(part_path(other, 1))
    record = resealed.record_of(part_path(path, 1))
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(chunk(other, 1, array), target)
    name = str(target.relative_to(part_path(path, 1)))
    record["files"].setdefault(name, {"blake2b": "0" * 16})["bytes"] = target.stat().st_size
    resealed.write_record(part_path(path, 1), record)
    with pytest.raises(StoreError, match=f"parts/00001/{array}/c/.* is not what was written"):
        read_all(path)


def test_row_11_a_part_without_the_checksums_of_its_chunks_is_read(path):
    """Parts that were written before the field existed."""
    expected = read_all(path)[0]
    for part in range(3):
        record = resealed.record_of(part_path(path, part))
        assert any("crc32c" in about for about in record["files"].values())
        for about in record["files"].values():
            about.pop("crc32c", None)
        resealed.write_record(part_path(path, part), record)
    found = read_all(path)[0]
    assert all((a == b).all() for a, b in zip(found.arrays().values(), expected.arrays().values(), strict=True))
    assert not any(findings for _, findings in verify(TeacherStore(path)))


def write_part_with(path, part, **changed):
    shutil.rmtree(part_path(path, part))
    arrays = synthetic.part_arrays(MANIFEST, part, LENGTHS)
    synthetic.open_writer(path, MANIFEST).write_part(part, replace(arrays, **changed))


@pytest.mark.parametrize(
    ("positions", "status", "message"),
    [
        ((-10, 1210), (0, 0), "does not rise from 0"),
        ((1210, -10), (0, 0), "does not rise from 0"),
        ((1025, 175), (0, 0), "a sample has 1025 positions, more than 1024 tokens"),
        ((600, 600), (1, 0), "a skipped sample has positions"),
        ((600, 600), (77, 0), "a skipped sample has positions"),
        ((0, 600), (77, 0), r"samples/status holds unknown codes \[77\]"),
    ],
)
def test_row_11_tables_that_contradict_themselves_are_refused_on_opening(path, positions, status, message):
    arrays = synthetic.part_arrays(MANIFEST, 1, (300,))
    times = sum(positions) // 600
    payload = {name: np.concatenate([array] * times) for name, array in arrays.payload.arrays().items()}
    shutil.rmtree(part_path(path, 1))
    changed = {"positions": np.array(positions), "status": np.array(status, np.uint8)}
    arrays = replace(arrays, payload=replace(arrays.payload, **payload), **changed)
    synthetic.open_writer(path, MANIFEST).write_part(1, arrays)
    with pytest.raises(StoreError, match=f"parts/00001: .*{message}.*; it was damaged"):
        TeacherStore(path)[2]
    assert [part for part, findings in verify(TeacherStore(path)) if findings] == [1]


@pytest.mark.parametrize(
    "kept", ([], ["stats"], ["samples", "topk", "stats"]), ids=("empty", "some", "all but its own")
)
def test_row_11_a_folder_without_its_zarr_json_is_no_part(path, whole, kept):
    folder = part_path(path, 1)
    for entry in folder.iterdir():
        if entry.name not in kept:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    store = TeacherStore(path)
    assert store.parts() == [0, 2]
    with pytest.raises(StoreError, match="has no part 1; run the same"):
        store[2]
    with pytest.raises(StoreError, match="holds 2 of 3 parts"):
        store.check_complete()
    writer = synthetic.open_writer(path, MANIFEST)
    assert writer.missing_parts() == [1]
    assert writer.write_part(1, synthetic.part_arrays(MANIFEST, 1, LENGTHS)) is True
    synthetic.assert_same_store(path, whole)


def test_row_11_a_hollow_part_is_refused(path):
    """Its own zarr.json is well formed and lists nothing."""
    folder = part_path(path, 1)
    for entry in folder.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else None
    resealed.reseal(folder)
    with pytest.raises(StoreError, match="parts/00001 has no array samples/offset; it was damaged"):
        read_all(path)
    assert repair(TeacherStore(path)).dropped == [1]


@pytest.mark.parametrize("array", (*POSITION_ARRAYS, OFFSET, DIGEST))
def test_row_11_a_shard_that_is_not_listed_is_refused(path, array):
    """It would be taken for one that was not written, because all its values are 0."""
    record, file = resealed.record_of(part_path(path, 1)), chunk(path, 1, array)
    del record["files"][str(file.relative_to(part_path(path, 1)))]
    resealed.write_record(part_path(path, 1), record)
    with pytest.raises(StoreError, match=f"parts/00001: its list lacks {array}/c/.*, which is there; it was damaged"):
        read_all(path)


@pytest.mark.parametrize("array", (STATS, OFFSET))
def test_row_11_a_part_that_lists_no_values_is_refused(path, array):
    """All values of an array may be 0 and then have no file, but not these."""
    folder = part_path(path, 1)
    shutil.rmtree(folder / array / "c")
    resealed.reseal(folder)
    with pytest.raises(StoreError, match=r"parts/00001.*(positions without statistics|its samples have 0)"):
        read_all(path)


def test_row_11_another_writer_that_commits_meanwhile_wins(path, whole, monkeypatch):
    """Between finding a folder that is no part and moving it away, another writer makes it one."""
    folder = part_path(path, 1)
    (folder / "zarr.json").unlink()
    writer, rename = synthetic.open_writer(path, MANIFEST), os.rename

    def overtaken(source, target):
        if "-dropped-" in str(target) and "00001" in str(source):
            monkeypatch.setattr(os, "rename", rename)
            shutil.rmtree(folder)
            synthetic.open_writer(path, MANIFEST).write_part(1, synthetic.part_arrays(MANIFEST, 1, LENGTHS))
        return rename(source, target)

    monkeypatch.setattr(os, "rename", overtaken)
    assert writer.write_part(1, other_part(MANIFEST, 1)) is False
    synthetic.assert_same_store(path, whole)


# Writers


def test_row_14_the_name_of_an_unfinished_folder_tells_containers_apart(monkeypatch):
    here = staging.unfinished_name("00001").split("-")
    assert here[:3] == list(staging.machine()) and here[3] == str(os.getpid())
    assert here[1] in Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")
    assert here[2] in os.readlink("/proc/self/ns/pid")


@pytest.mark.parametrize(
    "machine", [("host", "b00t", "4026531836"), ("host", "b00t", "4026539999"), ("host", "0", "0")]
)
def test_row_14_a_writer_of_another_namespace_keeps_its_unfinished_part(path, whole, monkeypatch, machine):
    """Two containers with one host name, both with a process that does not exist in the other one."""
    shutil.rmtree(part_path(path, 1))
    first, second = synthetic.open_writer(path, MANIFEST), []
    monkeypatch.setattr(staging, "machine", lambda: machine)
    monkeypatch.setattr(os, "getpid", lambda: 4_000_001)
    sync = staging._sync_folder

    def meanwhile(folder):
        """The other writer opens the store while this one's files lie in `.writing`."""
        if not second:
            with monkeypatch.context() as patch:
                patch.setattr(staging, "machine", lambda: ("host", "b00t", "4026530000"))
                second.append(synthetic.open_writer(path, MANIFEST))
        return sync(folder)

    monkeypatch.setattr(staging, "_sync_folder", meanwhile)
    assert first.write_part(1, synthetic.part_arrays(MANIFEST, 1, LENGTHS)) is True
    assert second
    synthetic.assert_same_store(path, whole)


@pytest.mark.parametrize("after", (1, 3, 9, 20, "all"))
def test_row_14_a_part_that_lost_its_files_is_not_committed(path, whole, monkeypatch, after):
    """Another program removes the unfinished folder while its files are written, or when all are."""
    shutil.rmtree(part_path(path, 1))
    write, left = staging._write, [after]

    def sweep():
        for folder in (path / WRITING).iterdir():
            os.rename(folder, folder.with_name("swept"))
            shutil.rmtree(folder.with_name("swept"))

    def swept(file, data):
        write(file, data)
        if left[0] != "all":
            left[0] -= 1
            if left[0] == 0:
                sweep()

    monkeypatch.setattr(staging, "_write", swept)
    if after == "all":
        commit = staging.commit
        monkeypatch.setattr(staging, "commit", lambda *arguments: sweep() or commit(*arguments))
    with pytest.raises(RunError, match="cannot write part 1"):
        synthetic.open_writer(path, MANIFEST).write_part(1, synthetic.part_arrays(MANIFEST, 1, LENGTHS))
    monkeypatch.undo()
    assert TeacherStore(path).parts() == [0, 2]
    synthetic.fill(path, MANIFEST, lengths=LENGTHS)
    synthetic.assert_same_store(path, whole)


@pytest.mark.parametrize("gone", ("stats/c/0/0", "samples/offset/zarr.json", "zarr.json"))
def test_row_14_a_part_that_lost_one_file_is_not_committed(path, monkeypatch, gone):
    shutil.rmtree(part_path(path, 1))
    commit = staging.commit

    def without(folder, target, files):
        (folder / gone).unlink()
        return commit(folder, target, files)

    monkeypatch.setattr(staging, "commit", without)
    with pytest.raises(RunError, match=f"cannot write part 1 .*{gone}"):
        synthetic.open_writer(path, MANIFEST).write_part(1, synthetic.part_arrays(MANIFEST, 1, LENGTHS))
    assert TeacherStore(path).parts() == [0, 2]


def test_row_14_folders_are_renamed_before_they_are_removed(path, monkeypatch):
    """A writer that lives after all then fails, instead of finding its folder half empty."""
    leftover = path / WRITING / "-".join([*staging.machine(), "4000001", "00001", "0a"])
    (leftover / "stats").mkdir(parents=True)
    deleted = []
    monkeypatch.setattr(staging, "delete", lambda folder: deleted.append((folder, leftover.exists())))
    staging.remove_stale(path / WRITING, "")
    ((folder, still_there),) = deleted
    assert folder != leftover and not still_there and folder.is_dir()
