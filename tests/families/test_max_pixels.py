"""`--max-pixels`: fewer tokens an image, in each family's own words, as part of a store's identity."""

import json
from dataclasses import replace

import families as tiny
import numpy as np
import pytest
import tiny as llava
from PIL import Image

from switchkd.data.media import MediaReader
from switchkd.errors import ConfigError, StoreMismatch
from switchkd.models.checkpoint import open_checkpoint, with_image_mode
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train
from switchkd.stores import TeacherStore

SIZES = [(64, 64), (20, 60), (48, 16)]
LIMITED = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "internvl", "llava_next", "llava_onevision", "idefics3"]
FIXED = ["gemma3", "paligemma", "vipllava"]


def opened(family, folder):
    return open_checkpoint(tiny.write_checkpoint(family, folder / family, 0))


def tokens(checkpoint, size):
    height, width = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    reader = MediaReader(checkpoint)
    return reader.read([Image.fromarray(pixels)]).texts[0].count(reader.image_token)


@pytest.mark.parametrize("family", LIMITED)
def test_fewer_pixels_are_fewer_tokens(family, tmp_path):
    checkpoint = opened(family, tmp_path)
    counts = [
        [tokens(with_image_mode(checkpoint, "own", limit), size) for limit in (512, 1024, None)] for size in SIZES
    ]
    for count in counts:
        assert count == sorted(count)
    assert any(count[0] < count[-1] for count in counts)


@pytest.mark.parametrize("family", FIXED)
def test_where_all_images_have_one_size_it_is_refused(family, tmp_path):
    with pytest.raises(ConfigError, match=f"a {family}, every image has the same number of pixels; leave it out"):
        with_image_mode(opened(family, tmp_path), "own", 512)


def test_a_limit_below_the_smallest_image(tmp_path):
    with pytest.raises(ConfigError, match=r"--max-pixels 10 is below the smallest image of .*, which has 64 pixels"):
        with_image_mode(opened("qwen2_5_vl", tmp_path), "own", 10)


def test_it_is_part_of_the_stores_identity_and_of_the_student(tmp_path):
    for number, size in enumerate(SIZES):
        llava.image(tmp_path / f"images/{number}.png", number, size=size[::-1])
    rows = [
        {"image": f"{n}.png", "conversations": llava.conversation(("what is the color?", "a red cat."))}
        for n in (0, 1, 2)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    teacher, student = (tiny.write_checkpoint("qwen2_5_vl", tmp_path / name, seed) for seed, name in enumerate("ts"))
    here = {"data": tmp_path / "data.json", "images": tmp_path / "images"}
    cache = CacheOptions(teacher, out=tmp_path / "s.zarr", template="chat", k=8, max_pixels=512, **here)
    cache_teacher(cache)
    with pytest.raises(StoreMismatch, match="image"):
        cache_teacher(replace(cache, max_pixels=1024))
    assert TeacherStore.open(cache.out).manifest.max_pixels == 512
    options = TrainOptions(
        student=student, teacher=teacher, cache=cache.out, output=tmp_path / "run", steps=1, batch_size=3, **here
    )
    train(options)
    trained = open_checkpoint(tmp_path / "run")
    assert trained.image_processor.size["longest_edge"] == 512
    assert tokens(trained, SIZES[0]) == tokens(with_image_mode(open_checkpoint(student), "own", 512), SIZES[0])
    with pytest.raises(StoreMismatch, match="image processor"):
        train(replace(options, output=tmp_path / "other", max_pixels=1024))
