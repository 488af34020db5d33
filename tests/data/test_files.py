"""Failures around the data stop a run; only failures of the data become the status of a sample, which is final."""

import errno
import os

import pytest
import tiny

from switchkd.data import files
from switchkd.data.files import check_folder, read_file
from switchkd.data.images import decode_image, read_image_bytes
from switchkd.data.samples import BadSample, SampleFile, Status
from switchkd.errors import DataError, ReadFailure

AROUND_THE_DATA = [
    errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.EBUSY,
    errno.EHOSTDOWN, errno.ENODEV, errno.EREMOTEIO, errno.ENOTCONN, errno.EAGAIN, errno.ENXIO,
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(files, "RETRY_SECONDS", (0.0, 0.0))


@pytest.fixture
def folder(tmp_path):
    tiny.image(tmp_path / "images/a.png", 0)
    return tmp_path / "images"


def failing(monkeypatch, error, times=99):
    """Let the next `times` attempts to open a file fail."""
    left, real = [times], os.open

    def opened(path, *arguments):
        if left[0] and str(path).endswith(".png"):
            left[0] -= 1
            raise error
        return real(path, *arguments)

    monkeypatch.setattr(files.os, "open", opened)


@pytest.mark.parametrize("code", AROUND_THE_DATA, ids=errno.errorcode.get)
def test_an_error_of_disk_network_or_permission_is_no_status(folder, code, monkeypatch):
    failing(monkeypatch, OSError(code, os.strerror(code)))
    with pytest.raises(ReadFailure, match="a.png could not be read: .*run the same command again"):
        read_image_bytes(folder, "a.png")


def test_a_lack_of_memory_is_no_status(folder, monkeypatch):
    failing(monkeypatch, MemoryError())
    with pytest.raises(ReadFailure, match="out of memory"):
        read_image_bytes(folder, "a.png")


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_an_error_that_passes_is_not_noticed(folder, code, monkeypatch):
    failing(monkeypatch, OSError(code, "once"), times=2)
    assert read_image_bytes(folder, "a.png").startswith(b"\x89PNG")


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "files"), OSError(errno.EIO, "disk")])
def test_a_failure_around_the_decoder_is_no_status(folder, error, monkeypatch):
    def opened(*_, **__):
        raise error

    monkeypatch.setattr("switchkd.data.images.Image.open", opened)
    with pytest.raises(ReadFailure, match="could not be decoded"):
        decode_image((folder / "a.png").read_bytes(), "a.png")


@pytest.mark.parametrize("state", ["gone", "empty", "a file"])
def test_an_image_folder_that_is_not_mounted_is_no_status(folder, state):
    (folder / "a.png").unlink()
    if state != "empty":
        folder.rmdir()
    if state == "a file":
        folder.touch()
    with pytest.raises(ReadFailure, match=r"the image folder .*is its file system mounted"):
        read_image_bytes(folder, "a.png")


def test_what_is_no_regular_file_is_not_waited_for(folder):
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    for name in ("pipe.png", "loop.png"):
        with pytest.raises(BadSample) as caught:
            read_file(folder, name)
        assert caught.value.status is Status.IMAGE_UNREADABLE


def moved(place, old, new):
    (place / new).parent.mkdir(parents=True, exist_ok=True)
    (place / old).rename(place / new)
    return place / new


@pytest.mark.parametrize("given", ["too high", "too low", "elsewhere"])
def test_a_wrong_image_folder_is_refused_with_the_right_one_if_it_is_near(given, tmp_path):
    data = tiny.data(tmp_path, tiny.rows(5))
    images = {"too high": tmp_path, "too low": tmp_path / "images/deep", "elsewhere": tmp_path / "other"}[given]
    images.mkdir(exist_ok=True)
    (images / "something.txt").touch()
    with pytest.raises(DataError, match=r"not one of 5 images .* exists below .*000\.png \(row 0\)") as caught:
        check_folder(SampleFile(data), images)
    assert (f"Pass --images {tmp_path / 'images'}, where it lies" in str(caught.value)) is (given != "elsewhere")


def test_one_image_from_anywhere_in_the_file_is_enough(tmp_path):
    """The first rows may all be of a source whose images were removed."""
    rows = tiny.rows(200)
    data = tiny.data(tmp_path, rows, images=False)
    for row in range(150, 200):
        tiny.image(tmp_path / "images" / rows[row]["image"], row)
    check_folder(SampleFile(data), tmp_path / "images")


def test_an_empty_image_folder_is_said_to_be_empty(tmp_path):
    data = tiny.data(tmp_path, tiny.rows(3), images=False)
    (tmp_path / "images").mkdir(exist_ok=True)
    with pytest.raises(ReadFailure, match="is empty"):
        check_folder(SampleFile(data), tmp_path / "images")
