"""Samples to ids, masks and pixels, token by token; digests; batches; prompts that end where the answer begins."""

import dataclasses
import pickle

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import spelled

from switchkd.data.encoded import collate, pad_id_of
from switchkd.data.encoding import SampleEncoder
from switchkd.data.load_template import template_from_dict
from switchkd.data.samples import BadSample, Status, read_row
from switchkd.data.templates import TEMPLATES
from switchkd.errors import CheckpointError, DataError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.positions import IGNORED, count_positions

IMAGE = ["<image>"] * 4  # 16 × 16 pixels in patches of 8
QUESTION = ["what", "is", "it", "?"]


@pytest.fixture(scope="module")
def opened(teacher):
    """The tiny checkpoint, with ChatML's special tokens in its tokenizer."""
    checkpoint = open_checkpoint(teacher)
    checkpoint.tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    checkpoint.config.text_config.vocab_size += 2
    return checkpoint


@pytest.fixture
def make(opened, tmp_path):
    """Make an encoder over three images, 0.png to 2.png; options replace the defaults."""
    for i in range(3):
        tiny.image(tmp_path / f"{i}.png", i)

    def make_encoder(template="qa", **options):
        template = TEMPLATES[template] if isinstance(template, str) else template
        return SampleEncoder(
            **{"checkpoint": opened, "images": tmp_path, "max_length": 64, "template": template} | options
        )

    return make_encoder


def sample(*turns, image=None, index=0):
    turns = turns or (("what is it ?", "a circle"),)
    return read_row({"image": image, "conversations": tiny.conversation(*turns)}, index)


def refusal(encoder, row):
    with pytest.raises(BadSample) as caught:
        encoder.encode(row)
    return caught.value.status, caught.value.detail


def test_a_sample_token_by_token(make):
    encoded = make().encode(sample(image="0.png"))
    assert spelled(make(), encoded) == [*IMAGE, *QUESTION, "«a»", "«circle»", "«<eos>»"]
    assert encoded.input_ids.tolist() == [2, 2, 2, 2, 5, 6, 7, 4, 14, 12, 1]
    assert (encoded.input_ids.dtype, encoded.supervised.dtype) == (np.int32, np.bool_)
    assert encoded.positions == 3


def test_several_turns_token_by_token(make):
    row = sample(("what color ?", "red"), ("what shape ?", "a square"), image="0.png")
    expected = [*IMAGE, "what", "color", "?", "«red»", "«<eos>»"]
    expected += ["what", "shape", "?", "«a»", "«square»", "«<eos>»"]
    encoded = make().encode(row)
    assert spelled(make(), encoded) == expected
    assert encoded.positions == 5


def test_chatml_token_by_token(make):
    """The answer and its <|im_end|> are supervised, the <|im_end|> of the question is not; <unk> is user, system, …"""
    row = sample(("what color ?", "red"), ("it ?", "blue"))
    expected = ["<|im_start|>", *["<unk>"] * 3, "a", *["<unk>"] * 3, "<|im_end|>"]  # system You are a helpful …
    for question, answer in ((["what", "color", "?"], "«red»"), (["it", "?"], "«blue»")):
        expected += ["<|im_start|>", "<unk>", *question, "<|im_end|>", "<|im_start|>", "<unk>", answer, "«<|im_end|>»"]
    assert spelled(make(), make("qwen2_instruct").encode(row)) == expected


def test_text_only(make):
    encoded = make(images=None).encode(sample())
    assert spelled(make(), encoded) == [*QUESTION, "«a»", "«circle»", "«<eos>»"]
    assert encoded.media is None
    assert encoded.digest.image == 0


@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_the_image_becomes_as_many_tokens_as_the_tower_gives(make, opened, tokens):
    encoder = make(checkpoint=dataclasses.replace(opened, image_tokens=tokens))
    ids = encoder.encode(sample(image="0.png")).input_ids
    assert (ids == opened.image_token_id).sum() == tokens


def test_pixels_are_the_image_processors(make, opened, tmp_path):
    pixels = tiny.pixels_of(make().encode(sample(image="0.png")))
    with Image.open(tmp_path / "0.png") as image:
        expected = opened.image_processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert (pixels.shape, pixels.dtype) == ((3, 16, 16), torch.float32)
    assert torch.equal(pixels, expected)


def test_pixels_can_be_left_out_and_the_digest_stays(make):
    row = sample(image="0.png")
    without = make().encode(row, pixels=False)
    assert without.media is None
    assert without.digest == make().encode(row).digest


def test_an_image_asked_about_twice_is_decoded_once(make, monkeypatch):
    encoder = make()
    first = tiny.pixels_of(encoder.encode(sample(image="0.png")))
    monkeypatch.setattr("switchkd.data.encoding.decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(tiny.pixels_of(encoder.encode(sample(("it ?", "red"), image="0.png"))), first)


def test_mask_is_right_when_the_pad_token_is_the_end_token(teacher, make):
    checkpoint = open_checkpoint(teacher)
    checkpoint.tokenizer.pad_token = checkpoint.tokenizer.eos_token
    encoder = make(checkpoint=checkpoint)
    encoded = [encoder.encode(sample()), encoder.encode(sample(("it ?", "red")))]
    eos = checkpoint.tokenizer.eos_token_id
    batch = collate(encoded, pad_id_of(checkpoint.tokenizer))
    assert batch["input_ids"][1].tolist() == [7, 4, 10, eos, eos, eos, eos]
    assert batch["labels"][1].tolist() == [IGNORED, IGNORED, 10, eos, IGNORED, IGNORED, IGNORED]
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, 1, 0, 0, 0]


def test_too_long_is_refused_and_never_cut(make):
    row = sample(image="0.png", index=5)  # 11 tokens, 4 of them the image's
    assert len(make(max_length=11).encode(row).input_ids) == 11
    assert refusal(make(max_length=10), row) == (Status.TOO_LONG, "row 5: 11 tokens, the limit is 10")


def test_nothing_supervised(make):
    row = sample(("", ""), image="0.png", index=2)
    assert refusal(make("plain"), row) == (Status.NOTHING_SUPERVISED, "row 2: the answers are empty")
    assert spelled(make(), make("qa").encode(row))[-1] == "«<eos>»"  # an end token is something to learn


def test_a_lone_first_token_is_not_a_position(make):
    assert refusal(make("plain"), sample(("", "red")))[0] is Status.NOTHING_SUPERVISED


@pytest.mark.parametrize(
    ("image", "status"),
    [
        ("none.png", Status.IMAGE_MISSING),
        ("../0.png", Status.IMAGE_OUTSIDE_FOLDER),
        ("bad.png", Status.IMAGE_UNREADABLE),
    ],
)
def test_a_bad_image_names_row_and_file(make, tmp_path, image, status):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    found, detail = refusal(make(), sample(image=image, index=3))
    assert found is status
    assert detail.startswith("row 3: ")
    assert image in detail


def test_too_many_pixels(make):
    expected = (Status.IMAGE_TOO_LARGE, "row 0: '0.png' has 20×18 pixels, the limit is 359")
    assert refusal(make(max_image_pixels=359), sample(image="0.png")) == expected


def test_a_row_that_could_not_be_read_is_refused_with_its_own_reason(make):
    broken = read_row({"conversations": []}, 4)
    expected = (Status.NO_CONVERSATION, "row 4: no list 'conversations' or 'messages' with at least one turn")
    assert refusal(make(), broken) == expected
    with pytest.raises(BadSample, match="no_conversation: row 4: "):
        make().encode_prompt(broken, 0)


@pytest.mark.parametrize(("question", "answer"), [("is <|img|> red ?", "red"), ("is it ?", "a <|img|>")])
def test_text_that_spells_out_the_image_token_is_refused(make, opened, question, answer):
    """A checkpoint may name its image token otherwise than data files do; no feature would stand behind the token."""
    checkpoint = open_checkpoint(opened.path)
    checkpoint.tokenizer.add_tokens(["<|img|>"], special_tokens=True)
    checkpoint.config.text_config.vocab_size += 1
    checkpoint.config.image_token_id = checkpoint.tokenizer.convert_tokens_to_ids("<|img|>")
    encoder = make(checkpoint=checkpoint)
    encoded = encoder.encode(sample(image="0.png"))
    assert spelled(encoder, encoded)[:5] == ["<|img|>"] * 4 + ["what"]
    expected = (Status.MARKER_WITHOUT_IMAGE, "row 1: the text spells out the image token")
    assert refusal(encoder, sample((question, answer), image="0.png", index=1)) == expected


def test_an_image_without_an_image_folder_stops(make):
    """This is the run's mistake, not the row's: no sample with an image could be used."""
    for act in (make(images=None).encode, lambda row: make(images=None).encode_prompt(row, 0)):
        with pytest.raises(DataError, match=r"row 6 has the image '0\.png': --images must name the image folder") as e:
            act(sample(image="0.png", index=6))
        assert not isinstance(e.value, BadSample)


def test_a_missing_image_folder_and_a_missing_image_token_stop_at_once(make, opened, tmp_path):
    with pytest.raises(DataError, match=r"no image folder .*none: --images takes the folder"):
        make(images=tmp_path / "none")
    with pytest.raises(DataError, match="no image folder"):
        make(images=tmp_path / "0.png")
    checkpoint = open_checkpoint(opened.path)
    checkpoint.config.image_token_id = 99
    with pytest.raises(
        CheckpointError,
        match="image token id 99 is no added token of the tokenizer .*, it is not in it",
    ):
        make(checkpoint=checkpoint)


def digest_of(encoder, row):
    return encoder.encode(row, pixels=False).digest


def test_encoding_twice_gives_one_digest(make):
    row = sample(image="0.png")
    assert digest_of(make(), row).differing(digest_of(make(), row)) == []
    assert len(set(digest_of(make(), row))) == 3


def test_the_digest_does_not_depend_on_row_id_or_file_name(make, tmp_path):
    (tmp_path / "copy.png").write_bytes((tmp_path / "0.png").read_bytes())
    assert digest_of(make(), sample(image="0.png")) == digest_of(make(), sample(image="copy.png", index=9))


def test_one_word_changes_the_text_of_the_digest(make):
    one, other = sample(("what is it ?", "red"), image="0.png"), sample(("what is it ?", "blue"), image="0.png")
    assert digest_of(make(), one).differing(digest_of(make(), other)) == ["text"]


def test_one_pixel_changes_the_image_of_the_digest(make, tmp_path):
    before = digest_of(make(), sample(image="0.png"))
    with Image.open(tmp_path / "0.png") as image:
        image.putpixel((3, 3), (1, 2, 3))
        image.save(tmp_path / "0.png")
    assert before.differing(digest_of(make(), sample(image="0.png"))) == ["image"]


def test_a_template_with_another_mask_changes_the_mask_of_the_digest(make):
    """The same tokens, with the end token out of the supervised part."""
    unsupervised_end = template_from_dict(TEMPLATES["qa"].as_dict() | {"answer": "{text}", "after": "<eos>"})
    one, other = make().encode(sample(image="0.png")), make(unsupervised_end).encode(sample(image="0.png"))
    assert one.input_ids.tolist() == other.input_ids.tolist()
    assert one.digest.differing(other.digest) == ["supervised mask"]


def test_swapped_rows_differ_in_all_that_differs(make):
    rows = [sample(("what is it ?", "red"), image="0.png"), sample(("it ?", "a circle"), image="1.png")]
    first, second = (digest_of(make(), row) for row in rows)
    assert first.differing(second) == ["text", "supervised mask", "image"]


def test_dropping_the_image_changes_text_mask_and_image(make):
    with_image, without = digest_of(make(), sample(image="0.png")), digest_of(make(), sample())
    assert with_image.differing(without) == ["text", "supervised mask", "image"]


def test_collate_pads_on_the_right(make):
    encoder = make()
    encoded = [encoder.encode(sample(("it ?", "red"))), encoder.encode(sample(image="0.png"))]
    batch = collate(encoded, pad_id=0)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "has_image", "pixel_values"}
    assert batch["input_ids"].tolist() == [[7, 4, 10, 1, *[0] * 7], [2, 2, 2, 2, 5, 6, 7, 4, 14, 12, 1]]
    assert batch["attention_mask"].tolist() == [[1] * 4 + [0] * 7, [1] * 11]
    assert batch["labels"].tolist() == [[-100, -100, 10, 1, *[-100] * 7], [*[-100] * 8, 14, 12, 1]]
    assert all(batch[key].dtype == torch.int64 for key in ("input_ids", "attention_mask", "labels"))
    assert batch["has_image"].tolist() == [False, True]
    assert count_positions(batch["labels"]).tolist() == [sample.positions for sample in encoded]


def test_collate_keeps_pixel_order_around_text_only_samples(make):
    encoder = make()
    images = [None, "2.png", None, "0.png", "1.png", None]
    batch = collate([encoder.encode(sample(image=image)) for image in images], pad_id=0)
    assert batch["has_image"].tolist() == [image is not None for image in images]
    expected = [tiny.pixels_of(encoder.encode(sample(image=image))) for image in ("2.png", "0.png", "1.png")]
    assert torch.equal(batch["pixel_values"], torch.stack(expected))
    image_tokens = (batch["input_ids"] == encoder.image_token_id).sum(-1)
    assert image_tokens.tolist() == [0, 4, 0, 4, 4, 0]


def test_collate_without_images_has_no_pixels(make):
    batch = collate([make().encode(sample())], pad_id=0)
    assert "pixel_values" not in batch
    assert batch["has_image"].tolist() == [False]


def test_the_pad_id_is_zero_where_there_is_no_pad_token(teacher):
    tokenizer = open_checkpoint(teacher).tokenizer
    tokenizer.pad_token = "<unk>"
    assert pad_id_of(tokenizer) == 3
    tokenizer.pad_token = None
    assert pad_id_of(tokenizer) == 0


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("image", ["0.png", None])
def test_a_prompt_ends_exactly_where_the_answer_begins(make, template, image):
    encoder = make(template)
    answers = ["red", "blue square", "a"]
    row = sample(("what color ?", answers[0]), ("what ?", answers[1]), ("it ?", answers[2]), image=image)
    full = encoder.encode(row)
    for turn, answer in enumerate(answers):
        if template == "plain" and image is None and turn == 0:
            with pytest.raises(BadSample, match=r"row \d+: nothing stands before the answer of turn 0"):
                encoder.encode_prompt(row, turn)
            continue
        prompt, media = encoder.encode_prompt(row, turn)
        assert full.input_ids[: len(prompt)].tolist() == prompt.tolist()
        words = spelled(encoder, full)[len(prompt) : len(prompt) + len(answer.split())]
        assert words == [f"«{word}»" for word in answer.split()]
        assert (media is None) == (image is None)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_token_before_an_answer_is_not_supervised(make, template):
    encoder, row = make(template), sample(image="0.png")
    prompt, media = encoder.encode_prompt(row, 0)
    full = encoder.encode(row)
    assert not full.supervised[: len(prompt)].any()
    assert full.supervised[len(prompt)]
    assert torch.equal(media["pixel_values"][0], tiny.pixels_of(full))


def test_a_prompt_does_not_show_the_answer(make):
    one, other = sample(("it ?", "red"), image="0.png"), sample(("it ?", "a blue circle"), image="0.png")
    assert make().encode_prompt(one, 0)[0].tolist() == make().encode_prompt(other, 0)[0].tolist() == [2, 2, 2, 2, 7, 4]


def test_a_prompt_that_is_too_long_is_refused(make):
    with pytest.raises(BadSample, match=r"too_long: .*8 tokens, the limit is 7"):
        make(max_length=7).encode_prompt(sample(image="0.png"), 0)


def test_a_pickled_encoder_encodes_the_same(make):
    encoder, row = make(), sample(image="0.png")
    copied = pickle.loads(pickle.dumps(encoder)).encode(row)
    assert copied.digest == encoder.encode(row).digest
    assert torch.equal(tiny.pixels_of(copied), tiny.pixels_of(encoder.encode(row)))
