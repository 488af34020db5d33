"""Where the teacher's logits come from: told first, recorded, read alone, with the exact knees."""

import re
import shutil
from dataclasses import replace

import pytest
import tiny
import training
import yaml
from training import history, logged

from switchkd.errors import ConfigError, StoreMismatch
from switchkd.losses.signals import HiddenSignal
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.stored_teacher import StoredHidden
from switchkd.pipelines.training.inputs import open_inputs, resolve_options
from switchkd.pipelines.training.train import train
from switchkd.stores import TeacherStore, reader

cached, options = training.cached, training.options


@pytest.fixture(scope="module")
def both(teacher, cached, tmp_path_factory):
    """A store as the command makes it without options: top-k logits and states as steps; k below this vocabulary's size."""
    store = tmp_path_factory.mktemp("both") / "b.zarr"
    data, images = cached / "data.json", cached / "images"
    cache_teacher(CacheOptions(teacher=teacher, data=data, images=images, out=store, template="qa", k=6))
    return store


def test_of_several_stores_the_one_of_this_data_and_of_the_exact_payload_is_read(
    options, teacher, cached, both, tmp_path
):
    """Stores of other data, unfinished ones and approximate ones in the folder do not get in the way."""
    folder = tmp_path / "stores"
    shutil.copytree(cached / "stores/s.zarr", folder / "topk.zarr")
    shutil.copytree(both, folder / "both.zarr")
    unfinished = shutil.copytree(both, folder / "unfinished.zarr")
    shutil.rmtree(unfinished / "parts/00000")
    for name, count in (("short", 5), ("other", 12)):
        other = tiny.data(tmp_path / name, tiny.rows(count, two_turns=(1,)))
        made = CacheOptions(
            teacher=teacher, data=other, images=other.parent / "images", out=folder / f"{name}.zarr", template="qa"
        )
        cache_teacher(made)
    inputs = open_inputs(resolve_options(replace(options, cache=folder)))
    assert inputs.stores[0].path == folder / "both.zarr" and inputs.payload == "hidden"
    without = replace(options, cache=folder, teacher=None, switch=False)
    shutil.rmtree(folder / "both.zarr")
    assert open_inputs(resolve_options(without)).stores[0].path == folder / "topk.zarr"
    shutil.copytree(folder / "topk.zarr", folder / "again.zarr")
    with pytest.raises(StoreMismatch, match=r"2 stores in .* fit, name one: .*again\.zarr, .*topk\.zarr"):
        open_inputs(resolve_options(without))


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("switchkd")]


def test_training_reads_the_states_of_a_store_of_both(options, both, monkeypatch, caplog):
    monkeypatch.setattr(reader, "decode_topk", lambda *_: pytest.fail("top-k logits were decoded"))
    with caplog.at_level("INFO", logger="switchkd"):
        train(replace(options, cache=both, steps=2))
    manifest = TeacherStore(both).manifest
    signal = f"hidden: 32 wide states as steps of logit error 0.02, knees stored; store {manifest.identity}"
    assert told(caplog)[:2] == ["objective: dbild-rkl with the switch pathway", f"teacher's signal: {signal}"]
    assert "full-vocabulary DBiLD" not in caplog.text
    assert yaml.safe_load((options.output / "run.yaml").read_text())["teacher_signal"] == signal


@pytest.mark.parametrize(
    ("change", "cautioned"),
    [({}, True), ({"tail": "floor"}, True), ({"window": 6}, True), ({"objective": "fkl", "switch": False}, False)],
)
def test_training_from_top_k_logits_is_told_what_it_misses(options, both, monkeypatch, caplog, change, cautioned):
    monkeypatch.setattr(reader, "decode_hidden", lambda *_: pytest.fail("states were decoded"))
    with caplog.at_level("INFO", logger="switchkd"):
        train(replace(options, cache=both, payload="topk", steps=1, **change))
    signal = yaml.safe_load((options.output / "run.yaml").read_text())["teacher_signal"]
    tail = change.get("tail", "student")
    assert signal.startswith(f"topk: 6 of 15 logits, quantisation steps 0.004 to 0.125, tail {tail}; store ")
    warned = [line for line in told(caplog)[:3] if ": of a real language model, " in line]
    assert len(warned) == cautioned


def test_capturing_top_k_logits_alone_is_told_what_it_misses(options, teacher, tmp_path):
    def lines(**change):
        said = []
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.zarr"
        made = CacheOptions(teacher=teacher, data=options.data, images=options.images, out=out, template="qa")
        cache_teacher(replace(made, **change), tell=said.append)
        return said

    payload, caution = lines(payload="topk", k=6)
    assert payload == "payload: topk: 6 of 15 logits, quantisation steps 0.004 to 0.125"
    assert re.match(r"warning: payload topk keeps 6 of 15 logits, .*27 to 45 % from the live teacher's", caution)
    assert len(lines(payload="topk")) == 1  # every logit is there
    (payload,) = lines(k=6)
    assert payload.endswith("; hidden: 32 wide states as steps of logit error 0.02, knees stored")


def test_a_live_teacher_and_none_are_recorded_as_such(options, tmp_path):
    train(replace(options, cache=None, teacher_mode="live", template="qa", steps=1))
    assert yaml.safe_load((options.output / "run.yaml").read_text())["teacher_signal"] == "live teacher"
    other = tmp_path / "sft"
    train(replace(options, objective="sft", switch=False, cache=None, template="qa", steps=1, output=other))
    assert yaml.safe_load((other / "run.yaml").read_text())["teacher_signal"] is None


def test_a_run_does_not_go_on_from_another_signal(options, both, cached, tmp_path):
    """The store is chosen by what fits, so a folder that got another one would change a run without a word."""
    stores = tmp_path / "stores"
    shutil.copytree(both, stores / "b.zarr")
    train(replace(options, cache=stores, steps=2, save_every=1))
    (options.output / "summary.json").unlink()
    shutil.rmtree(stores)
    shutil.copytree(cached / "stores", stores)
    with pytest.raises(ConfigError, match=r"teacher_signal: run 'hidden: .*', now 'topk: 15 of 15 logits"):
        train(replace(options, cache=stores, steps=2, save_every=1))


def test_a_record_of_an_earlier_version_has_no_signal(options, both):
    train(replace(options, cache=both, steps=2, save_every=1))
    (options.output / "summary.json").unlink()
    record = options.output / "run.yaml"
    kept = {name: value for name, value in yaml.safe_load(record.read_text()).items() if name != "teacher_signal"}
    record.write_text(yaml.safe_dump(kept))
    assert train(replace(options, cache=both, steps=2, save_every=1)).steps == 2


@pytest.mark.parametrize(("exact_knee", "same"), ((True, True), (False, False)))
def test_the_knees_of_coarse_states_are_the_live_teachers(
    options, teacher, cached, tmp_path, monkeypatch, exact_knee, same
):
    """States so coarse that other knees are found on them: with the stored ones the logged figures are the live teacher's."""
    store = tmp_path / "coarse.zarr"
    data, images = cached / "data.json", cached / "images"
    made = CacheOptions(teacher=teacher, data=data, images=images, out=store, template="qa", payload="hidden")
    cache_teacher(replace(made, hidden_error=0.3))
    seen = []
    signal = StoredHidden.signal
    monkeypatch.setattr(StoredHidden, "signal", lambda self, batch: seen.append(signal(self, batch)) or seen[-1])
    if not exact_knee:
        monkeypatch.setattr("switchkd.stores.manifest.Manifest.has_exact_knee", False)
    train(replace(options, cache=store, steps=3))
    assert all(isinstance(found, HiddenSignal) and (found.knee is not None) == exact_knee for found in seen)
    live = replace(options, cache=None, teacher_mode="live", template="qa", output=tmp_path / "live", steps=3)
    train(live)
    means = [[entry["knee_teacher_mean"] for entry in logged(run)] for run in (options.output, live.output)]
    assert (means[0] == means[1]) is same


def test_fine_states_train_as_the_live_teacher(options, teacher, cached, tmp_path):
    store = tmp_path / "fine.zarr"
    data, images = cached / "data.json", cached / "images"
    made = CacheOptions(teacher=teacher, data=data, images=images, out=store, template="qa")
    cache_teacher(replace(made, hidden_error=1e-5))
    train(replace(options, cache=store, steps=8))
    live = replace(options, cache=None, teacher_mode="live", template="qa", output=tmp_path / "live", steps=8)
    train(live)
    for a, b in zip(history(options.output), history(live.output), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
