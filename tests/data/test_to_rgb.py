"""What a person sees of an image is what a model sees: orientation, wide ranges of grey, transparency, CMYK, palettes; and
stores of ordinary images stay valid, while those of images that were decoded otherwise do not."""

import hashlib
import io
import struct

import numpy as np
import pytest
import tiny
from PIL import ExifTags, Image, ImageOps

from switchkd.data.encoding import SampleEncoder
from switchkd.data.images import check_enlarged, decode, decode_image, was_decoded_otherwise
from switchkd.data.samples import BadSample, SampleFile, Status
from switchkd.data.templates import TEMPLATES
from switchkd.data.to_rgb import FLOAT, GREY_16, INTEGER, ON_WHITE, TURNED
from switchkd.errors import StoreMismatch
from switchkd.fingerprints import digest_sample
from switchkd.models.checkpoint import open_checkpoint, with_image_mode
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.preflight.data_check import check_data
from switchkd.pipelines.preflight.options import CheckOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 4, 3), np.uint8)).resize((40, 60), 0)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation, kind="jpeg"):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return saved(PICTURE, kind, exif=exif)


def tiff(values, sample_format=None, photometric=1, order="<"):
    """Return a TIFF of one strip, written by hand from a two-dimensional array."""
    values = np.asarray(values)
    height, width = values.shape
    kind = sample_format or {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = [(256, width), (257, height), (258, values.itemsize * 8), (259, 1), (262, photometric), (273, 8)]
    tags += [(277, 1), (278, height), (279, len(data)), (339, kind)]
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    return (
        mark + struct.pack(f"{order}I", 8 + len(data)) + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    )


def greys(data):
    found = np.asarray(decode_image(data, "x"))
    assert (found == found[..., :1]).all()
    return found[0, :, 0].tolist()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "mpo"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_every_format_that_has_one(kind, orientation):
    data = turned(orientation, kind)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    np.testing.assert_array_equal(decode_image(data, "x"), upright)
    assert decode_image(data, "x").size == ((60, 40) if orientation > 4 else (40, 60))
    assert was_decoded_otherwise(data) is (orientation > 1 and kind != "tiff")  # Pillow has always turned TIFF files


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(40)])
def test_damaged_exif_leaves_an_image_as_it_is(exif):
    found = decode(saved(PICTURE, "png", exif=exif), "x")
    np.testing.assert_array_equal(found.image, PICTURE)
    assert not found.changed


@pytest.mark.parametrize("order", "<>")
def test_16_bit_grey_keeps_its_range(order):
    wide = np.array([[0, 257, 32896, 65535]], np.uint16)
    expected = [0, 1, 128, 255]
    assert greys(tiff(wide, order=order)) == expected
    assert greys(saved(Image.fromarray(wide), "png")) == expected
    assert greys(b"P5 4 1 65535\n" + wide.astype(">u2").tobytes()) == expected
    assert GREY_16 in decode(saved(Image.fromarray(wide), "png"), "x").conversions


def test_white_is_zero_is_inverted():
    for values in (np.array([[0, 32896, 65535]], np.uint16), np.array([[0, 0.5, 1]], np.float32)):
        assert greys(tiff(values, photometric=0))[::2] == [255, 0]


def test_integers_are_of_their_own_range():
    for kind in (np.int32, np.uint32, np.int16):
        assert greys(tiff(np.array([[100, 200, 300]], kind))) == [0, 128, 255]
    assert greys(tiff(np.array([[-1000, 0, 1000]], np.int32))) == [0, 128, 255]
    assert greys(tiff(np.array([[7, 7]], np.int32))) == [7, 7]
    assert decode(tiff(np.array([[1, 2]], np.int32)), "x").conversions == (INTEGER,)


def test_floats_of_0_to_1_or_of_their_own_range():
    assert greys(tiff(np.array([[0.25, 0.5, 0.75]], np.float32))) == [64, 128, 191]
    assert greys(tiff(np.array([[-2, 0, 2]], np.float32))) == [0, 128, 255]
    assert greys(tiff(np.array([[3, 3]], np.float32))) == [3, 3]
    assert decode(tiff(np.array([[0, 1]], np.float32)), "x").conversions == (FLOAT,)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_floats_that_are_not_finite_are_refused(bad):
    with pytest.raises(BadSample, match="not finite") as caught:
        decode(tiff(np.array([[0, bad]], np.float32)), "x")
    assert caught.value.status is Status.IMAGE_UNREADABLE


def transparent(kind):
    """Return an image file of one clear, one half clear and one opaque pixel of black, as far as the kind can have them."""
    layers = Image.new("LA" if kind == "LA" else "RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        layers.putpixel((x, 0), (0, alpha) if kind == "LA" else (0, 0, 0, alpha))
    if kind == "palette":
        image = Image.new("P", (3, 1))
        image.putpalette([0, 0, 0] * 3)
        image.putdata([0, 1, 2])
        return saved(image, "png", transparency=bytes([0, 128, 255]))
    if kind == "colour key":
        image = Image.new("RGB", (3, 1))
        image.putpixel((0, 0), (9, 9, 9))
        return saved(image, "png", transparency=(9, 9, 9))
    return saved(
        layers,
        "webp" if kind == "webp" else "tiff" if kind == "tiff" else "png",
        **({"lossless": True} if kind == "webp" else {}),
    )


@pytest.mark.parametrize("kind", ["RGBA", "LA", "palette", "colour key", "webp", "tiff"])
def test_transparent_pixels_are_white(kind):
    first, middle, last = greys(transparent(kind))
    assert (first, last) == (255, 0)
    assert middle == (0 if kind == "colour key" else 127)
    assert ON_WHITE in decode(transparent(kind), "x").conversions
    assert was_decoded_otherwise(transparent(kind))


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_an_opaque_alpha_channel_changes_nothing(kind):
    """Screenshots have one; a store that holds them stays valid."""
    data = saved(PICTURE.convert("RGBA"), kind, **({"lossless": True} if kind == "webp" else {}))
    np.testing.assert_array_equal(decode_image(data, "x"), PICTURE)
    assert not was_decoded_otherwise(data)


@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
def test_cmyk_is_not_inverted(kind):
    """Adobe writes CMYK inverted into JPEG files, TIFF files hold it plain."""
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = decode_image(saved(image, kind, **({"quality": 100} if kind == "jpeg" else {})), "x").getpixel(
        (8, 8)
    )
    assert red > 245 and green < 10 and blue < 10


ORDINARY = {
    "RGB": saved(PICTURE, "png"),
    "jpeg": saved(PICTURE, "jpeg"),
    "upright": turned(1),
    "grey": saved(PICTURE.convert("L"), "jpeg"),
    "palette": saved(PICTURE.convert("P"), "png"),
    "gif": saved(PICTURE, "gif"),
    "CMYK": saved(PICTURE.convert("CMYK"), "jpeg"),
    "1": saved(PICTURE.convert("1"), "png"),
    "bmp": saved(PICTURE, "bmp"),
    "ppm": saved(PICTURE, "ppm"),
    "webp": saved(PICTURE, "webp"),
    "RGB tiff": saved(PICTURE, "tiff"),
    "cut": saved(PICTURE, "png")[:-60],
    "none": b"page",
}
CHANGED = {
    "turned": turned(6),
    "16-bit": saved(Image.fromarray(np.array([[0, 65535]], np.uint16)), "png"),
    "float": tiff(np.array([[0, 1]], np.float32)),
    "alpha": transparent("RGBA"),
}


@pytest.mark.parametrize("data", ORDINARY.values(), ids=ORDINARY)
def test_ordinary_images_have_pixels_and_digest_of_earlier_versions(data):
    assert not was_decoded_otherwise(data)
    ids, mask = np.array([1], np.int32), np.array([True])
    assert digest_sample(ids, mask, data).image == int.from_bytes(
        hashlib.blake2b(data, digest_size=8).digest(), "little"
    )
    if data not in (ORDINARY["cut"], ORDINARY["none"]):
        found = decode(data, "x")
        assert not found.changed
        np.testing.assert_array_equal(found.image, Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("data", CHANGED.values(), ids=CHANGED)
def test_images_that_were_decoded_otherwise_have_another_digest_with_and_without_pixels(data, teacher, tmp_path):
    assert was_decoded_otherwise(data) and decode(data, "x").changed
    path = tiny.data(tmp_path, tiny.rows(1))
    (tmp_path / "images/000.png").write_bytes(data)
    encoder = SampleEncoder(open_checkpoint(teacher), TEMPLATES["qa"], tmp_path / "images", 64)
    sample = SampleFile(path)[0]
    digest = encoder.encode(sample).digest
    assert digest == encoder.encode(sample, pixels=False).digest == encoder.encode(sample).digest
    assert digest.image == int.from_bytes(
        hashlib.blake2b(data, digest_size=8, person=b"switchkd-rgb-2").digest(), "little"
    )


def test_a_store_of_earlier_versions_fits_unless_it_holds_an_affected_image(teacher, student, tmp_path, monkeypatch):
    data = tiny.data(tmp_path, tiny.rows(8))
    (tmp_path / "images/003.png").write_bytes(turned(6, "png"))
    options = CacheOptions(
        teacher=teacher, data=data, images=tmp_path / "images", out=tmp_path / "s.zarr", template="qa", k=8
    )

    def old_digest(ids, mask, image, decoded_otherwise=False):
        return digest_sample(ids, mask, image)

    monkeypatch.setattr("switchkd.data.encoding.digest_sample", old_digest)
    cache_teacher(options)
    monkeypatch.undo()
    run = TrainOptions(
        student=student, teacher=teacher, data=data, images=tmp_path / "images", cache=options.out, output=tmp_path / "a",
        steps=2, batch_size=4,
    )  # fmt: skip
    with pytest.raises(StoreMismatch, match="row 3 .*image changed"):
        train(run)
    (tmp_path / "images/003.png").write_bytes(saved(PICTURE, "png"))
    cache_teacher(CacheOptions(**{**vars(options), "out": tmp_path / "t.zarr"}))
    train(TrainOptions(**{**vars(run), "cache": tmp_path / "t.zarr", "output": tmp_path / "b"}))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC image or a video"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", "an AVIF image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b'<?xml version="1.0"?>\n<!-- x -->\n<svg/>', "an SVG drawing"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"%PDF-1.4", "a PDF file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "a PostScript file"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"", "an empty file"),
        (b"\x89PNG\r\n\x1a\n", "damaged at its beginning"),
        (saved(PICTURE, "jpeg2000"), "a JPEG 2000 image"),
        (saved(PICTURE, "ico"), "an icon"),
        (saved(PICTURE, "tga"), "not an image"),
        (saved(PICTURE.convert("P"), "pcx"), "not an image"),
        (saved(PICTURE, "eps"), "a PostScript file"),
    ],
)
def test_formats_outside_the_list_are_refused_with_reason_and_remedy(data, reason):
    with pytest.raises(BadSample, match=f"{reason}.*convert it to JPEG or PNG. Read are JPEG, PNG") as caught:
        decode(data, "x.jpg")
    assert caught.value.status is Status.IMAGE_UNREADABLE


def test_data_check_counts_images_of_each_kind(tmp_path, teacher):
    path = tiny.data(tmp_path, tiny.rows(6))
    for row, data in enumerate([turned(6), CHANGED["16-bit"], CHANGED["alpha"], CHANGED["float"], ORDINARY["CMYK"]]):
        (tmp_path / f"images/{row:03d}.png").write_bytes(data)
    found = check_data(CheckOptions(path, tmp_path / "images"))
    assert found.survey.conversions == {TURNED: [0], GREY_16: [1], ON_WHITE: [2], FLOAT: [3], "CMYK": [4]}


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 30_000)])
def test_thin_images_are_too_large_where_a_processor_enlarges_them(size, teacher, tmp_path):
    checkpoint = open_checkpoint(teacher)
    image = Image.new("RGB", size)
    check_enlarged(image, with_image_mode(checkpoint, "square").image_processor, "x.png", 1 << 20)
    for processor in (shortest_edge(), with_image_mode(checkpoint, "pad").image_processor):
        with pytest.raises(BadSample, match=r"'x.png', \d+×\d+ pixels, would become") as caught:
            check_enlarged(image, processor, "x.png", 1 << 20)
        assert caught.value.status is Status.IMAGE_TOO_LARGE
        check_enlarged(Image.new("RGB", (10, 40)), processor, "x.png", 1 << 20)


def shortest_edge():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})


def test_a_thin_image_is_found_by_data_check_and_skipped_by_capture(teacher, tmp_path):
    path = tiny.data(tmp_path, tiny.rows(4))
    Image.new("RGB", (1, 60_000)).save(tmp_path / "images/002.png")
    found = check_data(CheckOptions(path, tmp_path / "images"))
    assert found.survey.notes == {"image over 100 times as long as wide": [2]}
    checkpoint = with_image_mode(open_checkpoint(teacher), "pad")
    encoder = SampleEncoder(checkpoint, TEMPLATES["qa"], tmp_path / "images", 64)
    with pytest.raises(BadSample, match="image_too_large: row 2: '002.png'"):
        encoder.encode(SampleFile(path)[2])
