"""Several images a sample, anywhere in the conversation, and a row's own system prompt."""

import json

import chat_templates
import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset, Features, Image, List, Value

from switchkd.data.chat_template import open_chat_template
from switchkd.data.encoded import collate
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import BadSample, SampleFile, Status, read_row
from switchkd.data.templates import TEMPLATES
from switchkd.models.checkpoint import open_checkpoint

with_chat = chat_templates.with_chat
NAMES = ["0.png", "1.png"]


def row(*turns, images=NAMES, system=None):
    said = [{"role": who, "content": text} for q, a in turns for who, text in (("user", q), ("assistant", a))]
    return {"images": images, "messages": [*([{"role": "system", "content": system}] if system else []), *said]}


@pytest.fixture
def encoder(teacher, tmp_path):
    for number in range(3):
        tiny.image(tmp_path / f"{number}.png", number)
    return SampleEncoder(open_checkpoint(teacher), TEMPLATES["qa"], tmp_path, 64)


def runs_of_images(encoder, sample):
    """Lengths of the runs of image tokens, and the words between them."""
    ids = encoder.encode(sample).input_ids
    words = encoder.tokenizer.convert_ids_to_tokens(ids.tolist())
    return " ".join(words).replace(" ".join(["<image>"] * 4), "IMAGE")


def test_images_stand_where_their_markers_are(encoder):
    sample = read_row(row(("<image> is it red ?", "red"), ("is <image> a circle ?", "a circle")), 0)
    assert (sample.status, len(sample.images), sample.placed) == (Status.OK, 2, True)
    assert runs_of_images(encoder, sample) == "IMAGE is it red ? red <eos> is IMAGE a circle ? a circle <eos>"
    encoded = encoder.encode(sample)
    alone = [tiny.pixels_of(encoder.encode(read_row(row(("it ?", "red"), images=[name]), 0))) for name in NAMES]
    assert torch.equal(encoded.media["pixel_values"], torch.stack(alone))
    assert not encoded.supervised[encoded.input_ids == encoder.image_token_id].any()


def test_without_markers_they_stand_before_the_first_question(encoder):
    sample = read_row(row(("is it red ?", "red")), 0)
    assert runs_of_images(encoder, sample) == "IMAGE IMAGE is it red ? red <eos>"


def test_an_image_in_a_later_turn(encoder):
    sample = read_row(row(("is it red ?", "red"), ("<image> it ?", "a")) | {"images": NAMES[:1]}, 0)
    assert runs_of_images(encoder, sample) == "is it red ? red <eos> IMAGE it ? a <eos>"
    first, second = encoder.encode_prompt(sample, 0), encoder.encode_prompt(sample, 1)
    assert first.media is None and second.media is not None
    full = encoder.encode(sample).input_ids.tolist()
    assert full[: len(second.ids)] == second.ids.tolist() and full[: len(first.ids)] == first.ids.tolist()


@pytest.mark.parametrize("images", [NAMES[:1], [*NAMES, "2.png"]])
def test_markers_and_images_must_be_as_many(images):
    sample = read_row(row(("<image> and <image> ?", "red")) | {"images": images}, 3)
    assert sample.status is Status.SEVERAL_IMAGES
    assert sample.detail == f"markers <image>: 2, images: {len(images)}"


def test_every_image_is_part_of_the_digest(encoder, tmp_path):
    sample = read_row(row(("is it red ?", "red")), 0)
    before = encoder.encode(sample).digest
    assert before == encoder.encode(sample, pixels=False).digest
    tiny.image(tmp_path / "1.png", 9)
    after = encoder.encode(sample).digest
    assert before.differing(after) == ["image"]
    assert encoder.encode(read_row(row(("is it red ?", "red"), images=NAMES[::-1]), 0)).digest.image != after.image


def test_a_missing_one_names_itself(encoder):
    with pytest.raises(BadSample, match=r"image_missing: row 0: no image .*7\.png"):
        encoder.encode(read_row(row(("it ?", "red"), images=["0.png", "7.png"]), 0))


def test_from_a_data_file_and_a_data_set(encoder, tmp_path):
    rows = [row(("<image> it <image> ?", "red")), row(("it ?", "a"), images=NAMES[:1])]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    of_file = SampleFile(tmp_path / "data.json")
    pictures = [{"bytes": (tmp_path / name).read_bytes(), "path": name} for name in NAMES]
    features = Features(
        {
            "images": List(Image()),
            "messages": List({"role": Value("string"), "content": Value("string")}),
        }
    )
    held = [rows[0] | {"images": pictures}, rows[1] | {"images": pictures[:1]}]
    Dataset.from_list(held, features=features).to_parquet(str(tmp_path / "data.parquet"))
    of_set = SampleFile(tmp_path / "data.parquet")
    for one, other in zip(of_file, of_set, strict=True):
        assert (one.status, one.turns) == (other.status, other.turns)
        ours, theirs = encoder.encode(one), encoder.encode(other)
        assert ours.digest == theirs.digest
        assert all(torch.equal(ours.media[name], theirs.media[name]) for name in ours.media)


def test_batches_hold_the_images_in_order(encoder):
    samples = [
        encoder.encode(read_row(content, 0))
        for content in (
            row(("it ?", "red"), images=["2.png"]),
            row(("it ?", "red"), images=[]),
            row(("it ?", "a"), images=NAMES),
        )
    ]
    batch = collate(samples, 0)
    assert batch["has_image"].tolist() == [True, False, True]
    expected = torch.cat([samples[0].media["pixel_values"], samples[2].media["pixel_values"]])
    assert torch.equal(batch["pixel_values"], expected)
    assert int((batch["input_ids"] == encoder.image_token_id).sum()) == 3 * encoder.image_tokens


def test_a_system_prompt_is_the_chat_templates(with_chat, encoder):
    checkpoint = open_checkpoint(with_chat)
    template = open_chat_template(
        chat_templates.CHATML, {"eos_token": "<eos>"}, "<image>", ["<eos>", "<|im_start|>", "<|im_end|>"]
    )
    sample = read_row(row(("what is it ?", "red"), images=[], system="a blue square"), 0)
    assert sample.system == "a blue square"
    own = SampleEncoder(checkpoint, template, None, 64)
    words = checkpoint.tokenizer.convert_ids_to_tokens(own.encode(sample).input_ids.tolist())
    assert words[:6] == ["<|im_start|>", "<unk>", "a", "blue", "square", "<|im_end|>"]
    full, prompt = own.encode(sample), own.encode_prompt(sample, 0)
    assert np.array_equal(full.input_ids[: len(prompt.ids)], prompt.ids)
    with pytest.raises(BadSample, match="template 'qa' has no place for a row's system prompt; --template chat"):
        encoder.encode(sample)


def test_odd_system_prompts():
    after = read_row({"conversations": [{"from": "human", "value": "a"}, {"from": "system", "value": "b"}]}, 0)
    assert after.status is Status.UNKNOWN_ROLE
    marked = read_row(row(("it ?", "a"), system="see <image>"), 0)
    assert (marked.status, marked.detail) == (Status.MARKER_WITHOUT_IMAGE, "turn 0, the system prompt, holds <image>")
    alone = read_row({"messages": [{"role": "system", "content": "x"}]}, 0)
    assert (alone.status, alone.detail) == (Status.NO_CONVERSATION, "a system prompt, and no turn after it")


@pytest.mark.parametrize("key", ["video", "videos"])
def test_a_video_is_refused_and_its_frames_are_images(key):
    said = tiny.conversation(("what happens ?", "a circle"))
    refused = read_row({key: "a.mp4", "conversations": said}, 0)
    assert refused.status is Status.BAD_TURN
    assert refused.detail == f"key '{key}' names a video, which is not read: give its frames as images"
    frames = read_row({key: None, "images": ["1.png", "2.png", "3.png"], "conversations": said}, 0)
    assert (frames.status, len(frames.images)) == (Status.OK, 3)
