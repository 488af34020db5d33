"""Templates: the exact text and mask of every built-in one, user text that looks like a pattern, and template files."""

import json
import re

import pytest

from switchkd.data.load_template import load_template, template_from_dict
from switchkd.data.templates import TEMPLATES
from switchkd.errors import ConfigError

ONE = [("What is it?", "A cat")]
TWO = [*ONE, ("Sure?", "Yes")]

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

# (template, turns, has_image) → the conversation, supervised parts in «».
EXPECTED = [
    ("plain", ONE, True, "<image>«A cat\n»"),
    ("plain", ONE, False, "«A cat\n»"),
    ("plain", TWO, True, "<image>«A cat\n»«Yes\n»"),
    ("plain", TWO, False, "«A cat\n»«Yes\n»"),
    ("qwen2_base", ONE, True, VICUNA + "USER: <image>\nWhat is it? ASSISTANT:« A cat<eos>»"),
    ("qwen2_base", ONE, False, VICUNA + "USER: What is it? ASSISTANT:« A cat<eos>»"),
    (
        "qwen2_base",
        TWO,
        True,
        VICUNA + "USER: <image>\nWhat is it? ASSISTANT:« A cat<eos>»USER: Sure? ASSISTANT:« Yes<eos>»",
    ),
    ("qwen2_base", TWO, False, VICUNA + "USER: What is it? ASSISTANT:« A cat<eos>»USER: Sure? ASSISTANT:« Yes<eos>»"),
    (
        "qwen2_instruct",
        ONE,
        True,
        SYSTEM + "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n«A cat<|im_end|>»\n",
    ),
    (
        "qwen2_instruct",
        ONE,
        False,
        SYSTEM + "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n«A cat<|im_end|>»\n",
    ),
    (
        "qwen2_instruct",
        TWO,
        True,
        SYSTEM + "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n«A cat<|im_end|>»\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n«Yes<|im_end|>»\n",
    ),
    (
        "qwen2_instruct",
        TWO,
        False,
        SYSTEM + "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n«A cat<|im_end|>»\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n«Yes<|im_end|>»\n",
    ),
    ("qa", ONE, True, "<image>\nWhat is it? «A cat<eos>»"),
    ("qa", ONE, False, "What is it? «A cat<eos>»"),
    ("qa", TWO, True, "<image>\nWhat is it? «A cat<eos>»Sure? «Yes<eos>»"),
    ("qa", TWO, False, "What is it? «A cat<eos>»Sure? «Yes<eos>»"),
]

CUSTOM = {
    "name": "mine",
    "system": "S|",
    "user": "U:{image}{text}|",
    "assistant": "A:",
    "answer": "{text}{eos}",
    "after": "|",
    "image": "[<image>]",
}


def marked(segments):
    return "".join(f"«{text}»" if supervised else text for text, supervised in segments)


@pytest.mark.parametrize(("name", "turns", "has_image", "expected"), EXPECTED)
def test_exact_text_and_mask(name, turns, has_image, expected):
    assert marked(TEMPLATES[name].render(turns, has_image, "<eos>")) == expected


def test_every_built_in_template_is_covered_and_goes_by_its_own_name():
    assert {name for name, *_ in EXPECTED} == set(TEMPLATES)
    assert all(load_template(name).name == name for name in TEMPLATES)


@pytest.mark.parametrize(("name", "turns", "has_image", "expected"), EXPECTED)
def test_prompt_is_everything_before_the_last_answer(name, turns, has_image, expected):
    prompt = marked(TEMPLATES[name].prompt(turns, has_image, "<eos>"))
    assert prompt == expected[: expected.rindex("«")]


def test_prompt_does_not_depend_on_the_answer_it_leads_to():
    for template in TEMPLATES.values():
        asked = template.prompt([("What is it?", "")], True, "<eos>")
        assert asked == template.prompt(ONE, True, "<eos>")


def test_prompt_keeps_a_question_that_reads_like_an_empty_answer():
    captions = template_from_dict(CUSTOM | {"system": "", "user": "{image}\n", "assistant": "", "answer": "{text}\n"})
    assert marked(captions.prompt(ONE, False, None)) == "\n"
    assert marked(TEMPLATES["plain"].prompt([("", ""), ("", "A cat")], False, None)) == "«\n»"


@pytest.mark.parametrize(
    "text", ["{eos}", "{text}", "{image}", "{", "}", "{{}}", "{0}", "a {eos}{text}{image} b", "%s"]
)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_that_looks_like_a_pattern_is_left_alone(name, text):
    plain_words = marked(TEMPLATES[name].render([("QUESTION", "ANSWER")], True, "<eos>"))
    found = marked(TEMPLATES[name].render([(text, text)], True, "<eos>"))
    assert found == plain_words.replace("QUESTION", text).replace("ANSWER", text)


def test_no_segment_is_empty():
    for template in TEMPLATES.values():
        assert all(text for text, _ in template.render([("", "")], False, "<eos>"))


def test_custom_template_file(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(CUSTOM))
    template = load_template(str(path))
    assert template.as_dict() == CUSTOM
    expected = "S|U:[<image>]What is it?|A:«A cat</s>»|U:Sure?|A:«Yes</s>»|"
    assert marked(template.render(TWO, True, "</s>")) == expected


def test_after_and_image_have_defaults():
    template = template_from_dict({key: CUSTOM[key] for key in ("name", "system", "user", "assistant", "answer")})
    assert (template.after, template.image) == ("", "<image>\n")


def test_as_dict_and_back():
    for template in TEMPLATES.values():
        assert template_from_dict(json.loads(json.dumps(template.as_dict()))) == template


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"no template 'vicuna': pass one of plain, qwen2_base, .*or a JSON file"):
        load_template("vicuna")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({k: v for k, v in CUSTOM.items() if k not in ("answer", "user")}, r"^template lacks answer, user$"),
        (CUSTOM | {"sytem": ""}, r"^template has unknown keys sytem; known: after, answer, assistant, image, name, "),
        (CUSTOM | {"after": None}, r"^a template is an object of strings with the keys after, answer, "),
        (CUSTOM | {"system": 3}, r"^a template is an object of strings"),
        ([CUSTOM], r"^a template is an object of strings"),
        ("plain", r"^a template is an object of strings"),
    ],
)
def test_wrong_template_data_is_named(data, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        template_from_dict(data)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=message):
        load_template(str(path))


@pytest.mark.parametrize("content", [b"", b"{'name': 'mine'}", b'{"name": "\xff"}'])
def test_template_file_that_is_not_json(content, tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^template file .*mine\.json is not JSON: "):
        load_template(str(path))


def test_end_token_is_needed_only_where_a_template_uses_it():
    message = "template 'qa' ends answers with the end token, but the tokenizer has none"
    with pytest.raises(ConfigError, match=message):
        TEMPLATES["qa"].render(ONE, False, None)
    with pytest.raises(ConfigError, match=message):
        TEMPLATES["qa"].prompt(ONE, False, None)
    assert marked(TEMPLATES["plain"].render(ONE, True, None)) == "<image>«A cat\n»"
    assert marked(TEMPLATES["qwen2_instruct"].render(ONE, True, None)).endswith("«A cat<|im_end|>»\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "yes"}, "'answer' must hold {text}"),
        ({"user": "Q: {text}"}, "'user' must hold {image}"),
        ({"image": "picture"}, "'image' must hold <image> exactly once"),
        ({"system": "<image>"}, "<image> belongs into 'image', not into 'system'"),
    ],
)
def test_a_template_that_could_not_be_right_is_refused(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        template_from_dict(TEMPLATES["qa"].as_dict() | change)
