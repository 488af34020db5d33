"""Images: paths stay below the image folder, bad files get a status, pixels are counted before they are decoded."""

import io
import struct
import zlib
from pathlib import PureWindowsPath

import numpy as np
import pytest
import tiny
from PIL import Image

from switchkd.data.images import decode_image, read_image_bytes
from switchkd.data.samples import BadSample, Status
from switchkd.settings import MAX_IMAGE_PIXELS


@pytest.fixture
def folder(tmp_path):
    """An image folder with a.png and deep/b.png, beside a file that must never be read."""
    tiny.image(tmp_path / "images" / "a.png", 0)
    tiny.image(tmp_path / "images" / "deep" / "b.png", 1)
    (tmp_path / "secret.png").write_bytes(b"secret")
    return tmp_path / "images"


def file_bytes(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_that_claims(width, height):
    """A PNG of a few bytes: its header declares a size, its pixel data is empty."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def read_error(folder, relative):
    with pytest.raises(BadSample) as caught:
        read_image_bytes(folder, relative)
    return caught.value.status, caught.value.detail


def decode_error(data, name="x.png", **options):
    with pytest.raises(BadSample) as caught:
        decode_image(data, name, **options)
    return caught.value.status, caught.value.detail


@pytest.mark.parametrize("relative", ["a.png", "deep/b.png", "./a.png", "deep\\b.png", "deep//b.png"])
def test_a_path_below_the_folder_is_read(folder, relative):
    name = "a.png" if "a.png" in relative else "deep/b.png"
    assert read_image_bytes(folder, relative) == (folder / name).read_bytes()


@pytest.mark.parametrize(
    "relative", ["../secret.png", "deep/../../secret.png", "deep/../a.png", "..", "..\\secret.png", "deep\\..\\..\\x"]
)
def test_a_path_that_climbs_is_refused(folder, relative):
    assert read_error(folder, relative) == (Status.IMAGE_OUTSIDE_FOLDER, f"{relative!r} leaves the image folder")


@pytest.mark.parametrize("relative", ["/etc/passwd", "\\etc\\passwd", "\\\\host\\share\\x.png", "//host/x.png"])
def test_an_absolute_path_is_refused(folder, relative):
    assert read_error(folder, relative) == (Status.IMAGE_OUTSIDE_FOLDER, f"{relative!r} leaves the image folder")


def test_an_absolute_path_into_the_folder_is_read(folder):
    """`datasets` keeps such paths."""
    assert read_image_bytes(folder, str(folder / "a.png")) == read_image_bytes(folder, "a.png")
    escape = f"{folder}/../{folder.name}/a.png"
    assert read_error(folder, escape)[0] is Status.IMAGE_OUTSIDE_FOLDER


@pytest.mark.parametrize("relative", ["C:\\windows\\x.png", "C:/windows/x.png", "C:x.png"])
def test_a_drive_is_refused_where_drives_exist(folder, relative, monkeypatch):
    assert read_error(folder, relative)[0] is Status.IMAGE_MISSING  # elsewhere an ordinary name below the folder
    monkeypatch.setattr("switchkd.data.images.Path", PureWindowsPath)
    assert read_error(folder, relative) == (Status.IMAGE_OUTSIDE_FOLDER, f"{relative!r} leaves the image folder")


def test_a_name_with_dots_is_no_escape(folder):
    tiny.image(folder / "..c..png", 2)
    assert read_image_bytes(folder, "..c..png") == (folder / "..c..png").read_bytes()


def test_a_link_that_stands_in_the_folder_is_followed(folder):
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    assert read_image_bytes(folder, "link.png") == b"secret"


@pytest.mark.parametrize("relative", ["none.png", "none/a.png", "deep", ".", "a.png/b.png"])
def test_missing_file_folder_and_file_as_folder(folder, relative):
    assert read_error(folder, relative) == (Status.IMAGE_MISSING, f"no image {folder / relative}")


@pytest.mark.parametrize("relative", ["a\0.png", "x" * 5000, "\ud800.png"])
def test_a_name_that_no_file_can_have(folder, relative):
    status, detail = read_error(folder, relative)
    assert status is Status.IMAGE_UNREADABLE
    assert detail.startswith(repr(relative)[:190])
    assert len(detail) < 300


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + bytes(50)])
def test_a_file_that_is_no_image(data):
    status, detail = decode_error(data)
    assert status is Status.IMAGE_UNREADABLE
    assert detail.startswith("'x.png': ")


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp"])
def test_a_truncated_image(kind, folder):
    data = file_bytes(Image.open(folder / "a.png").resize((64, 64)), kind)
    assert decode_image(data, "x").size == (64, 64)
    assert decode_error(data[: len(data) // 2])[0] is Status.IMAGE_UNREADABLE


def test_a_gif_behind_a_jpg_name_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    data = file_bytes(frames[0], "gif", save_all=True, append_images=frames[1:])
    image = decode_image(data, "x.jpg")
    assert (image.mode, image.size, image.getpixel((1, 1))) == ("RGB", (4, 3), (255, 0, 0))


def test_too_many_pixels_are_refused_before_decoding():
    """Both files hold no pixel data: decoding one would give IMAGE_UNREADABLE, as it does for the small one."""
    assert decode_error(png_that_claims(8, 8))[0] is Status.IMAGE_UNREADABLE
    status, detail = decode_error(png_that_claims(8193, 8192))
    assert status is Status.IMAGE_TOO_LARGE
    assert detail == f"'x.png' has 8193×8192 pixels, the limit is {MAX_IMAGE_PIXELS}"


def test_a_decompression_bomb_is_refused():
    status, detail = decode_error(png_that_claims(60_000, 60_000))
    assert status is Status.IMAGE_TOO_LARGE
    assert detail.startswith("'x.png': ")
    assert "3600000000 pixels" in detail


def test_the_limit_itself_is_allowed(folder):
    data = (folder / "a.png").read_bytes()
    assert decode_image(data, "a.png", max_pixels=20 * 18).size == (20, 18)
    status, detail = decode_error(data, max_pixels=20 * 18 - 1)
    assert (status, detail) == (Status.IMAGE_TOO_LARGE, "'x.png' has 20×18 pixels, the limit is 359")


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_other_modes_become_rgb(mode, color, expected):
    image = decode_image(file_bytes(Image.new(mode, (3, 2), color), "png"), "x.png")
    assert (image.mode, image.getpixel((2, 1))) == ("RGB", expected)


@pytest.mark.parametrize(
    ("options", "clear"), [({}, ()), ({"transparency": 1}, (1,)), ({"transparency": b"\x00\xff"}, (0,))]
)
def test_a_palette_becomes_rgb_without_a_warning(options, clear):
    image = Image.new("P", (2, 1))
    image.putpalette([1, 2, 3, 40, 50, 60])
    image.putpixel((1, 0), 1)
    found = decode_image(file_bytes(image, "png", **options), "x.png")
    assert found.mode == "RGB"
    expected = [[255, 255, 255] if i in clear else color for i, color in enumerate(([1, 2, 3], [40, 50, 60]))]
    np.testing.assert_array_equal(np.array(found), [expected])
