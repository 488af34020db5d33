"""A store in a loop of one's own: the same losses as `switchkd train`, and nothing joined that does not belong together."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import training
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText

from switchkd.errors import ConfigError, StoreError, StoreMismatch
from switchkd.losses import LMHead, dbild_loss, fused_dbild, visual_weights
from switchkd.pipelines import own_loop
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.own_loop import EncodedDataset, StoreDataset, StoredTeacher, TeacherCollator, pad_encoded
from switchkd.pipelines.training.train import train
from switchkd.positions import predicting_rows, targets
from switchkd.stores import TeacherStore

cached, hidden, options = training.cached, training.hidden, training.options
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/own-loop.md"


@pytest.fixture
def stores(cached, hidden):
    return {"topk": cached / "stores", "hidden": hidden}


def opened(cached, student, store):
    """(store, the data file as the student reads it, its collator)."""
    store = StoreDataset(store)
    data = EncodedDataset(cached / "data.json", student, store, cached / "images")
    return store, data, TeacherCollator(partial(pad_encoded, pad_id=data.pad_id), store)


def states_of(model, batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in batch}
    return model.model(**inputs).last_hidden_state[predicting_rows(batch["labels"])]


@pytest.mark.parametrize("payload", ("topk", "hidden"))
def test_losses_are_those_of_switchkd_train(options, stores, cached, teacher, student, payload):
    """One step over all samples: CE and Align of the log, computed by a loop that knows nothing of the trainer."""
    train(replace(options, cache=stores[payload], steps=1, batch_size=12, switch=False))
    (logged,) = training.logged(options.output)
    store, data, collator = opened(cached, student, stores[payload])
    signal_of = StoredTeacher(store, teacher if payload == "hidden" else None)
    model = AutoModelForImageTextToText.from_pretrained(student, dtype=torch.float32)
    (batch,) = DataLoader(data, batch_size=12, collate_fn=collator)
    states, wanted = states_of(model, batch), targets(batch["labels"])
    found = fused_dbild(states, LMHead(model.lm_head.weight), wanted, signal_of.signal(batch))
    assert float(found.terms.ce) / len(wanted) == pytest.approx(logged["loss_ce"], rel=1e-5)
    assert float(found.terms.align) / len(wanted) == pytest.approx(logged["loss_align"], rel=1e-5)
    logits = (states @ model.lm_head.weight.T).detach()
    on_logits = dbild_loss(logits, signal_of.signal(batch), reduction="sum")
    assert float(on_logits) == pytest.approx(float(found.terms.align), rel=1e-4)
    assert signal_of.signal(batch).rows(logits).shape == (len(wanted), 15)


def test_weights_are_those_of_switchkd_train(options, cached, teacher, student, tmp_path):
    """As above, with a store of visual advantages: Align of the log of `--weight-by visual-advantage`."""
    given = {"teacher": teacher, "data": cached / "data.json", "images": cached / "images", "template": "qa"}
    cache_teacher(CacheOptions(out=tmp_path / "stores/looks.zarr", visual_advantage=True, **given))
    run = replace(options, cache=tmp_path / "stores", steps=1, batch_size=12, switch=False)
    found = {}
    for weight_by in (None, "visual-advantage"):
        train(replace(run, weight_by=weight_by, output=tmp_path / str(weight_by)))
        (found[weight_by],) = training.logged(tmp_path / str(weight_by))
    store = StoreDataset(tmp_path / "stores", visual_advantage=True)
    data = EncodedDataset(cached / "data.json", student, store, cached / "images")
    collator = TeacherCollator(partial(pad_encoded, pad_id=data.pad_id), store)
    (batch,) = DataLoader(data, batch_size=12, collate_fn=collator)
    model = AutoModelForImageTextToText.from_pretrained(student, dtype=torch.float32)
    signal, wanted = StoredTeacher(store, teacher).signal(batch), targets(batch["labels"])
    weights = visual_weights(batch["teacher_visual_advantage"], batch["labels"])
    states, head = states_of(model, batch), LMHead(model.lm_head.weight)
    for weight_by, given in ((None, None), ("visual-advantage", weights)):
        terms = fused_dbild(states, head, wanted, signal, distil_weights=given).terms
        assert float(terms.align) / len(wanted) == pytest.approx(found[weight_by]["loss_align"], rel=1e-5)
    with pytest.raises(ConfigError, match="holds no visual advantage: cache again into another --out"):
        StoreDataset(cached / "stores", visual_advantage=True)
    assert found[None]["loss_align"] != pytest.approx(found["visual-advantage"]["loss_align"], rel=1e-3)


def test_an_item_is_what_the_store_has(stores, cached):
    for payload, names in (
        ("topk", {"teacher_ids", "teacher_logits", "teacher_tail"}),
        ("hidden", {"teacher_hidden"}),
    ):
        store, plain = StoreDataset(stores[payload]), TeacherStore.open(stores[payload])
        assert len(store) == 12 and store.rows.tolist() == list(range(12))
        for row in (0, 3, 5):
            found, expected = store[row], plain[row].payload
            assert found.keys() == names | {"teacher_knee"}
            for name in names - {"teacher_tail"}:
                assert found[name].tolist() == getattr(expected, name.removeprefix("teacher_")).tolist()
        joined = store.columns([5, 0])
        assert joined["teacher_knee"].tolist() == store[5]["teacher_knee"].tolist() + store[0]["teacher_knee"].tolist()


def test_workers_read_the_same(stores, cached, student):
    _, data, collator = opened(cached, student, stores["hidden"])
    here = list(DataLoader(data, batch_size=5, collate_fn=collator))
    there = list(DataLoader(data, batch_size=5, collate_fn=collator, num_workers=2, multiprocessing_context="fork"))
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def test_any_collator_gets_what_it_knows(stores, cached, student):
    store, data, _ = opened(cached, student, stores["topk"])
    seen = []

    def mine(samples):
        seen.extend(samples)
        return {"labels": torch.nn.utils.rnn.pad_sequence([s["labels"] for s in samples], True, -100)}

    samples = [{name: data[item][name] for name in ("row", "input_ids", "labels")} for item in (3, 0)]  # no digest
    batch = TeacherCollator(mine, store)(samples)
    assert [sample.keys() for sample in seen] == [{"input_ids", "labels"}] * 2
    assert batch["teacher_positions"].tolist() == [2, 2]
    assert StoredTeacher(store).signal(batch).positions == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sample: sample["input_ids"].__setitem__(-2, 4), "row 2: its text changed since"),
        (lambda sample: sample["labels"].__setitem__(-1, -100), "row 2: its supervised mask changed since"),
        (lambda sample: sample.update(row=3), "row 3: its text and supervised mask changed since"),
        (
            lambda sample: sample.update(input_ids=sample["input_ids"][:-1], labels=sample["labels"][:-1]),
            "nothing truncated",
        ),
    ],
)
def test_another_sample_is_refused_by_its_row(stores, cached, student, change, message):
    store, data, _ = opened(cached, student, stores["topk"])
    sample = data[2]
    del sample["digest"]
    sample["input_ids"], sample["labels"] = sample["input_ids"].clone(), sample["labels"].clone()
    change(sample)
    with pytest.raises(StoreMismatch, match=message):
        TeacherCollator(lambda samples: {}, store)([sample])


def test_another_image_is_refused(stores, cached, student, tmp_path):
    images = shutil.copytree(cached / "images", tmp_path / "images")
    tiny.image(images / "002.png", 77)
    store, _, collator = opened(cached, student, stores["topk"])
    data = EncodedDataset(cached / "data.json", student, store, images)
    collator([data[0], data[1]])
    with pytest.raises(StoreMismatch, match="row 2: its image changed since"):
        collator([data[1], data[2]])


def test_what_does_not_fit_is_refused(stores, cached, student, teacher, tmp_path):
    store, data, collator = opened(cached, student, stores["hidden"])
    with pytest.raises(ConfigError, match="payload hidden needs the teacher's LM head"):
        StoredTeacher(store)
    with pytest.raises(StoreMismatch, match=f"{re.escape(str(store.store.path))} is not of .*: .*teacher"):
        StoredTeacher(store, student)
    with pytest.raises(ConfigError, match=r"holds payload hidden, not topk: pass payload='hidden'"):
        StoreDataset(stores["hidden"], "topk")
    with pytest.raises(StoreError, match="no teacher store at"):
        StoreDataset(tmp_path)
    shorter = tiny.data(tmp_path / "shorter", tiny.rows(3))
    with pytest.raises(StoreMismatch, match=r"was made from 12 rows, .* has 3: pass the file that was cached"):
        EncodedDataset(shorter, student, store, shorter.parent / "images")
    words = tiny.checkpoint(tmp_path / "words", 3, words=[*tiny.WORDS, "more"])
    with pytest.raises(StoreMismatch, match="does not fit .*: .*tokenizer"):
        EncodedDataset(cached / "data.json", words, store, cached / "images")
    with pytest.raises(ConfigError, match="a sample lacks 'row'"):
        collator([{name: value for name, value in data[0].items() if name != "row"}])
    signal_of = StoredTeacher(store, teacher)
    batch = collator([data[0], data[5]])
    with pytest.raises(ConfigError, match="the batch lacks the teacher's columns"):
        signal_of.signal({"labels": batch["labels"]})
    truncated = batch["labels"][:, :-1]  # cuts the last token of the longer sample
    with pytest.raises(StoreMismatch, match=r"have \[2, 4\] positions, the store \[2, 5\]"):
        signal_of.signal(batch | {"labels": truncated})
    with pytest.raises(StoreMismatch, match=r"have \[5, 2\] positions, the store \[2, 5\]"):
        signal_of.signal(batch | {"labels": batch["labels"].flip(0)})


def test_skipped_rows_have_no_teacher(teacher, student, tmp_path):
    rows = tiny.rows(4)
    rows[1]["conversations"] = []
    file = tiny.data(tmp_path, rows)
    given = {"teacher": teacher, "data": file, "images": tmp_path / "images", "template": "qa", "part_size": 2}
    cache_teacher(CacheOptions(out=tmp_path / "s.zarr", **given))
    store, data, collator = opened(tmp_path, student, tmp_path / "s.zarr")
    assert store.payload == "hidden" and data.rows.tolist() == [0, 2, 3] and len(data) == 3 and len(store) == 4
    assert len(store[1]["teacher_knee"]) == 0
    with pytest.raises(StoreMismatch, match="row 1 has no teacher's output"):
        collator([data[0] | {"row": 1}])
    shutil.rmtree(tmp_path / "s.zarr/parts/00001")
    with pytest.raises(StoreError, match="holds 1 of 2 parts"):
        StoreDataset(tmp_path / "s.zarr")


def test_the_page_names_what_is_public():
    page = PAGE.read_text()
    for name in own_loop.__all__:
        assert f"`switchkd.pipelines.own_loop.{name}`" in page


BESIDE = """
with torch.no_grad():
    trainer.model.eval()
    batch = trainer._prepare_inputs(collator([data[item] for item in range(len(data))]))
    labels, wanted = batch["labels"], targets(batch["labels"])
    inputs = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "pixel_values")}
    states = trainer.model.model(**inputs).last_hidden_state[predicting_rows(labels)]
    plain = fused_dbild(states, LMHead(trainer.model.lm_head.weight), wanted, trainer.teacher.signal(batch)).total / len(wanted)
    print(json.dumps([trainer.state.log_history, float(trainer.compute_loss(trainer.model, batch)), float(plain)]))
"""


@pytest.mark.trl
def test_the_example_of_trl(teacher, student, tmp_path):
    """The page's own script trains; its loss is that of the plain loop, before the LM head was replaced and behind it."""
    if importlib.util.find_spec("trl") is None:
        pytest.skip("`make test-trl` installs TRL")
    shutil.copytree(teacher, tmp_path / "TEACHER")
    shutil.copytree(student, tmp_path / "STUDENT")
    file = tiny.data(tmp_path, tiny.rows(6, text_only=(1,), two_turns=(2,)))
    given = {"teacher": teacher, "data": file, "images": tmp_path / "images", "template": "qa"}
    cache_teacher(CacheOptions(out=tmp_path / "stores/data.zarr", **given))
    (script,) = re.findall(r'```python title="sft_with_teacher.py"\n(.*?)```', PAGE.read_text(), re.DOTALL)
    (tmp_path / "main.py").write_text(f"import json\n{script}\n{BESIDE}")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "main.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    history, own, plain = json.loads(done.stdout.splitlines()[-1])
    assert own == pytest.approx(plain, rel=1e-5)
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3]
    assert all(0 < entry["loss"] < 10 for entry in history if "loss" in entry)
    assert (tmp_path / "runs/trl/checkpoint-3/model.safetensors").is_file()
