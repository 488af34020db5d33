"""`train --weight-by visual-advantage`: the losses of a run against loops over whole logits, however its batch is divided."""

import json
import shutil
from dataclasses import replace

import mixtures
import numpy as np
import pytest
import reference
import tiny
import torch
import training
from training import Stop, assert_same_weights, history, interrupt_after, two_processes, weights
from transformers import LlavaForConditionalGeneration

from switchkd.data.encoded import collate
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import SampleFile
from switchkd.data.templates import TEMPLATES
from switchkd.errors import ConfigError, StoreMismatch
from switchkd.models.checkpoint import open_checkpoint
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.release.model_card import model_card
from switchkd.pipelines.run_folder import read_record
from switchkd.pipelines.training.dry_run import plan
from switchkd.pipelines.training.inputs import open_inputs, resolve_options
from switchkd.pipelines.training.train import train
from switchkd.stores import TeacherStore

ANSWERS = [
    "a red circle is it",
    "blue",
    "what color is a square ? it is red",
    "a square",
    "is it a blue circle or red ?",
]


def write(folder, answers):
    """Rows with answers of several lengths, one of them without an image, and their images."""
    rows = tiny.rows(len(answers), text_only=(3,))
    for row, answer in zip(rows, answers, strict=True):
        row["conversations"][1]["value"] = answer
    return tiny.data(folder, rows)


def cache(folder, teacher, data, name, **more):
    cache_teacher(
        CacheOptions(
            teacher=teacher, data=data, images=data.parent / "images", out=folder / f"{name}/s.zarr", template="qa",
            **{"payload": "topk", "visual_advantage": True, "fine": 1 / 4096, "coarse": 1 / 4096, "part_size": 2} | more,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weighted")
    data = write(folder, [ANSWERS[number % 5] for number in range(8)])
    cache(folder, teacher, data, "with")
    cache(folder, teacher, data, "without", visual_advantage=False)
    return folder


@pytest.fixture
def options(teacher, student, place, tmp_path):
    plain = training.train_options(teacher, student, place, tmp_path / "run")
    return replace(plain, cache=place / "with", batch_size=8, steps=3, weight_by="visual-advantage")


def answer_loss(values, advantages):
    """VA-OPD's loss of one answer: half the mean over the fifth of largest advantage, half the mean over the others."""
    least = sorted(advantages, reverse=True)[-(-len(values) // 5) - 1]
    groups = [[], []]
    for value, advantage in zip(values, advantages, strict=True):
        groups[advantage >= least].append(value)
    means = [sum(group) / len(group) for group in groups if group]
    return sum(means) / len(means)


@pytest.mark.parametrize("mean", ("position", "sample"))
def test_the_first_losses_are_those_of_loops(options, place, teacher, mean):
    """CE and Align of the untrained student over plain transformers' logits, weighted by the store's numbers."""
    train(replace(options, steps=1, mean=mean))
    models = [
        LlavaForConditionalGeneration.from_pretrained(path).double().eval() for path in (options.student, teacher)
    ]
    encoder = SampleEncoder(open_checkpoint(teacher), TEMPLATES["qa"], place / "images", 2048)
    store, ce, align, whole, moved = TeacherStore.open(place / "with"), 0.0, 0.0, 0, 0.0
    for index, sample in enumerate(SampleFile(place / "data.json")):
        batch = collate([encoder.encode(sample)], 0)
        pixels = {} if batch.get("pixel_values") is None else {"pixel_values": batch["pixel_values"].double()}
        with torch.no_grad():
            mine, theirs = (model(input_ids=batch["input_ids"], **pixels).logits[0, :-1] for model in models)
        at = [(row, label) for row, label in enumerate(batch["labels"][0, 1:].tolist()) if label >= 0]
        distances = [float(reference.dbild(mine[row][None], theirs[row][None], 3.0, "reverse_kl")) for row, _ in at]
        size = len(at) if mean == "position" else 1
        ce -= size * np.mean([mine[row].log_softmax(-1)[label].item() for row, label in at])
        weighted = answer_loss(distances, store[index].visual_advantage.tolist())
        align += size * weighted
        moved += size * abs(weighted - np.mean(distances))
        whole += size
    (first,) = training.logged(options.output)
    assert first["loss_ce"] == pytest.approx(ce / whole, rel=1e-5)
    assert first["loss_align"] == pytest.approx(align / whole, rel=1e-3)
    assert moved > 0.05 * align  # the weights matter here


@pytest.mark.parametrize(
    "change",
    [
        {"batch_size": 2, "accumulation": 4},
        {"batch_size": 2, "accumulation": 4, "mean": "sample"},
        {"packing": 64, "batch_size": 4, "accumulation": 2},
    ],
)
def test_dividing_the_batch_changes_nothing(options, tmp_path, change):
    options = replace(options, steps=2, mean=change.get("mean", "position"))
    train(options)
    train(replace(options, output=tmp_path / "divided", **change))
    # Adam divides by the size of a gradient, which blows up the rounding of a small one: 1.6e-5 was seen, at steps of 1e-3.
    training.assert_equal_runs(options.output, tmp_path / "divided", atol=5e-5)


def test_with_one_group_in_each_answer_it_is_the_plain_run(options, teacher, tmp_path):
    """Two tokens an answer, bit for bit."""
    data = write(tmp_path / "short", ["red", "blue", "square", "circle"] * 2)
    cache(tmp_path, teacher, data, "short-store")
    short = replace(options, data=data, images=data.parent / "images", cache=tmp_path / "short-store")
    train(short)
    train(replace(short, output=tmp_path / "plain", weight_by=None))
    assert history(short.output) == history(tmp_path / "plain")
    assert_same_weights(weights(short.output), weights(tmp_path / "plain"))


def test_hidden_states_are_weighted_as_top_k_logits(options, teacher, place, tmp_path):
    cache(tmp_path, teacher, place / "data.json", "hidden", payload="hidden", hidden_dtype="float16")
    options = replace(options, steps=2)
    train(options)
    train(replace(options, output=tmp_path / "states", cache=tmp_path / "hidden"))
    for mine, theirs in zip(history(options.output), history(tmp_path / "states"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-2, abs=1e-3)


def test_a_run_goes_on_and_its_held_out_losses_are_ordinary_means(options, place, monkeypatch, tmp_path):
    """Held-out losses are those of a run without weights, from a store without them, as long as the student is the same."""
    evaluated = {"eval_data": place / "data.json", "eval_cache": place / "without", "eval_every": 1, "save_every": 1}
    options = replace(options, lr=1e-12, steps=2, **evaluated)
    whole = replace(options, output=tmp_path / "whole")
    train(whole)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(Stop):
            train(options)
    with pytest.raises(ConfigError, match="weight_by: run 'visual-advantage', now None"):
        train(replace(options, weight_by=None))
    train(options)
    assert history(options.output) == history(whole.output)
    summary = json.loads((options.output / "summary.json").read_text())
    card = model_card("name", open_checkpoint(options.output), read_record(options.output), summary, ())
    assert "| positions of Align and VSD weighted by | visual-advantage |" in card
    plain = replace(options, output=tmp_path / "plain", weight_by=None)
    train(plain)
    losses = [
        [entry["eval_loss_align"] for entry in json.loads((run / "summary.json").read_text())["history"] if "eval_loss" in entry]
        for run in (options.output, plain.output)
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert training.logged(options.output)[0]["loss_align"] != pytest.approx(losses[0][0], rel=1e-3)


def test_of_several_stores_the_one_that_holds_it_is_taken(options, place, tmp_path):
    for name in ("without", "with"):
        (tmp_path / "both").mkdir(exist_ok=True)
        (tmp_path / f"both/{name}.zarr").symlink_to(place / name / "s.zarr")
    (store,) = open_inputs(resolve_options(replace(options, cache=tmp_path / "both"))).stores
    assert store.path.name == "with.zarr" and store.read_advantage
    with pytest.raises(StoreMismatch, match="2 stores .* fit, name one"):
        open_inputs(resolve_options(replace(options, cache=tmp_path / "both", weight_by=None)))
    (store,) = open_inputs(resolve_options(replace(options, weight_by=None))).stores
    assert store.payload([0]).visual_advantage is None  # what is not weighted by is not read


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "sft", "switch": False}, "objective sft compares with no logits of a teacher"),
        ({"objective": "switch-ce", "cache": None}, "objective switch-ce compares with no logits"),
        ({"teacher_mode": "live", "cache": None}, "a live teacher is not run over blurred images"),
        ({"vocab_map": True, "switch": False}, "with --vocab-map the student has others"),
    ],
)
def test_what_has_nothing_to_weight_is_refused(options, change, message):
    with pytest.raises(ConfigError, match=message):
        replace(options, **change)


def test_a_store_without_it_is_refused_before_a_model_is_loaded(options, place, monkeypatch):
    from switchkd.pipelines.training import train as module

    monkeypatch.setattr(module, "set_up_models", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=r"s\.zarr holds no visual advantage.*cache-teacher --visual-advantage"):
        train(replace(options, cache=place / "without"))
    assert not options.output.exists() or not list(options.output.glob("*.yaml"))


def test_every_store_of_a_mixture_must_hold_it(options, teacher, tmp_path):
    mixture = mixtures.cut(tmp_path)
    mixtures.cache(teacher, tmp_path, visual_advantage=True)
    mixed = replace(options, data=mixture, images=tmp_path / "images", cache=tmp_path / "stores")
    samples = open_inputs(resolve_options(mixed)).samples
    found = samples.payload([samples[9], samples[0]]).visual_advantage
    whole = [TeacherStore(tmp_path / f"stores/{name}.zarr")[row].visual_advantage for name, row in (("b", 2), ("a", 0))]
    np.testing.assert_array_equal(found, np.concatenate(whole))
    shutil.rmtree(tmp_path / "stores/b.zarr")
    b = {"data": tmp_path / "b.json", "out": tmp_path / "stores/b.zarr"}
    cache_teacher(mixtures.cache_options(teacher, tmp_path, **b))
    with pytest.raises(ConfigError, match=r"b: .*b\.zarr holds no visual advantage"):
        open_inputs(resolve_options(mixed))


def test_a_plan_without_a_store_takes_it_for_one_to_be_made(options):
    assert not plan(replace(options, cache=None, template="qa"), 1).has_store


@pytest.mark.slow
def test_two_processes_weight_as_one(options, tmp_path):
    train(options)
    done = two_processes(options, tmp_path, batch_size=2, accumulation=2, steps=3, weight_by="visual-advantage")
    assert done.returncode == 0, done.stderr[-3000:]
    training.assert_equal_runs(options.output, tmp_path / "two")
