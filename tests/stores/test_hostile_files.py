"""Row 21: pipes, devices, links, folders and sparse files in the place of a store's files."""

import os
import socket

import hostile
import pytest
import synthetic

from switchkd.errors import StoreError
from switchkd.stores import TeacherStore
from switchkd.stores.verify import repair

MANIFEST, whole, path = hostile.MANIFEST, hostile.whole, hostile.path
use, refused = hostile.use, hostile.refused


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
