"""Row 12: what could not be read now is not called damaged, and nothing is removed for it."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import synthetic
from click.testing import CliRunner
from io_faults import READ_ERRORS, Faults

from switchkd.cli.main import main
from switchkd.errors import StoreError, StoreUnreadable
from switchkd.stores import TeacherStore
from switchkd.stores.info import describe
from switchkd.stores.reader import pick_store, read_manifest
from switchkd.stores.status import status
from switchkd.stores.storage.paths import part_path
from switchkd.stores.verify import repair, verify

MANIFEST = synthetic.manifest(payload="both", hidden_dtype="steps", hidden_width=8, samples=6, part_size=2)
LENGTHS = (1, 3, 40)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return synthetic.fill(tmp_path_factory.mktemp("whole") / "s.zarr", MANIFEST, lengths=LENGTHS)


@pytest.fixture
def path(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "s.zarr")


def read_all(path):
    store = TeacherStore(path)
    return store.payload(list(range(len(store))))


ACTS = (
    TeacherStore,
    read_manifest,
    read_all,
    describe,
    status,
    lambda path: pick_store(path.parent, {"tokenizer": "t0"}),
)


@pytest.mark.parametrize(
    "error", (*READ_ERRORS, MemoryError), ids=lambda e: e if e is MemoryError else errno.errorcode[e]
)
@pytest.mark.parametrize("act", ACTS)
def test_row_12_no_error_of_the_system_is_called_damage(whole, act, error):
    """From the first call on, nothing works."""
    with Faults(whole, 1, error, lasting=True).active(), pytest.raises(StoreUnreadable) as caught:
        act(whole)
    assert caught.value.exit_code == 1
    assert "could not be read" in str(caught.value) and "delete" not in str(caught.value)


def fail(monkeypatch, name, times):
    """Reading files whose paths end in `name` fails, the given number of times."""
    left = [times]
    opened, pread = os.open, os.pread
    theirs = set()

    def opening(path, *arguments, **options):
        handle = opened(path, *arguments, **options)
        (theirs.add if str(path).endswith(name) else theirs.discard)(handle)
        return handle

    def reading(handle, *arguments):
        if handle in theirs and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return pread(handle, *arguments)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "pread", reading)


FILES = (
    "00001/zarr.json",
    "00001/stats/zarr.json",
    "00001/samples/offset/c/0",
    "00001/stats/c/0/0",
    "00001/topk/gap/c/0/0",
    "00001/hidden/state/c/0/0",
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("times", (1, 2, 1000))
def test_row_12_repair_leaves_what_could_not_be_read(path, whole, monkeypatch, name, times):
    fail(monkeypatch, name, times)
    done = CliRunner().invoke(main, ["store", "repair", str(path)])
    assert "dropped parts: none" in done.output
    assert "kept, part 1: " in done.output and "could not be read: Input/output error" in done.output
    assert done.exit_code == 1
    synthetic.assert_same_store(path, whole)


@pytest.mark.parametrize("name", FILES)
def test_row_12_verify_says_what_could_not_be_read(whole, monkeypatch, name):
    fail(monkeypatch, name, 1000)
    done = CliRunner().invoke(main, ["store", "verify", str(whole)])
    assert "2 parts good, 0 bad, 0 missing, 1 could not be read" in done.output
    assert "store repair" not in done.output
    assert done.exit_code == 1


@pytest.mark.parametrize("name", FILES)
def test_row_12_repair_looks_twice(path, whole, monkeypatch, name):
    """One wrong byte on the way from the disk, at the first look only."""
    pread, opened, state = os.pread, os.open, {"left": 1, "handles": set()}

    def opening(file, *arguments, **options):
        handle = opened(file, *arguments, **options)
        (state["handles"].add if str(file).endswith(name) else state["handles"].discard)(handle)
        return handle

    def reading(handle, *arguments):
        data = pread(handle, *arguments)
        if handle in state["handles"] and state["left"] and data:
            state["left"] = 0
            return bytes([data[0] ^ 1]) + data[1:]
        return data

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "pread", reading)
    found = repair(TeacherStore(path))
    assert (found.dropped, found.unreadable, found.recovered) == ([], [], [1])
    synthetic.assert_same_store(path, whole)


def test_row_12_a_damaged_part_that_cannot_be_read_again_is_left(path, monkeypatch):
    file = part_path(path, 1) / "stats/c/0/0"
    file.write_bytes(file.read_bytes()[::-1])
    looks, opened = [], os.open

    def opening(name, *arguments, **options):
        if str(name).endswith("00001/zarr.json"):
            looks.append(name)
            if len(looks) > 1:  # at the second look
                raise OSError(errno.ESTALE, "Stale file handle")
        return opened(name, *arguments, **options)

    monkeypatch.setattr(os, "open", opening)
    found = repair(TeacherStore(path))
    assert found.dropped == [] and [finding.part for finding in found.unreadable] == [1]
    assert file.exists()


def test_row_12_damage_is_still_removed(path, whole):
    file = part_path(path, 1) / "stats/c/0/0"
    file.write_bytes(file.read_bytes()[::-1])
    done = CliRunner().invoke(main, ["store", "repair", str(path)])
    assert done.exit_code == 0 and "dropped parts: 1; run cache-teacher again" in done.output
    synthetic.fill(path, MANIFEST, lengths=LENGTHS)
    synthetic.assert_same_store(path, whole)


@pytest.mark.parametrize("where", ("parts/00001", "parts/00001/stats", "parts", "vocab", "."))
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs users")
def test_row_12_a_folder_without_permission(path, monkeypatch, where):
    """As scandir reports it; root may list every folder, so the error is made here."""
    listed, at = os.scandir, str(path / where).removesuffix("/.")

    def scanning(folder="."):
        if str(folder).rstrip("/") == at:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scanning)
    found = [finding for _, findings in verify(TeacherStore(path)) for finding in findings]
    assert all(finding.unreadable for finding in found)
    assert repair(TeacherStore(path)).dropped == []


def test_row_12_a_capture_takes_no_unreadable_part_for_a_missing_one(path, whole, monkeypatch):
    real = os.stat

    def stat(name, *arguments, **options):
        if str(name).endswith("00001/zarr.json"):
            raise OSError(errno.EIO, "Input/output error")
        return real(name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        with pytest.raises(StoreUnreadable, match=r"00001/zarr\.json could not be read: Input/output error"):
            synthetic.fill(path, MANIFEST, lengths=LENGTHS)
    synthetic.assert_same_store(path, whole)


@pytest.mark.parametrize("at", (0, 1, 40))
def test_row_12_short_reads_are_continued(whole, monkeypatch, at):
    """A system may return less than requested before the end of a file."""
    expected, pread = read_all(whole), os.pread
    monkeypatch.setattr(os, "pread", lambda handle, size, begin: pread(handle, max(min(size, at), 1), begin))
    found = read_all(whole)
    assert all((a == b).all() for a, b in zip(found.arrays().values(), expected.arrays().values(), strict=True))


def test_row_12_no_memory_for_a_payload(whole, monkeypatch):
    store = TeacherStore(whole)

    def no_memory(*_):
        raise MemoryError("Unable to allocate 9 EiB")

    monkeypatch.setattr("switchkd.stores.reader.empty_payload", no_memory)
    for act in (lambda: store[0], lambda: store.payload([1, 2]), lambda: store.part_payload(0)):
        with pytest.raises(StoreUnreadable, match="not enough memory .*Unable to allocate 9 EiB.*free memory"):
            act()
    assert all(findings[0].unreadable for _, findings in verify(store))


def test_row_12_a_missing_file_is_damage(path):
    """Errors that say what is there, and not that reading failed, keep the advice to replace the part."""
    (part_path(path, 1) / "stats/c/0/0").unlink()
    with pytest.raises(StoreError, match=r"stats/c/0/0 should have \d+ bytes, found nothing; it was damaged"):
        read_all(path)


def test_row_24_a_plot_into_a_missing_folder(whole, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra viz")
    out = tmp_path / "missing/folder/x.png"
    done = CliRunner().invoke(main, ["store", "plot", str(whole), "--out", str(out)])
    assert done.exit_code == 2
    assert f"there is no folder {out.parent}" in done.output and "--out" in done.output
    done = CliRunner().invoke(main, ["store", "plot", str(whole), "--out", str(tmp_path)])
    assert done.exit_code == 2 and "is a folder" in done.output
    assert not Path(out.parent).exists()


def test_row_24_no_memory_is_no_traceback(whole, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr("switchkd.stores.info.describe", no_memory)
    done = CliRunner().invoke(main, ["store", "info", str(whole)])
    assert done.exit_code == 1 and "out of memory" in done.output
