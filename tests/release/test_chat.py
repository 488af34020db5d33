"""`switchkd chat`: what is streamed is what `eval` answers, turns follow each other, the run's template is taken."""

import json
import shutil

import chat_templates
import pytest
import tiny
import torch
from click.testing import CliRunner
from transformers import AutoTokenizer

from switchkd.cli.main import main
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import BadSample, Status
from switchkd.data.templates import TEMPLATES
from switchkd.errors import ConfigError, DataError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_model
from switchkd.pipelines.evaluation.generation import GreedyGenerator
from switchkd.pipelines.model_template import template_of_model
from switchkd.pipelines.release.chat import Chat, template_of
from switchkd.pipelines.release.options import ChatOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train

CHATML, with_chat = chat_templates.CHATML, chat_templates.with_chat


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    return tiny.image(tmp_path_factory.mktemp("picture") / "0.png", 0)


def options(model, picture, **changed):
    return ChatOptions(**{"model": model, "image": picture, "template": "qa", "max_new_tokens": 6} | changed)


def answered(model, turns, image, template="qa"):
    """What batched decoding answers."""
    checkpoint = open_checkpoint(model)
    encoder = SampleEncoder(checkpoint, TEMPLATES[template], None, 2048)
    answerer = GreedyGenerator(load_model(checkpoint), encoder, TEMPLATES[template], 6)
    return answerer.answer([encoder.encode_turns(turns, [] if image is None else [image], ["x"])])[0]


def test_the_stream_is_the_answer(teacher, picture):
    chat = Chat(options(teacher, picture))
    pieces = []
    answer = chat.ask("what color is it ?", pieces.append)
    assert answer == answered(teacher, [("what color is it ?", "")], picture.read_bytes())
    assert "".join(pieces).strip() == answer
    assert len(pieces) > 1


def test_a_second_question_follows_the_first(teacher, picture):
    chat = Chat(options(teacher, picture))
    first = chat.ask("what color is it ?", lambda _: None)
    second = chat.ask("what shape ?", lambda _: None)
    turns = [("what color is it ?", first), ("what shape ?", "")]
    assert second == answered(teacher, turns, picture.read_bytes())
    assert chat.turns == [turns[0], ("what shape ?", second)]


def test_without_an_image(teacher):
    chat = Chat(options(teacher, None))
    assert chat.ask("what shape ?", lambda _: None) == answered(teacher, [("what shape ?", "")], None)


def test_a_conversation_that_grows_too_long_begins_anew(teacher, picture):
    chat = Chat(options(teacher, picture, max_length=18))
    for _ in range(4):
        chat.ask("what color is it ?", lambda _: None)
    assert len(chat.turns) == 1
    with pytest.raises(BadSample, match="the limit is 18") as caught:
        chat.ask("what " * 20, lambda _: None)
    assert caught.value.status is Status.TOO_LONG
    with pytest.raises(BadSample, match="holds <image>"):
        chat.ask("<image> what ?", lambda _: None)


def test_what_ends_an_answer_is_not_heard(teacher, picture, monkeypatch):
    chat = Chat(options(teacher, picture))
    model = chat._answerer.model
    tokens = [10, 12, 1]  # red circle <eos>

    def generate(streamer, input_ids, **_):
        streamer.put(input_ids)
        for token in tokens:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(model, "generate", generate)
    pieces = []
    assert chat.ask("what ?", pieces.append) == "red circle"
    assert "".join(pieces) == "red circle"


def test_which_template(teacher, student, with_chat, tmp_path):
    assert template_of(open_checkpoint(teacher), "plain").name == "plain"
    assert template_of(open_checkpoint(with_chat)).as_dict()["chat_template"] == CHATML
    with pytest.raises(ConfigError, match="is not known: pass --template"):
        template_of(open_checkpoint(teacher))
    data = tiny.data(tmp_path, tiny.rows(4))
    train(
        TrainOptions(
            student=student, data=data, images=tmp_path / "images", output=tmp_path / "run", template="qa",
            objective="sft", switch=False, steps=1, batch_size=4,
        )
    )  # fmt: skip
    trained = open_checkpoint(tmp_path / "run")
    assert template_of(trained) == TEMPLATES["qa"]
    assert template_of_model(trained, None) == TEMPLATES["qa"]  # of `eval` and `attend`
    assert template_of_model(trained, "plain") == TEMPLATES["plain"]
    assert template_of_model(open_checkpoint(student), None) == TEMPLATES["qwen2_base"]


def run(*words, **more):
    return CliRunner().invoke(main, ["chat", *map(str, words), "--max-new-tokens", "4", "--template", "qa"], **more)


def test_the_command(teacher, picture):
    asked = run("--model", teacher, "--image", picture, "--question", "what shape ?")
    assert asked.exit_code == 0, asked.output
    chat = Chat(options(teacher, picture, max_new_tokens=4))
    expected = [chat.ask("what shape ?", lambda _: None), chat.ask("it ?", lambda _: None)]
    assert asked.stdout.strip() == expected[0]
    piped = run("--model", teacher, "--image", picture, input="what shape ?\n\nit ?\n")
    assert [line.strip() for line in piped.stdout.splitlines()] == expected


def test_on_a_terminal_an_empty_line_ends_it(teacher, picture, monkeypatch):
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    typed = run("--model", teacher, "--image", picture, input="what shape ?\n\n")
    assert typed.exit_code == 0, typed.output
    assert typed.stdout.count("you> ") == 2


def test_mistakes(teacher, picture, tmp_path):
    missing = run("--model", teacher, "--image", tmp_path / "none.png", "--question", "what ?")
    assert (missing.exit_code, "no image" in missing.output) == (2, True)
    (tmp_path / "bad.png").write_text("no")
    bad = run("--model", teacher, "--image", tmp_path / "bad.png", "--question", "what ?")
    assert (bad.exit_code, "image_unreadable" in bad.output) == (2, True)
    assert "Traceback" not in missing.output + bad.output
    with pytest.raises(DataError, match="no image"):
        Chat(options(teacher, tmp_path))


def test_a_run_without_the_record_of_its_template_asks_for_one(teacher, tmp_path):
    folder = shutil.copytree(teacher, tmp_path / "old")
    (folder / "summary.json").write_text(json.dumps({"steps": 1}))
    with pytest.raises(ConfigError, match="pass --template"):
        template_of(open_checkpoint(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template is None
