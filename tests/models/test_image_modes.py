"""Image modes: pixels against a hand computation, part of a store's identity, saved with the student."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from switchkd.errors import CheckpointError, ConfigError, StoreMismatch
from switchkd.fingerprints import hash_image_processor
from switchkd.models.checkpoint import open_checkpoint, with_image_mode
from switchkd.pipelines.capture.audit import audit
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import AuditOptions, CacheOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train

SIDE = 16  # of the tiny tower
MEAN = (0.25, 0.5, 0.75)


@pytest.fixture(scope="module")
def opened(teacher):
    """The tiny checkpoint with CLIP's own habit: the shorter edge to size, the rest cut off."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=MEAN,
        image_std=(0.5, 0.25, 1),
    )
    return replace(open_checkpoint(teacher), image_processor=processor)


def pixels(checkpoint, image):
    return checkpoint.image_processor(images=image, return_tensors="pt")["pixel_values"][0]


def picture(width, height):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def normalised(values):
    """[H, W, 3] of 0 … 255 → [3, H, W], written out."""
    scaled = (values.astype(np.float64) * (1 / 255)).astype(np.float32)
    out = (scaled - np.array(MEAN, np.float32)) / np.array((0.5, 0.25, 1), np.float32)
    return torch.from_numpy(out.transpose(2, 0, 1).copy())


@pytest.mark.parametrize(("width", "height", "top", "left"), [(16, 5, 5, 0), (6, 16, 0, 5), (16, 16, 0, 0)])
def test_pad_by_hand(opened, width, height, top, left):
    """No resizing is left to do, so every value can be told: the image in the middle of the mean colour."""
    image = picture(width, height)
    canvas = np.empty((SIDE, SIDE, 3), np.uint8)
    canvas[:] = (63, 127, 191)  # the mean colour times 255, cut off as LLaVA does
    canvas[top : top + height, left : left + width] = np.asarray(image)
    assert torch.equal(pixels(with_image_mode(opened, "pad"), image), normalised(canvas))


def test_pad_is_the_checkpoints_own_on_the_padded_image(opened):
    image = picture(40, 27)
    canvas = Image.new("RGB", (40, 40), (63, 127, 191))
    canvas.paste(image, (0, 6))
    assert torch.equal(pixels(with_image_mode(opened, "pad"), image), pixels(opened, canvas))


@pytest.mark.parametrize("size", [(40, 27), (9, 33), (16, 16)])
def test_square_by_hand(opened, size):
    image = picture(*size)
    resized = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    assert torch.equal(pixels(with_image_mode(opened, "square"), image), normalised(resized))


def test_own_cuts_off_and_the_modes_differ(opened):
    image = picture(40, 27)
    assert with_image_mode(opened, "own") is opened
    found = [pixels(with_image_mode(opened, mode), image) for mode in ("own", "square", "pad")]
    assert all(value.shape == (3, SIDE, SIDE) for value in found)
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    hashes = {hash_image_processor(with_image_mode(opened, mode).image_processor) for mode in ("own", "square", "pad")}
    assert len(hashes) == 3


def test_a_processor_that_resizes_to_a_square_is_square_already(opened):
    siglip = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    checkpoint = replace(opened, image_processor=siglip)
    square = with_image_mode(checkpoint, "square").image_processor
    image = picture(40, 27)
    assert torch.equal(
        square(image, return_tensors="pt")["pixel_values"], siglip(image, return_tensors="pt")["pixel_values"]
    )


def test_refusals(opened):
    with pytest.raises(ConfigError, match="image mode is one of own, square, pad, got 'crop'"):
        with_image_mode(opened, "crop")
    blank = replace(opened, image_processor=CLIPImageProcessorPil(do_normalize=False))
    blank.image_processor.image_mean = None
    with pytest.raises(CheckpointError, match="no mean colour"):
        with_image_mode(blank, "pad")


@pytest.fixture(scope="module")
def cached(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("padded")
    data = tiny.data(folder, tiny.rows(6, text_only=(1,)))
    made = CacheOptions(
        teacher=teacher,
        data=data,
        images=folder / "images",
        out=folder / "s.zarr",
        template="qa",
        k=8,
        image_mode="pad",
    )
    cache_teacher(made)
    return made


def options(made, student, output, **changed):
    return TrainOptions(
        student=student, teacher=made.teacher, data=made.data, images=made.images, cache=made.out, output=output,
        steps=2, batch_size=3, **changed,
    )  # fmt: skip


def test_a_run_takes_the_stores_mode_and_the_student_keeps_it(cached, student, tmp_path):
    train(options(cached, student, tmp_path / "run"))
    saved = AutoImageProcessor.from_pretrained(tmp_path / "run", backend="pil")
    assert saved.do_pad
    expected = with_image_mode(open_checkpoint(student), "pad").image_processor
    assert hash_image_processor(saved) == hash_image_processor(expected)
    image = picture(40, 27)
    assert torch.equal(
        saved(image, return_tensors="pt")["pixel_values"][0],
        pixels(with_image_mode(open_checkpoint(student), "pad"), image),
    )


@pytest.mark.parametrize("mode", ["own", "square"])
def test_a_store_refuses_another_mode(cached, student, tmp_path, mode):
    with pytest.raises(StoreMismatch, match="image processor: store"):
        train(options(cached, student, tmp_path / "run", image_mode=mode))
    with pytest.raises(StoreMismatch, match="image processor: store"):
        cache_teacher(replace(cached, image_mode=mode))


def test_the_audit_sees_what_the_teacher_saw(cached):
    found = audit(
        AuditOptions(store=cached.out, teacher=cached.teacher, data=cached.data, images=cached.images, samples=6)
    )
    assert (found.rows[0].name, found.positions) == ("topk, k = 8, tail student", 12)
    assert found.rows[0].fidelity.largest_error < 0.1
