"""Training on a mixture: it equals training on one file of the same rows, resumes exactly, and refuses what does not fit."""

import json
import re
import shutil
from dataclasses import replace

import mixtures
import numpy as np
import pytest
import tiny
import torch
import training
import yaml
from training import Stop, assert_same_weights, history, interrupt_after, weights

from switchkd.errors import CheckpointError, ConfigError, DataError, InputError, ReadFailure, StoreMismatch
from switchkd.losses.lm_head import float32_logits
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import load_lm_head
from switchkd.pipelines.batch import Batch
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.preflight.left_out import Unusable
from switchkd.pipelines.release.model_card import model_card
from switchkd.pipelines.reporting.options import ReportOptions
from switchkd.pipelines.reporting.report import report
from switchkd.pipelines.stored_teacher import StoredOfSeveral
from switchkd.pipelines.training.arguments import training_arguments
from switchkd.pipelines.training.batches import dataset
from switchkd.pipelines.training.batches.collator import Collator
from switchkd.pipelines.training.batches.mixture import MixedOrder
from switchkd.pipelines.training.batches.sampler import EpochOrder
from switchkd.pipelines.training.inputs import open_inputs, resolve_options
from switchkd.pipelines.training.model_setup import set_up_models
from switchkd.pipelines.training.train import train
from switchkd.stores import TeacherStore


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    """data.json, the same rows as the mixture of a.json and b.json, and their stores."""
    folder = tmp_path_factory.mktemp("mixture")
    mixtures.cut(folder)
    mixtures.cache(teacher, folder)
    cache_teacher(mixtures.cache_options(teacher, folder, data=folder / "data.json", out=folder / "whole/w.zarr"))
    return folder


@pytest.fixture
def options(teacher, student, folder, tmp_path):
    made = training.train_options(teacher, student, folder, tmp_path / "run")
    return replace(made, data=folder / "mixture.yaml")


def whole(options, folder, tmp_path, **changed):
    """Train on the same rows in one file; returns the run."""
    options = replace(options, data=folder / "data.json", output=tmp_path / "whole", **changed)
    train(options)
    return options.output


def test_files_that_are_taken_once_train_as_one_file_of_their_rows(options, folder, tmp_path):
    """Bit for bit: order, batches, weights. Nothing but the data differs, since there is no store."""
    options = replace(options, objective="sft", switch=False, template="qa", cache=None, steps=4, group_by="length")
    train(options)
    assert_same_weights(weights(options.output), weights(whole(options, folder, tmp_path)))


def test_each_sample_learns_from_its_own_store(options, folder, tmp_path):
    """The whole objective, from two stores as from one; their parts were captured in other batches, up to rounding."""
    train(options)
    run = whole(options, folder, tmp_path, cache=folder / "whole")
    for mine, other in zip(history(options.output), history(run), strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-4)
    record_of_run = yaml.safe_load((options.output / "run.yaml").read_text())
    record = record_of_run["mixture"]
    assert {name: (about["samples_per_epoch"], about["usable"]) for name, about in record.items()} == {
        "a": (7, 7),
        "b": (5, 5),
    }
    assert record["b"]["store"] == TeacherStore.open(folder / "stores/b.zarr").manifest.identity
    summary = json.loads((options.output / "summary.json").read_text())
    assert summary["made_from"]["mixture"] == record
    assert summary["samples"] == 12
    pytest.importorskip("matplotlib", reason="a report draws pictures: extra `viz`")
    page = report(ReportOptions(((None, options.output),), out=tmp_path / "report")).page.read_text()
    for name, about in record.items():
        cells = [name, about["data"], str(about["samples_per_epoch"]), str(about["usable"]), str(about["rows"])]
        assert re.search(r"<td[^>]*>\s*".join(["", *(re.escape(cell) + r"\s*</td>\s*" for cell in cells)]), page), name
    card = model_card("name", open_checkpoint(options.output), record_of_run, summary, ())
    assert "| entry b | b.json, 5 of 5 usable samples an epoch |" in card


def test_a_run_on_shares_resumes_exactly(options, folder, tmp_path, monkeypatch, caplog):
    mixture = mixtures.write(folder, "shares.yaml", a={"weight": 1.5}, b={"cap": 2})
    options = replace(options, data=mixture, steps=6)
    undisturbed = replace(options, output=tmp_path / "undisturbed")
    with caplog.at_level("INFO"):
        train(undisturbed)
    said = [record.getMessage() for record in caplog.records]
    assert "samples: 12 an epoch, skipped: none" in said
    assert "  a: 10 an epoch, of 7 usable (7 rows, weight 1.5), template qa" in said
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Stop):
            train(options)
    changed = replace(options, data=mixtures.write(folder, "changed.yaml", a={"weight": 1.25}, b={"cap": 2}))
    shutil.copy(changed.data, mixture)
    with pytest.raises(ConfigError, match="mixture, a: share 'weight 1.5', now 'weight 1.25'"):
        train(options)
    mixtures.write(folder, "shares.yaml", a={"weight": 1.5}, b={"cap": 2})
    train(options)
    assert_same_weights(weights(options.output), weights(undisturbed.output))


@pytest.mark.slow
def test_two_processes_train_as_one(options, folder, tmp_path):
    mixture = mixtures.write(folder, "shares.yaml", a={"weight": 1.5}, b={"cap": 2})
    train(replace(options, data=mixture))
    done = training.two_processes(replace(options, data=mixture), tmp_path, batch_size=2)
    assert done.returncode == 0, done.stderr
    training.assert_equal_runs(options.output, tmp_path / "two")


def naive_draws(counts, drawn, seed, epochs):
    """Epochs of (file, sample), from the words: each file's permutations are one sequence, of which an epoch takes the next m."""
    streams = []
    for file, count in enumerate(counts):
        rounds = [np.random.default_rng([seed % 2**63, file, turn]).permutation(count) for turn in range(99)]
        streams.append(iter(np.concatenate(rounds).tolist()))
    return [
        sorted((file, next(stream)) for file, stream in enumerate(streams) for _ in range(drawn[file]))
        for _ in range(epochs)
    ]


@pytest.mark.parametrize("grouping", ["none", "modality-length"])
@pytest.mark.parametrize(
    ("counts", "drawn"), [((5, 3), (5, 3)), ((5, 3, 4), (12, 1, 3)), ((1,), (1,)), ((6, 1), (4, 2))]
)
def test_an_epoch_takes_the_next_samples_of_each_file(grouping, counts, drawn):
    random = np.random.default_rng(3)
    lengths, has_image = random.integers(1, 50, sum(counts)), random.random(sum(counts)) < 0.6
    order = MixedOrder(counts, drawn, grouping, -1 if grouping == "none" else 1, lengths, has_image, 2)
    wanted = naive_draws(counts, drawn, order.seed, 8)
    seen = np.zeros(sum(counts), int)
    for number in range(8):
        found = order.epoch(number)
        assert found.tolist() == order.epoch(number).tolist()
        starts = np.cumsum([0, *counts])
        files = np.searchsorted(starts, found, side="right") - 1
        assert sorted(zip(files.tolist(), (found - starts[files]).tolist(), strict=True)) == wanted[number]
        seen += np.bincount(found, minlength=len(seen))
        for file, start in enumerate(starts[:-1]):  # over epochs, equally often up to one time
            times = seen[start : start + counts[file]]
            assert times.max() - times.min() <= 1
    if drawn == counts:
        plain = EpochOrder(grouping, order.seed, sum(counts), lengths, has_image, 2)
        assert [order.epoch(e).tolist() for e in range(3)] == [plain.epoch(e).tolist() for e in range(3)]


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory):
    """A teacher with the same vocabulary and images, and another width."""
    return tiny.checkpoint(tmp_path_factory.mktemp("other") / "ckpt", seed=9, width=24)


@pytest.fixture(scope="module")
def of_two_teachers(folder, teacher, other_teacher):
    """A mixture whose stores hold hidden states of two teachers."""
    settings = {"payload": "both", "hidden_dtype": "float16"}
    for name, taught_by in (("a", teacher), ("b", other_teacher)):
        data, out = folder / f"{name}.json", folder / f"two/{name}.zarr"
        cache_teacher(mixtures.cache_options(taught_by, folder, data=data, out=out, **settings))
    return mixtures.write(folder, "two.yaml", a={"teacher": str(teacher)}, b={"teacher": str(other_teacher)})


def test_each_data_file_may_have_a_teacher_of_its_own(options, folder, of_two_teachers, teacher, other_teacher):
    """Every position's teacher logits are those of its own store and LM head, computed alone; and the run trains."""
    options = replace(options, data=of_two_teachers, cache=folder / "two", switch=False, teacher=None)
    inputs = open_inputs(resolve_options(options))
    source = set_up_models(inputs, training_arguments(inputs.options)).source
    assert isinstance(source, StoredOfSeveral)
    items = [inputs.samples[item] for item in (8, 0, 11, 5)]
    batch = Batch.of(Collator(0, payload=inputs.samples.payload, teacher_of=inputs.samples.teacher_of)(items))
    wanted = []
    for _, index in items:
        name, row, path = (
            ("a", index, teacher) if index < mixtures.FIRST else ("b", index - mixtures.FIRST, other_teacher)
        )
        states = torch.from_numpy(TeacherStore.open(folder / f"two/{name}.zarr")[row].payload.hidden)
        wanted.append(float32_logits(states, load_lm_head(open_checkpoint(path), "float32")))
    torch.testing.assert_close(source.signal(batch).rows(torch.zeros(1)), torch.cat(wanted))
    assert train(options).steps == 6


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"switch": True}, "entry b: the switch pathway runs one teacher: pass --no-switch"),
        ({"switch": False, "vocab_map": True}, "entry b: --vocab-map maps the vocabulary of one teacher"),
        ({"switch": False, "teacher_mode": "live", "cache": None}, "entry b: --teacher-mode live runs one teacher"),
    ],
)
def test_one_teacher_a_file_is_refused_where_a_run_has_one(options, of_two_teachers, folder, changed, message):
    with pytest.raises(ConfigError, match=message):
        train(replace(options, data=of_two_teachers, **({"cache": folder / "two"} | changed)))


def test_top_k_of_several_teachers_needs_none_of_them(options, folder, of_two_teachers):
    plain = mixtures.write(folder, "plain.yaml")
    options = replace(options, data=plain, cache=folder / "two", switch=False, teacher=None, steps=1)
    assert train(options).steps == 1


def test_a_row_that_changed_is_told_with_its_file(options, folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "place")
    mixture = mixtures.write(place)
    tiny.image(place / "images/008.png", 99)
    with pytest.raises(StoreMismatch, match=rf"row 1 \(id s8\) of {place}/b.json: its image changed"):
        train(replace(options, data=mixture, images=place / "images", cache=place / "stores", steps=3))


def test_a_row_that_cannot_be_used_is_told_with_its_file(options, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "SURVEYED_ROWS", 0)
    place = shutil.copytree(folder, tmp_path / "place")
    (place / "images/008.png").unlink()
    options = replace(options, data=mixtures.write(place), images=place / "images", cache=None, template="qa")
    options = replace(options, objective="sft", switch=False, max_skipped=0.5)
    samples = open_inputs(resolve_options(options)).samples
    assert (samples.left_out.limit.samples, samples.surveyed, samples.rows) == (12, False, 12)
    found = samples[8]
    assert isinstance(found, Unusable)
    assert found.row == 8
    assert found.detail.startswith(f"{place}/b.json, row 1: ")

    def broken(*_):
        raise ReadFailure("row 1: no memory")

    monkeypatch.setattr(samples.files[1].samples, "encoder", type("Encoder", (), {"encode": broken})())
    with pytest.raises(ReadFailure, match=f"{place}/b.json, row 1: no memory"):
        samples[8]


@pytest.mark.parametrize(
    ("b", "error", "message"),
    [
        (
            {"store": "{folder}/stores/a.zarr"},
            StoreMismatch,
            "entry b: .*a.zarr was made from 7 samples, .*b.json has 5",
        ),
        ({"store": "{folder}/stores/none.zarr"}, InputError, "entry b: no teacher store at .*none.zarr"),
        ({"store": "{folder}/two/b.zarr"}, StoreMismatch, "entry b: no store fits this run"),
        (
            {"template": "plain"},
            StoreMismatch,
            "entry b: no store fits .*\n.*\n.*template name: store 'qa', here 'plain'",
        ),
        ({"template": "nonsense"}, ConfigError, "entry b: .*nonsense"),
        ({"data": "{folder}/empty.json"}, DataError, "entry empty: .*has no usable row|should hold a list"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused_first(options, folder, of_two_teachers, b, error, message):
    (folder / "empty.json").write_text("[]")
    given = {key: value.format(folder=folder) for key, value in b.items()}
    with pytest.raises(error, match=message):
        train(replace(options, data=mixtures.write(folder, "bad.yaml", b=given)))
    assert not options.output.exists()


def test_stores_that_hold_other_numbers_of_logits_are_refused_together(options, folder, teacher):
    for name, k in (("a", 15), ("b", 6)):
        data, out = folder / f"{name}.json", folder / f"apart/{name}.zarr"
        cache_teacher(mixtures.cache_options(teacher, folder, data=data, out=out, k=k))
    with pytest.raises(StoreMismatch, match="share their top k; a has 15, b has 6: cache again with the same --k"):
        train(replace(options, cache=folder / "apart"))


def test_a_store_of_other_rows_is_refused(options, folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "place")
    rows = json.loads((place / "b.json").read_text())
    rows[2]["conversations"][1]["value"] = "a square"
    (place / "b.json").write_text(json.dumps(rows))
    with pytest.raises(StoreMismatch, match="entry b: .*b.json differs in 1 sample from what .*b.zarr was made from"):
        train(replace(options, data=mixtures.write(place), cache=place / "stores"))


def test_teachers_that_read_images_otherwise_cannot_be_mixed(options, folder, teacher, tmp_path):
    """One with another number of image tokens encodes samples otherwise than the student."""
    larger = tiny.checkpoint(tmp_path / "larger", seed=5, vision=tiny.vision_config(size=24))
    shutil.copytree(folder / "stores", tmp_path / "stores")
    data, out = folder / "b.json", tmp_path / "stores/b.zarr"
    shutil.rmtree(out)
    cache_teacher(mixtures.cache_options(larger, folder, data=data, out=out, payload="both"))
    mixture = mixtures.write(folder, "larger.yaml", b={"teacher": str(larger)})
    options = replace(options, data=mixture, cache=tmp_path / "stores", switch=False, payload="topk")
    with pytest.raises((CheckpointError, StoreMismatch), match="entry b: its teacher encodes samples otherwise"):
        train(options)
