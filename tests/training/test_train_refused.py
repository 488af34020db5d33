"""What is refused before the first step, and samples that are not the ones that were cached."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny
import training
from PIL import Image

from switchkd.errors import CheckpointError, ConfigError, DataError, StoreError, StoreMismatch
from switchkd.pipelines.training.train import train

cached, hidden, options = training.cached, training.hidden, training.options


def test_hidden_states_need_the_teachers_head(options, hidden):
    with pytest.raises(ConfigError, match=r"holds payload hidden, this run reads topk; pass --teacher"):
        train(replace(options, cache=hidden, teacher=None, switch=False))


def test_a_payload_that_is_not_there_is_refused(options, hidden):
    with pytest.raises(ConfigError, match="holds payload topk, this run reads hidden"):
        train(replace(options, payload="hidden"))


def test_live_needs_the_teacher_and_one_image_processor(options, student, tmp_path):
    with pytest.raises(ConfigError, match="--teacher-mode live runs the teacher: pass --teacher"):
        train(replace(options, teacher_mode="live", teacher=None, switch=False))
    folder = shutil.copytree(student, tmp_path / "other")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"image_std": [0.4, 0.5, 0.5]}))
    with pytest.raises(CheckpointError, match="image processors of .* differ; cache the teacher instead"):
        train(replace(options, teacher_mode="live", student=folder))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher": None}, ConfigError, "pass --teacher, or --no-switch"),
        ({"cache": None}, ConfigError, "reads a teacher store: pass --cache"),
        ({"template": "plain"}, StoreMismatch, "template name: store 'qa', here 'plain'"),
        ({"max_length": 99}, StoreMismatch, "maximum length: store 2048, here 99"),
        ({"window": 16}, ConfigError, "--window 16 looks beyond the 15 logits"),
        ({"precision": "fp8"}, ConfigError, "precision is one of float32, bfloat16, bfloat16-copies"),
        ({"trainer": {"no_such": 1}}, ConfigError, "trainer: no_such is not an argument of"),
        ({"schedule": "zigzag"}, ConfigError, "schedule is one of linear, cosine, .*, got 'zigzag'"),
    ],
)
def test_refused_before_the_first_step(options, change, error, message):
    with pytest.raises(error, match=message):
        train(replace(options, **change))
    assert not options.output.exists()


def test_the_store_of_another_teacher_is_refused(options, tmp_path):
    other = tiny.checkpoint(tmp_path / "other", seed=5, width=32)
    with pytest.raises(StoreMismatch, match=r"teacher projector: store .*\n.*teacher language: store"):
        train(replace(options, teacher=other))


def test_a_teacher_with_another_image_processor_is_refused(options, teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "other")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["image_mean"] = [0.4, 0.5, 0.5]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(StoreMismatch, match="image processor: store"):
        train(replace(options, teacher=folder))


def test_an_unfinished_store_is_refused(options, cached, tmp_path):
    store = shutil.copytree(cached / "stores/s.zarr", tmp_path / "u.zarr")
    shutil.rmtree(store / "parts/00001")
    with pytest.raises(StoreError, match="holds 2 of 3 parts; run the same `switchkd cache-teacher` command again"):
        train(replace(options, cache=store))


def edited(cached, tmp_path):
    return shutil.copytree(cached, tmp_path / "edited")


def test_an_edited_word_is_refused_and_named(options, cached, tmp_path):
    folder = edited(cached, tmp_path)
    rows = json.loads((folder / "data.json").read_text())
    rows[4]["conversations"][1]["value"] = "circle"
    (folder / "data.json").write_text(json.dumps(rows))
    with pytest.raises(StoreMismatch, match=r"differs in 1 sample from .*\n  row 4 \(id s4\): text\n"):
        train(replace(options, data=folder / "data.json"))


def test_exchanged_rows_are_refused_and_named(options, cached, tmp_path):
    folder = edited(cached, tmp_path)
    rows = json.loads((folder / "data.json").read_text())
    rows[0], rows[1] = rows[1], rows[0]
    (folder / "data.json").write_text(json.dumps(rows))
    with pytest.raises(StoreMismatch, match=r"row 0 \(id s1\): text and image\n  row 1 \(id s0\): text and image"):
        train(replace(options, data=folder / "data.json"))


def test_another_number_of_rows_is_refused(options, cached, tmp_path):
    folder = edited(cached, tmp_path)
    rows = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(StoreMismatch, match="made from 12 samples, .* has 11"):
        train(replace(options, data=folder / "data.json"))


def test_a_data_file_that_only_looks_different_is_accepted(options, cached, tmp_path):
    folder = edited(cached, tmp_path)
    rows = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(rows, indent=3))
    assert train(replace(options, data=folder / "data.json")).samples == 12


@pytest.mark.parametrize("workers", (0, 1))
def test_one_changed_pixel_is_refused_and_named(options, cached, tmp_path, workers):
    folder = edited(cached, tmp_path)
    file = folder / "images/007.png"
    picture = Image.open(file)
    red, green, blue = picture.getpixel((3, 3))
    picture.putpixel((3, 3), (red ^ 1, green, blue))
    picture.save(file)
    with pytest.raises(StoreMismatch, match=r"row 7 \(id s7\) .* its image changed since"):
        train(replace(options, images=folder / "images", workers=workers))


def test_an_image_that_vanished_is_named(options, cached, tmp_path):
    folder = edited(cached, tmp_path)
    (folder / "images/007.png").unlink()
    with pytest.raises(DataError, match=r"image_missing: row 7: no image .*007\.png; it was usable"):
        train(replace(options, images=folder / "images"))
