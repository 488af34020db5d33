"""Ids and media of every family are those of its processor's own call; teacher and student may have other processors."""

import json
import pickle
import warnings

import families as tiny
import numpy as np
import pytest
import tiny as llava
import torch

from switchkd.data.encoding import SampleEncoder
from switchkd.data.load_template import load_template
from switchkd.data.media import MediaReader
from switchkd.data.samples import SampleFile, read_row
from switchkd.errors import CheckpointError, ConfigError
from switchkd.fingerprints import hash_tokenizer
from switchkd.models.checkpoint import open_checkpoint
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.training.batches.dataset import TrainingSamples
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train

# Ours; one that needs torchvision; and two whose call writes a prompt of its own (a BOS after the image, a line break).
WITHOUT_PROCESSOR = {"llava", "mistral3", "paligemma", "paligemma2"}
OTHERS = [family for family in tiny.FAMILIES if family not in WITHOUT_PROCESSOR]
SIZES = [(30, 20), (12, 31), (48, 48), (16, 64)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    for number, size in enumerate(SIZES):
        llava.image(folder / f"images/{number}.png", number, size=size[::-1])
    return folder


def encoder_of(family, place):
    folder = place / family
    if not folder.exists():
        tiny.write_checkpoint(family, folder, 0)
    checkpoint = open_checkpoint(folder)
    template = "chat" if checkpoint.tokenizer.chat_template else "qa"
    return SampleEncoder(checkpoint, load_template(template, checkpoint), place / "images", 1 << 14)


@pytest.mark.parametrize("family", OTHERS)
def test_ids_and_media_are_those_of_the_processors_own_call(family, place):
    if family == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
    encoder = encoder_of(family, place)
    reader = encoder.reader
    marker = reader.text_of(reader.marker, own_template=encoder.template.name == "chat")
    for names in (["0.png"], ["1.png"], ["2.png"], ["3.png"], ["2.png", "1.png"]):
        row = {"images": names, "conversations": llava.conversation(("what is the color?", "a red cat."))}
        sample = read_row(row, 0)
        encoded = encoder.encode(sample)
        segments = encoder.template.render(sample.turns, len(names), encoder.tokenizer.eos_token)
        text = "".join(piece for piece, _ in segments).replace("<image>", marker)
        images = [llava.Image.open(place / "images" / name).convert("RGB") for name in names]
        call = {"images": [images], "text": [text], "add_special_tokens": False, "return_tensors": "pt"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of tensors in lists, in transformers
            own = reader._processor(**call)
        assert encoded.input_ids.tolist() == own["input_ids"][0].tolist(), names
        assert set(encoded.media) == set(reader.family.media) & set(own)
        for name, column in encoded.media.items():
            assert torch.equal(column, torch.as_tensor(own[name]).to(column.dtype)), (names, name)


def test_a_processor_that_needs_torchvision_is_refused_by_name(place):
    with pytest.raises(CheckpointError, match=r"mistral3.*PixtralProcessor. needs the package torchvision: pip"):
        encoder_of("mistral3", place)


def test_probes_of_two_sides_show_one_image(place):
    one, other = (MediaReader(open_checkpoint(place / "qwen2_5_vl")).probe for _ in range(2))
    assert all(torch.equal(one.columns[name], other.columns[name]) for name in one.columns)


def test_two_views_of_an_image(place, tmp_path):
    """A student whose processor makes fewer tiles reads fewer tokens; CE and Align compare the same answers."""
    teacher = place / "internvl"
    student = tiny.write_checkpoint("internvl", tmp_path / "student", 3)
    settings = json.loads((student / "preprocessor_config.json").read_text())
    (student / "preprocessor_config.json").write_text(json.dumps(settings | {"max_patches": 2}))
    rows = [
        {"image": f"{n}.png", "conversations": llava.conversation(("what is the color?", "a red cat."))}
        for n in range(4)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    here = {"data": tmp_path / "data.json", "images": place / "images"}
    cache_teacher(CacheOptions(teacher, out=tmp_path / "s.zarr", template="chat", k=8, hidden_dtype="float16", **here))
    options = {"student": student, "teacher": teacher, "steps": 2, "batch_size": 4, "log_every": 1, **here}
    losses = {}
    for name, how in {
        "cached": {"cache": tmp_path / "s.zarr"},
        "live": {"teacher_mode": "live", "template": "chat"},
    }.items():
        with pytest.raises(CheckpointError, match="an image becomes 4 vision features|vision features for the teacher"):
            train(TrainOptions(output=tmp_path / name, **options, **how))
        train(TrainOptions(output=tmp_path / name, switch=False, **options, **how))
        losses[name] = json.loads((tmp_path / name / "summary.json").read_text())["losses"]
    for term in ("loss_ce", "loss_align"):
        assert losses["cached"][term] == pytest.approx(losses["live"][term], rel=2e-3)
    counts = [
        len(SampleEncoder(open_checkpoint(side), load_template("chat", open_checkpoint(side)), here["images"], 4096)
            .encode(SampleFile(here["data"])[3]).input_ids)
        for side in (teacher, student)
    ]  # fmt: skip
    assert counts[0] > counts[1]


def test_lengths_are_estimated_from_the_data_files_own_images(place, tmp_path):
    """Batches are grouped and the longest sample is foreseen by them; their number of tokens depends on their size."""
    encoder = encoder_of("qwen2_5_vl", place)
    rows = [
        {"images": [f"{n}.png"], "conversations": llava.conversation(("what is the color?", "a red cat."))}
        for n in range(4)
    ]
    rows.append({"images": ["0.png", "1.png"], "conversations": rows[0]["conversations"]})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    samples = TrainingSamples(SampleFile(tmp_path / "data.json"), encoder, None)
    counts = [int((encoder.encode(sample).input_ids == encoder.image_token_id).sum()) for sample in samples.samples]
    assert samples.image_tokens == round(sum(counts) / 6)
    lengths = samples.order("length", 0, 1).lengths
    assert int(lengths.argmax()) == 4


def test_batches_are_grouped_by_the_lengths_that_the_store_records(place, tmp_path):
    """The images' own tokens count, and a run remembers by which lengths its samples were ordered."""
    turns = llava.conversation(("what is the color?", "a red cat."))
    rows = [{"images": [f"{number}.png"], "conversations": turns} for number in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    encoder, data = encoder_of("qwen2_5_vl", place), SampleFile(tmp_path / "data.json")
    lengths = np.array([len(encoder.encode(sample).input_ids) for sample in data])

    class Store:
        path = manifest = None
        recorded = lengths

        def __len__(self):
            return len(data)

        def statuses(self):
            return np.zeros(len(data), np.uint8)

        def tokens(self):
            return self.recorded

    known = TrainingSamples(data, encoder, Store())
    assert known.order("length", 0, 1).lengths.tolist() == lengths.tolist()
    assert known.longest() == lengths.max()
    without = Store()
    without.recorded = np.where(np.arange(len(data)) % 2, lengths, 0)
    mixed, plain = TrainingSamples(data, encoder, without), TrainingSamples(data, encoder, None)
    estimated = plain.order("length", 0, 1).lengths
    expected = np.where(np.arange(len(data)) % 2, lengths, estimated)
    assert mixed.order("length", 0, 1).lengths.tolist() == expected.tolist()
    without.recorded = np.zeros(len(data), np.int64)  # a store of earlier times: its runs go on
    assert TrainingSamples(data, encoder, without).order_identity() == plain.order_identity()
    assert len({samples.order_identity() for samples in (known, mixed, plain)}) == 3


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "llava_onevision"])
def test_spawned_processes_read_the_same(family, place):
    encoder = encoder_of(family, place)
    sample = read_row({"images": ["1.png"], "conversations": llava.conversation(("what?", "a red cat."))}, 0)
    here, there = (one.encode(sample) for one in (encoder, pickle.loads(pickle.dumps(encoder))))
    assert here.input_ids.tolist() == there.input_ids.tolist()
    assert all(torch.equal(here.media[name], there.media[name]) for name in here.media)


def test_a_processor_that_changes_its_tokenizer_does_not_change_the_hash(place):
    """PaliGemma's does. A store's identity would depend on whether the processor was opened before it was computed."""
    folder = place / "paligemma"
    if not folder.exists():
        tiny.write_checkpoint("paligemma", folder, 0)
    checkpoint = open_checkpoint(folder)
    before, text = hash_tokenizer(checkpoint.tokenizer), checkpoint.tokenizer.backend_tokenizer.to_str()
    SampleEncoder(checkpoint, load_template("qa"), place / "images", 1 << 14)
    assert checkpoint.tokenizer.backend_tokenizer.to_str() != text, "it no longer changes: the test tests nothing"
    assert hash_tokenizer(checkpoint.tokenizer) == before == hash_tokenizer(open_checkpoint(folder).tokenizer)


def test_the_default_template_is_the_checkpoints_own_unless_it_is_a_llava(place):
    checkpoint = open_checkpoint(place / "qwen2_5_vl")
    assert load_template(None, checkpoint) == load_template("chat", checkpoint)
    for family in ("llava", "paligemma"):
        if not (place / family).exists():
            tiny.write_checkpoint(family, place / family, 0)
    assert load_template(None, open_checkpoint(place / "llava")) == load_template("qwen2_base")
    assert load_template(None) == load_template("qwen2_base")
    with pytest.raises(ConfigError, match="paligemma, a paligemma: .* is not known: pass --template"):
        load_template(None, open_checkpoint(place / "paligemma"))


def test_another_template_than_the_checkpoints_own_is_told(place, caplog):
    checkpoint = open_checkpoint(place / "qwen2_5_vl")
    load_template("chat", checkpoint)
    assert not caplog.text
    load_template("qwen2_base", checkpoint)
    assert (
        "a qwen2_5_vl, has a chat template of its own, which it was most likely trained with: --template chat"
        in caplog.text
    )
