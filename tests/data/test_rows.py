"""What a row means: images under other keys, text that speaks of an absent image, weights of turns, control tokens, empty answers.

Nothing of these may turn a row with an image into text only in silence.
"""

import json
import logging

import numpy as np
import pytest
import tiny

from switchkd.cli.data import format_check
from switchkd.data.containers import IMAGE_COLUMNS
from switchkd.data.encoding import SampleEncoder
from switchkd.data.oddities import HOLDS_NULL, NO_IMAGE
from switchkd.data.samples import BadSample, SampleFile, Status, read_row
from switchkd.data.templates import TEMPLATES
from switchkd.models.checkpoint import open_checkpoint
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.preflight.data_check import check_data
from switchkd.pipelines.preflight.options import CheckOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train


def row(question="what ?", answer="red", **more):
    return {"conversations": tiny.conversation((question, answer)), **more}


def image_part(value):
    parts = [{"type": "image", "image": value}] if value else []
    question = {"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}
    return {"messages": [question, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]}


@pytest.mark.parametrize("key", IMAGE_COLUMNS)
@pytest.mark.parametrize("value", ["a.png", ["a.png"], {"path": "a.png"}, [{"path": "a.png"}], [None, "a.png"]])
@pytest.mark.parametrize("question", ["what ?", "<image>\nwhat ?"])
def test_every_obvious_key_and_form_gives_the_image(key, value, question):
    sample = read_row(row(question, **{key: value}), 0)
    assert (sample.status, sample.image) == (Status.OK, "a.png")


def test_documented_keys_win_and_different_images_are_refused():
    assert read_row(row(image="a.png", image_path="/there/a.png"), 0).image == "a.png"
    assert read_row(row(image="a.png", images=["a.png"]), 0).image == "a.png"
    for keys in ({"img": "a.png", "image_path": "b.png"}, {"image": "a.png", "images": ["a.png", "b.png"]}):
        assert read_row(row(**keys), 0).status is Status.SEVERAL_IMAGES


@pytest.mark.parametrize(
    "given",
    [
        {"photo": "a.jpg"}, {"file_name": "x/a.PNG"}, {"source": "https://host/a.webp?size=3"}, {"pictures": ["a.tif", "b.tif"]},
        {"photo": {"path": "a.heic"}}, {"photo": b"RIFFxxxxWEBP"},
        {"photo": "data:image/png;base64,AAAA"},
        {"photo": b"\x89PNG\r\n"}, {"photo": {"bytes": b"\xff\xd8\xff"}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("question", ["what ?", "<image> what ?"])
def test_an_image_under_an_unknown_key_is_refused_by_name(given, question):
    sample = read_row(row(question, **given), 0)
    assert sample.status is Status.IMAGE_MISSING
    assert sample.detail.startswith(
        f"key {next(iter(given))!r} looks like an image, and images are read from image, images, img"
    )
    assert read_row(row("what ?", image="a.png", **given), 0).status is Status.OK


@pytest.mark.parametrize(
    "more",
    [{"source": "coco"}, {"url": "https://host/page.html"}, {"length": 3}, {"tags": ["a", "b"]}, {"text": "see a.png\n"}, {"n": []},
     {"audio": b"RIFFxxxxWAVE"}],
)  # fmt: skip
def test_other_keys_are_ignored(more):
    assert read_row(row(**more), 0) == read_row(row(), 0)


@pytest.mark.parametrize(
    "placeholder",
    ["<img>", "<IMG>", "<image_1>", "<image 1>", "<|image|>", "<|image_1|>", "<|image_pad|>", "<ImageHere>", "[IMG]", "<im_patch>",
     "<image_placeholder>", "<picture>", "<Img>", "<|vision_start|>", "<video>"],
)  # fmt: skip
def test_another_projects_placeholder_is_noted(placeholder):
    (note,) = read_row(row(f"{placeholder}\nwhat ?"), 0).notes
    assert note == f"{NO_IMAGE} {placeholder}, which is not <image>"
    (note,) = read_row(row(f"{placeholder}\nwhat ?", image="a.png"), 0).notes
    assert note == f"text holds {placeholder}, which is not <image>"


@pytest.mark.parametrize("question", ["What is in this image?", "describe the picture", "In the photograph, who …?"])
def test_a_question_about_an_absent_image_is_noted(question):
    assert read_row(row(question), 0).notes == (f"{NO_IMAGE} a mention of an image",)
    assert read_row(row(question, image="a.png"), 0).notes == ()


@pytest.mark.parametrize("text", ["x <b> y", "a < image > b", "imagine this", "[1] image", "<html>", "a|b", "{x}"])
def test_ordinary_text_is_not_noted(text):
    assert read_row(row(text, text), 0).notes == ()


@pytest.mark.parametrize(
    "token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "</s>", "<s>", "[INST]", "<end_of_turn>"]
)
def test_what_looks_like_a_control_token_is_counted(token):
    assert read_row(row(f"what {token}"), 0).notes == read_row(row(answer=f"x {token}"), 0).notes
    assert read_row(row(f"what {token}"), 0).notes == (f"text holds {token}, as control tokens look",)


@pytest.mark.parametrize("answer", ["", "   ", "\n"])
def test_empty_answers_are_counted(answer):
    assert read_row(row(answer=answer), 0).notes == ("an answer is empty",)


@pytest.fixture
def odd(tmp_path):
    rows = tiny.rows(12)
    rows[1] |= {"image": None, "images": [None], "conversations": tiny.conversation(("what ?", "red"))}
    rows[2] = row("<img> what ?")
    rows[3] = row("what is in this image ?")
    rows[4] = row("what ?", photo="004.png")
    rows[5]["conversations"][1]["value"] = "red </s>"
    return tiny.data(tmp_path / "odd", rows)


def test_they_are_shown_by_data_check_and_told_by_capture_and_training(odd, teacher, student, tmp_path, caplog):
    images = odd.parent / "images"
    text = "\n".join(format_check(check_data(CheckOptions(odd, images))))
    for words in ("images is a list that holds null", f"{NO_IMAGE} <img>", f"{NO_IMAGE} a mention", "text holds </s>"):
        assert words in text
    assert "image_missing" in text and "key 'photo' looks like an image" in text
    told = []
    options = CacheOptions(teacher=teacher, data=odd, images=images, out=tmp_path / "s.zarr", template="qa", k=8)
    cache_teacher(options, tell=told.append)
    warned = [line for line in told if line.startswith("warning: 1 row, ")]
    assert len(warned) == 3 and any(HOLDS_NULL in line for line in warned)
    run = TrainOptions(
        student=student,
        teacher=teacher,
        data=odd,
        images=images,
        cache=options.out,
        output=tmp_path / "r",
        steps=1,
        batch_size=2,
    )
    with caplog.at_level(logging.WARNING):
        train(run)
    assert f"1 row, {NO_IMAGE} <img>" in caplog.text


@pytest.mark.parametrize("key", ["weight", "loss", "train"])
@pytest.mark.parametrize("value", [0, 0.0, False])
def test_an_answer_of_weight_0_is_not_supervised(key, value, teacher, tmp_path):
    turns = tiny.conversation(("what ?", "red"), ("it ?", "blue"))
    turns[1][key], turns[3][key] = value, 1
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns}]))
    sample = SampleFile(tmp_path / "a.json")[0]
    assert sample.unsupervised == (0,)
    encoder = SampleEncoder(open_checkpoint(teacher), TEMPLATES["qa"], None, 64)
    encoded = encoder.encode(sample)
    plain = encoder.encode(read_row({"conversations": tiny.conversation(("what ?", "red"), ("it ?", "blue"))}, 0))
    np.testing.assert_array_equal(encoded.input_ids, plain.input_ids)
    first = np.flatnonzero(plain.supervised)[:2]
    assert not encoded.supervised[first].any()
    assert encoded.supervised.sum() == plain.supervised.sum() - 2


def test_every_answer_of_weight_0_is_nothing_supervised(teacher):
    turns = tiny.conversation(("what ?", "red"))
    turns[1]["weight"] = 0
    encoder = SampleEncoder(open_checkpoint(teacher), TEMPLATES["qa"], None, 64)
    with pytest.raises(BadSample, match="every answer has weight 0") as caught:
        encoder.encode(read_row({"conversations": turns}, 0))
    assert caught.value.status is Status.NOTHING_SUPERVISED


@pytest.mark.parametrize("value", [0.5, -1, 2, "0", "no", [], float("nan")])
def test_other_weights_are_refused_by_name(value):
    turns = tiny.conversation(("what ?", "red"))
    turns[1]["weight"] = value
    sample = read_row({"conversations": turns}, 0)
    assert sample.status is Status.BAD_TURN
    assert sample.detail.startswith("turn 1 has weight ")


@pytest.mark.parametrize("more", [{"weight": 1}, {"weight": True}, {"weight": None}, {"loss": 0.37}, {"train": "yes"}])
def test_weights_that_supervise(more):
    turns = tiny.conversation(("what ?", "red"))
    turns[1] |= more
    turns[0]["weight"] = 0  # of a question: nothing to train on
    sample = read_row({"conversations": turns}, 0)
    assert (sample.status, sample.unsupervised) == (Status.OK, ())
