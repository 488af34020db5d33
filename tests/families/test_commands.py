"""What a user runs, in every family: cache-teacher, train from the store and live, resume, eval, export.

Four families run with the other tests, the others by `make test-families`.
"""

import importlib.util
import warnings

import families as tiny
import pytest
import tiny as llavas
import torch
from family_batches import own_inputs
from PIL import Image
from training import Stop, assert_same_weights, interrupt_after, logged, weights
from transformers import AutoModelForImageTextToText, AutoTokenizer

from switchkd.data.encoded import collate
from switchkd.data.encoding import SampleEncoder
from switchkd.data.load_template import load_template
from switchkd.data.media import MediaReader
from switchkd.data.samples import SampleFile
from switchkd.models.checkpoint import open_checkpoint
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.evaluation.exact_match import PREDICTIONS, evaluate
from switchkd.pipelines.evaluation.generation import read_lines, stop_ids_of
from switchkd.pipelines.evaluation.options import EvalOptions
from switchkd.pipelines.release.export import export
from switchkd.pipelines.release.options import ExportOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train

USUAL = ("qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision")
NEEDS = {"smolvlm": "num2words", "mistral3": "torchvision"}
TEACHES_ONLY = {"qwen3_vl_moe": "qwen3_vl", "qwen3_5_moe": "qwen3_5"}  # and the family of its student
SEEDS = {"qwen3_5_moe": 3}  # of a teacher, if not 1, with which float16 states would move the knee of one position
TERMS = ("loss_ce", "loss_align", "loss_vsd")
NEW_TOKENS = 5


def as_parameter(family):
    marks = [] if family in USUAL else [pytest.mark.families]
    if (package := NEEDS.get(family)) and importlib.util.find_spec(package) is None:
        marks.append(pytest.mark.skip(reason=f"the processor of {family} needs the package {package}"))
    return pytest.param(family, marks=marks)


class Place:
    """A teacher, a student, a data file with images of several sizes, and a store, as a user has them."""

    def __init__(self, family, folder):
        self.family, self.folder = family, folder
        self.learns = TEACHES_ONLY.get(family, family)
        self.teacher = tiny.write_checkpoint(family, folder / "teacher", SEEDS.get(family, 1))
        self.student = tiny.write_checkpoint(self.learns, folder / "student", 2)
        self.data = llavas.data(folder / "data", llavas.rows(8, text_only=(3,), two_turns=(5,)))
        self.images = self.data.parent / "images"
        llavas.image(self.images / "001.png", 21, size=(40, 16))
        llavas.image(self.images / "006.png", 26, size=(16, 33))
        self.given = {"data": self.data, "images": self.images}
        cache_teacher(
            CacheOptions(
                teacher=self.teacher, out=folder / "s.zarr", template="qa", payload="both", hidden_dtype="float16",
                k=2048, fine=1 / 4096, coarse=1 / 4096, part_size=5, **self.given,
            )
        )  # fmt: skip

    def options(self, output, **more):
        given = {"cache": self.folder / "s.zarr", "steps": 4, "batch_size": 2, "lr": 5e-3, "log_every": 1}
        given |= {"student": self.student, "teacher": self.teacher, "output": output, "save_every": 2, "switch": True}
        return TrainOptions(**self.given | given | more)

    def encoder(self, checkpoint, template="qa"):
        return SampleEncoder(checkpoint, load_template(template, checkpoint), self.images, 2048)


@pytest.fixture(scope="module", params=[as_parameter(family) for family in tiny.FAMILIES if family != "llava"])
def place(request, tmp_path_factory):
    return Place(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def run(place):
    """A finished run from the store's hidden states."""
    options = place.options(place.folder / "run")
    train(options)
    return options.output


def test_a_run_from_the_store_is_a_run_with_a_live_teacher(place, run, tmp_path):
    """From hidden states in float16, and from top-k logits that are all logits in fine steps."""
    live = place.options(tmp_path / "live", cache=None, teacher_mode="live", template="qa")
    topk = place.options(tmp_path / "topk", payload="topk")
    for options in (live, topk):
        train(options)
        steps = list(zip(logged(run), logged(options.output), strict=True))
        assert len(steps) == 4 and all(entry["loss_vsd"] > 0 for entry, _ in steps)
        for number, (mine, theirs) in enumerate(steps):
            close = 1e-3 if number < 2 else 5e-3  # rounding grows with the steps, as the knee moves in single positions
            assert [mine[name] for name in TERMS] == pytest.approx(
                [theirs[name] for name in TERMS], rel=close, abs=close
            )


def test_a_resumed_run_is_the_same_run(place, run, tmp_path, monkeypatch):
    options = place.options(tmp_path / "again")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Stop):
            train(options)
    assert (options.output / "checkpoint-2").is_dir() and not (options.output / "summary.json").exists()
    train(options)
    assert_same_weights(weights(options.output), weights(run))


def greedy(family, model, prompt, stops, pad):
    """Decode with a whole forward pass for every token, by the class itself."""
    ids, made = torch.from_numpy(prompt.ids).long(), []
    for _ in range(NEW_TOKENS):
        every = torch.cat([ids, torch.tensor(made, dtype=torch.long)])[None]
        labels = torch.where(torch.arange(every.shape[1]) < len(ids), -100, every[0])[None]
        columns = {"input_ids": every, "attention_mask": torch.ones_like(every), "labels": labels}
        with torch.no_grad():
            logits = model(**own_inputs(family, columns | dict(prompt.media or {})), use_cache=False).logits
        made.append(int(logits[0, -1].argmax()))
        if made[-1] in stops:
            return made[:-1]
    return made


def test_eval_is_greedy_decoding(place, run, tmp_path):
    options = EvalOptions(
        model=run, output=tmp_path / "eval", template="qa", max_new_tokens=NEW_TOKENS, batch_size=4, **place.given
    )
    evaluate(options)
    answers = read_lines(options.output / PREDICTIONS, "row", "turn")
    checkpoint = open_checkpoint(run)
    encoder = place.encoder(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(run).eval()
    stops = stop_ids_of(encoder.template, checkpoint.tokenizer)
    asked = [(sample, turn) for sample in SampleFile(place.data) for turn in range(len(sample.turns))]
    assert len(asked) == 9
    for sample, turn in asked:
        ids = greedy(place.learns, model, encoder.encode_prompt(sample, turn), stops, 0)
        wanted = checkpoint.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answers[sample.index, turn]["prediction"] == wanted


def test_an_export_answers_the_same_in_plain_transformers(place, run, tmp_path):
    out = export(ExportOptions(run=run, out=tmp_path / "out"))
    mine, theirs = (AutoModelForImageTextToText.from_pretrained(folder).eval() for folder in (run, out))
    assert type(mine) is type(theirs) is type(tiny.build(place.learns, 0))
    samples = SampleFile(place.data)
    encoder, again = (place.encoder(open_checkpoint(folder)) for folder in (run, out))
    for row in (0, 1, 3, 5):
        encoded = encoder.encode(samples[row])
        assert encoded.input_ids.tolist() == again.encode(samples[row]).input_ids.tolist()
        batch = collate([encoded], 0)
        batch.pop("has_image")
        inputs = own_inputs(place.learns, batch)
        with torch.no_grad():
            assert torch.equal(mine(**inputs).logits, theirs(**inputs).logits)
    for name in ("processor_config.json", "tokenizer.json", "README.md"):
        assert (out / name).is_file()
    assert AutoTokenizer.from_pretrained(out).chat_template


def test_ids_and_pixels_are_those_of_the_processors_own_call(place):
    """The processor expands the text of the chat template; PaliGemma's, which has none, writes its own text around a question."""
    if place.family.startswith("paligemma"):
        pytest.skip("PaliGemma has no chat template")
    checkpoint = open_checkpoint(place.teacher)
    encoder, processor = place.encoder(checkpoint, "chat"), MediaReader(checkpoint)._processor
    for sample in SampleFile(place.data):
        if sample.image is None:
            continue
        messages = []
        for number, (question, answer) in enumerate(sample.turns):
            asked = [{"type": "text", "text": question}]
            messages += [
                {"role": "user", "content": [{"type": "image"}, *asked] if number == 0 else asked},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ]
        text = checkpoint.tokenizer.apply_chat_template(messages, tokenize=False)
        with Image.open(place.images / sample.image) as image, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # GLM-4V's processor makes an array of a tensor
            made = processor(text=[text], images=[[image.convert("RGB")]], return_tensors="pt")
        encoded = encoder.encode(sample)
        assert encoded.input_ids.tolist() == made["input_ids"][0].tolist()
        for name, column in encoded.media.items():
            torch.testing.assert_close(column, torch.as_tensor(made[name]), rtol=0, atol=0)
