"""An exported run in plain transformers: the same ids, pixels and answers; its card; pushed only when asked."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from click.testing import CliRunner
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from switchkd.cli.main import main
from switchkd.data.chat_template import open_chat_template
from switchkd.data.chat_template_export import chat_template_source
from switchkd.data.encoding import SampleEncoder
from switchkd.data.templates import TEMPLATES
from switchkd.data.tokenization import _with_spaces_moved
from switchkd.errors import ConfigError, DataError, RunError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_model
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.evaluation.exact_match import evaluate
from switchkd.pipelines.evaluation.generation import GreedyGenerator
from switchkd.pipelines.evaluation.options import EvalOptions
from switchkd.pipelines.release.chat import Chat, template_of
from switchkd.pipelines.release.export import export
from switchkd.pipelines.release.options import ChatOptions, ExportOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train

QUESTIONS = ("What color is it?", "  two  spaces\nand a line", "größer 😀 ?")


def bpe():
    """A byte-level BPE as Qwen's, learnt on the spot; its merges reach across spaces and line ends."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = [template.system + template.user + template.assistant for template in TEMPLATES.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(words * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        extra_special_tokens=["<image>", "<|im_start|>", "<|im_end|>"],
    )


def test_the_tokenizer_merges_across_segments():
    """Else equal ids would show nothing."""
    template, tokenizer = TEMPLATES["qwen2_base"], bpe()
    apart = tokenizer.encode(template.system) + tokenizer.encode("USER: ")
    assert tokenizer.encode(template.system + "USER: ") != apart


@pytest.fixture(scope="module")
def student_bpe(tmp_path_factory):
    """A tiny student with that tokenizer, and CLIP's tower, whose first feature is dropped."""
    folder = tmp_path_factory.mktemp("bpe") / "ckpt"
    tokenizer = bpe()
    tiny.checkpoint(
        folder, seed=3, width=32, rows=len(tokenizer), vision=tiny.vision_config("clip"), layer=-2, strategy="default"
    )
    config = json.loads((folder / "config.json").read_text())
    config["image_token_id"] = config["image_token_index"] = tokenizer.convert_tokens_to_ids("<image>")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["qwen2_base", "qwen2_instruct", "qa"])
def run(request, student_bpe, tmp_path_factory):
    """A finished run with one of the templates, from a store of itself."""
    folder = tmp_path_factory.mktemp("run")
    rows = tiny.rows(6, text_only=(1,), two_turns=(2,))
    data = tiny.data(folder, rows)
    made = CacheOptions(
        teacher=student_bpe, data=data, images=folder / "images", out=folder / "s.zarr", template=request.param, k=8
    )
    cache_teacher(made)
    options = TrainOptions(
        student=student_bpe, teacher=student_bpe, data=data, images=made.images, cache=made.out, output=folder / "run",
        steps=2, batch_size=3, image_mode=None,
    )  # fmt: skip
    train(options)
    return folder


@pytest.fixture(scope="module")
def exported(run):
    return export(ExportOptions(run / "run", run / "exported"))


def messages(question, picture):
    image = [] if picture is None else [{"type": "image", "image": picture}]
    return [{"role": "user", "content": [*image, {"type": "text", "text": question}]}]


@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("question", QUESTIONS)
def test_plain_transformers_answers_the_same(run, exported, question, with_image):
    path = run / "images/000.png"
    checkpoint = open_checkpoint(run / "run")
    template = template_of(checkpoint)
    encoder = SampleEncoder(checkpoint, template, None, 2048)
    ids, media = encoder.encode_turns([(question.strip(), "")], [path.read_bytes()] if with_image else [], ["x"])

    processor = AutoProcessor.from_pretrained(exported, backend="pil")
    inputs = processor.apply_chat_template(
        messages(question.strip(), Image.open(path).convert("RGB") if with_image else None),
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert inputs["input_ids"][0].tolist() == ids.tolist()
    if with_image:
        assert torch.equal(inputs["pixel_values"], media["pixel_values"])
    model = AutoModelForImageTextToText.from_pretrained(exported).eval()
    generated = model.generate(**inputs, max_new_tokens=8)[0, len(ids) :].tolist()

    answerer = GreedyGenerator(load_model(checkpoint), encoder, template, 8)
    heard = answerer.model.generate(
        input_ids=torch.from_numpy(ids).long()[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        **(media or {}),
        do_sample=False, max_new_tokens=8, eos_token_id=answerer.stop_ids, pad_token_id=answerer.pad_id,
    )[0, len(ids) :].tolist()  # fmt: skip
    assert generated == heard


def test_the_weights_and_the_stop_tokens_are_the_runs(run, exported):
    ours = load_model(open_checkpoint(run / "run")).state_dict()
    theirs = AutoModelForImageTextToText.from_pretrained(exported)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.state_dict().items())
    end = template_of(open_checkpoint(run / "run")).answer_end("<|endoftext|>")
    tokenizer = open_checkpoint(exported).tokenizer
    assert tokenizer.convert_tokens_to_ids(end) in theirs.generation_config.eos_token_id
    assert theirs.generation_config.do_sample is False


def test_chat_takes_the_exported_template(run, exported):
    """switchkd reads the template that it wrote, and talks with the folder as with the run."""
    said = [
        Chat(ChatOptions(folder, run / "images/000.png", max_new_tokens=6)).ask("What color is it?", lambda _: None)
        for folder in (run / "run", exported)
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("name", ["qwen2_base", "qwen2_instruct", "qa"])
@pytest.mark.parametrize("has_image", [True, False])
def test_our_templates_as_jinja_say_the_same(name, has_image):
    template = TEMPLATES[name]
    ends = ["<eos>", "<|im_start|>", "<|im_end|>"]
    jinja = open_chat_template(chat_template_source(template, "<eos>"), {"eos_token": "<eos>"}, "<image>", ends)
    turns = [('what "quoted" é\n{{ x }} ?', "red"), ("it ?", "a\nb")]

    def joined(segments):
        segments = _with_spaces_moved(segments)
        return "".join(f"[[{text}]]" if said else text for text, said in segments).rstrip(" ")

    for make in ("render", "prompt"):
        ours, theirs = (getattr(format, make)(turns, has_image, "<eos>") for format in (template, jinja))
        assert joined(theirs) == joined(ours)


def test_a_caption_template_leaves_the_question_out():
    from transformers.utils.chat_template_utils import render_jinja_template

    source = chat_template_source(TEMPLATES["plain"], "<eos>")
    texts, _ = render_jinja_template([messages("what ?", "x")], chat_template=source, add_generation_prompt=True)
    assert texts == ["<image>"]


def test_the_card_says_what_was_recorded(run, exported):
    card = (exported / "README.md").read_text()
    summary = json.loads((run / "run/summary.json").read_text())
    for words in (
        "library_name: transformers",
        "| objective | dbild-rkl |",
        f"| data file | data.json, SHA-256 {summary['made_from']['data']} |",
        f"| its logits | {summary['made_from']['teacher_signal']} |",
        f"| teacher store | identity {summary['made_from']['store']} |",
        f"| template | {summary['made_from']['template']['name']} |",
        "| samples | 6; skipped: none |",
        'AutoProcessor.from_pretrained("exported", backend="pil")',
    ):
        assert words in card, words
    assert str(run) not in card
    assert "## Scores" not in card


def test_scores_of_this_student_and_of_no_other(run, teacher, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run / "run", folder)
    name = json.loads((folder / "summary.json").read_text())["made_from"]["template"]["name"]
    options = EvalOptions(
        model=folder,
        data=run / "data.json",
        output=folder / "eval",
        images=run / "images",
        template=name,
        max_new_tokens=2,
    )
    scores = evaluate(options)
    card = (export(ExportOptions(folder, tmp_path / "out")) / "README.md").read_text()
    assert f"Exact match on data.json, {scores.questions} questions, greedy, template {name}" in card
    assert f"| all | {scores.accuracy:.4f} |" in card
    other = replace(options, model=teacher, output=tmp_path / "other", template="qa")
    evaluate(other)
    with pytest.raises(DataError, match="scores of other weights"):
        export(ExportOptions(folder, tmp_path / "out2", scores=[other.output]))
    with pytest.raises(DataError, match="holds no evaluation"):
        export(ExportOptions(folder, tmp_path / "out2", scores=[tmp_path]))
    assert not (tmp_path / "out2").exists()


def test_refusals_leave_nothing_behind(run, teacher, tmp_path):
    with pytest.raises(ConfigError, match="is no finished run"):
        export(ExportOptions(teacher, tmp_path / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(ConfigError, match="is there already"):
        export(ExportOptions(run / "run", tmp_path / "full"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_half_precision(run, tmp_path):
    made = export(ExportOptions(run / "run", tmp_path / "half", dtype="bfloat16"))
    assert AutoModelForImageTextToText.from_pretrained(made).dtype == torch.bfloat16


class FakeHub:
    def __init__(self):
        self.calls = []

    def create_repo(self, repository, **options):
        self.calls.append((repository, options))

    def upload_folder(self, **options):
        self.calls.append(options)


def test_pushed_only_when_asked(run, tmp_path, monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    done = CliRunner().invoke(main, ["export", str(run / "run"), str(tmp_path / "a")])
    assert (done.exit_code, hub.calls) == (0, []), done.output
    done = CliRunner().invoke(
        main, ["export", str(run / "run"), str(tmp_path / "b"), "--push-to", "me/it", "--private"]
    )
    assert done.exit_code == 0, done.output
    assert hub.calls[0] == ("me/it", {"private": True, "exist_ok": True})
    assert (hub.calls[1]["repo_id"], hub.calls[1]["folder_path"]) == ("me/it", tmp_path / "b")
    assert "pushed to me/it" in done.output
    assert 'from_pretrained("me/it"' in (tmp_path / "b/README.md").read_text()


def test_a_push_that_fails_keeps_the_folder(run, tmp_path, monkeypatch):
    class Closed(FakeHub):
        def create_repo(self, repository, **options):
            raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi", Closed)
    with pytest.raises(RunError, match="is whole, but cannot be pushed to me/it: no network"):
        export(ExportOptions(run / "run", tmp_path / "c", push_to="me/it"))
    assert (tmp_path / "c/model.safetensors").is_file()
