"""A checkpoint's own chat template: masks by construction, refusals where they cannot be told, the manifest's record."""

import dataclasses
import json

import chat_templates
import pytest
import tiny
from click.testing import CliRunner
from tiny import spelled
from training import history
from transformers import AutoTokenizer

from switchkd.cli.main import main
from switchkd.data.chat_template import ChatTemplate, TemplateNotInvertible, chat_template_of, open_chat_template
from switchkd.data.encoding import SampleEncoder
from switchkd.data.load_template import load_template, template_from_dict
from switchkd.data.samples import BadSample, Status, read_row
from switchkd.data.templates import TEMPLATES
from switchkd.errors import ConfigError, StoreMismatch
from switchkd.models.checkpoint import open_checkpoint
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.evaluation.generation import stop_ids_of
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train
from switchkd.stores import TeacherStore

CHATML, with_chat = chat_templates.CHATML, chat_templates.with_chat

# Parts, as in Qwen2-VL: an image token of its own.
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{% if p['type'] == 'image' %}<|pad|>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As in Llava 1.5's processor: generation blocks, no end token.
GENERATION = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n"
    "{% elif m['role'] == 'assistant' %}{% generation %}{{ p['text'] + ' ' }}{% endgeneration %}"
    "{% else %}{{ p['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} {% else %}ASSISTANT: {{ m['content'] }}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TURNS = [("what color ?", "red"), ("what shape ?", "a circle")]


def opened(source, image_token="<image>"):
    ends = ["<eos>", "<|im_start|>", "<|im_end|>", image_token]
    return open_chat_template(source, {"eos_token": "<eos>"}, image_token, ends)


def marked(template, turns=TURNS, has_image=True):
    return "".join(f"[[{text}]]" if said else text for text, said in template.render(turns, has_image, "<eos>"))


def test_chatml_equals_our_own():
    template = opened(CHATML)
    assert (template.parts, template.end) == (False, "<|im_end|>")
    for has_image in (True, False):
        assert marked(template, has_image=has_image) == marked(TEMPLATES["qwen2_instruct"], has_image=has_image)
        ours = TEMPLATES["qwen2_instruct"].prompt(TURNS, has_image, "<eos>")
        assert "".join(t for t, _ in template.prompt(TURNS, has_image, None)) == "".join(t for t, _ in ours)


def test_parts_and_another_image_token():
    template = opened(PARTS, "<|pad|>")
    assert template.parts
    assert marked(template, TURNS[:1]) == (
        "<|im_start|>user\n<image>what color ?<|im_end|>\n<|im_start|>assistant\n[[red<|im_end|>]]\n"
    )


def test_generation_blocks_are_the_mask():
    assert marked(opened(GENERATION)) == (
        "USER: <image>\nwhat color ? ASSISTANT: [[red ]]USER: what shape ? ASSISTANT: [[a circle ]]"
    )


def test_what_ends_an_answer_is_found():
    template = opened(VICUNA)
    assert marked(template, TURNS[:1], False) == "USER: what color ? ASSISTANT: [[red<eos>]]"
    assert template.answer_end(None) == "<eos>"


REFUSED = {
    "history rewritten": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] if loop.last else m['content'][:3] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "does not tell which words are the assistant's",
    ),
    "answers left out": (CHATML.replace("m['content']", "''"), "does not tell"),
    "answers twice": (CHATML.replace("m['content'] +", "m['content'] + m['content'] +"), "does not tell"),
    "generation around the question": (
        GENERATION.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        + "{% generation %}{{ messages[0]['content'][0]['text'] }}{% endgeneration %}",
        "does not tell",
    ),
    "raises": ("{{ raise_exception('no images here') }}", "no images here"),
    "broken Jinja": ("{% for m in messages %}", "the template fails"),
    "a date": (CHATML + "{{ strftime_now('%d') }}", "today's date"),
    "images left out": (GENERATION.replace("<image>\n", ""), "1 image became 0 image tokens"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_template_whose_masks_cannot_be_told_is_refused(why):
    source, message = REFUSED[why]
    with pytest.raises(ConfigError) as caught:
        opened(source)
    assert message in str(caught.value)
    assert "choose another --template" in str(caught.value)


def test_a_single_conversation_that_does_not_come_out_is_a_bad_sample(teacher, tmp_path):
    strips = CHATML.replace("m['content']", "m['content'].replace('secret', '')")
    template = opened(strips)
    with pytest.raises(TemplateNotInvertible):
        template.render([("what ?", "a secret")], False, None)
    checkpoint = open_checkpoint(teacher)
    encoder = SampleEncoder(checkpoint, template, None, 64)
    row = read_row({"conversations": tiny.conversation(("what ?", "a secret"))}, 3)
    with pytest.raises(BadSample, match="row 3: template chat: ") as caught:
        encoder.encode(row)
    assert caught.value.status is Status.BAD_TURN


def test_a_checkpoint_token_by_token(with_chat, tmp_path):
    checkpoint = open_checkpoint(with_chat)
    template = load_template("chat", checkpoint)
    encoder = SampleEncoder(checkpoint, template, None, 64)
    row = read_row({"conversations": tiny.conversation(("what color ?", "red"), ("it ?", "blue"))}, 0)
    expected = SampleEncoder(checkpoint, TEMPLATES["qwen2_instruct"], None, 64)
    assert spelled(encoder, encoder.encode(row)) == spelled(expected, expected.encode(row))
    end = checkpoint.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_ids_of(template, checkpoint.tokenizer) == sorted([1, end])


def test_no_chat_template(teacher, with_chat, tmp_path):
    with pytest.raises(ConfigError, match="has no chat template; choose another --template"):
        load_template("chat", open_checkpoint(teacher))
    checkpoint = open_checkpoint(teacher)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert chat_template_of(tmp_path, checkpoint.tokenizer) == CHATML


def test_the_manifest_keeps_it_and_another_one_is_refused(with_chat, tmp_path):
    data = tiny.data(tmp_path, tiny.rows(6, text_only=(1,), two_turns=(2,)))
    cache = CacheOptions(
        teacher=with_chat, data=data, images=tmp_path / "images", out=tmp_path / "s.zarr", template="chat", k=8
    )
    assert cache_teacher(cache).samples == 6
    kept = TeacherStore.open(cache.out).manifest.template
    template = load_template("chat", open_checkpoint(with_chat))
    assert kept == template.as_dict()
    assert template_from_dict(kept) == template
    options = TrainOptions(
        student=with_chat, teacher=with_chat, data=data, images=cache.images, cache=cache.out, output=tmp_path / "a",
        steps=2, batch_size=3, log_every=1,
    )  # fmt: skip
    train(options)
    train(dataclasses.replace(options, output=tmp_path / "b", template="chat"))
    assert history(tmp_path / "a") == history(tmp_path / "b")
    tokenizer = AutoTokenizer.from_pretrained(with_chat)
    tokenizer.chat_template = CHATML.replace("helpful", "kind")
    tokenizer.save_pretrained(with_chat)
    with pytest.raises(StoreMismatch, match="template"):
        train(dataclasses.replace(options, output=tmp_path / "c", template="chat"))
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(with_chat)


def test_it_is_plain_data():
    template = opened(PARTS, "<|pad|>")
    assert all(isinstance(value, str) for value in template.as_dict().values())
    assert isinstance(template_from_dict(json.loads(json.dumps(template.as_dict()))), ChatTemplate)


def show(place, model, *more):
    return CliRunner().invoke(main, ["data", "show", str(place / "data.json"), "--model", str(model), *more])


def test_show_marks_what_is_supervised(with_chat, tmp_path):
    rows = tiny.rows(3, text_only=(1,))
    rows[2]["conversations"] = rows[2]["conversations"][:1]
    tiny.data(tmp_path, rows)
    done = show(tmp_path, with_chat, "--template", "qa")
    assert done.exit_code == 0, done.output
    assert done.stdout == (
        "row 0, id s0, 000.png: 11 tokens, 4 of the image, 2 supervised\n<image ×4>what color is it ?[[red <eos>]]\n"
        "  2:<image>×4 5:what 8:color 6:is 7:it 4:? [[10:red 1:<eos>]]\n\n"
        "row 1, id t1, no image: 7 tokens, 0 of the image, 2 supervised\nwhat color is it ?[[blue <eos>]]\n"
        "  5:what 8:color 6:is 7:it 4:? [[11:blue 1:<eos>]]\n\n"
        "row 2, id s2, no image: roles_out_of_order: row 2: the last turn is a question without an answer\n\n"
    )
    assert show(tmp_path, with_chat, "-n", "1", "--start", "1", "--template", "chat").stdout.startswith("row 1, id t1")


def test_show_in_colour(with_chat, tmp_path, monkeypatch):
    tiny.data(tmp_path, tiny.rows(1))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = show(tmp_path, with_chat, "--template", "qa").stdout
    assert "\x1b[1;32mred <eos>\x1b[0m" in coloured
    assert "[[" not in coloured
    assert "[[red <eos>]]" in show(tmp_path, with_chat, "--template", "qa", "--plain").stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[red <eos>]]" in show(tmp_path, with_chat, "--template", "qa").stdout
