"""Row 26 of the faults found by outside trials: a run over a large data file begins at once, and leaves out what it cannot use."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import tiny
import yaml
from training import Stop, history, interrupt_after, two_processes

from switchkd.errors import ConfigError, DataError, ReadFailure
from switchkd.pipelines.preflight.data_check import check_data
from switchkd.pipelines.preflight.inspector import SampleInspector
from switchkd.pipelines.preflight.options import CheckOptions
from switchkd.pipelines.training.batches import dataset
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train


@pytest.fixture
def options(student, tmp_path, monkeypatch):
    """Plain fine-tuning on 24 samples, of which a part of four is looked at before the first step."""
    monkeypatch.setattr(dataset, "SURVEYED_ROWS", 0)
    monkeypatch.setattr("switchkd.pipelines.preflight.kept.BLOCK_ROWS", 4)
    data = tiny.data(tmp_path / "data", tiny.rows(24, text_only=(3,)))
    return TrainOptions(
        student=student, data=data, images=data.parent / "images", output=tmp_path / "run", objective="sft", switch=False,
        template="qa", batch_size=4, log_every=1, save_every=2, lr=1e-3,
    )  # fmt: skip


def spoil(options, *rows):
    for row in rows:
        (options.images / f"{row:03d}.png").write_bytes(b"page")


def test_the_first_step_waits_for_a_part_of_the_images(options, monkeypatch, caplog):
    rows, original = [], SampleInspector.inspect
    monkeypatch.setattr(
        SampleInspector, "inspect", lambda self, sample: rows.append(sample.index) or original(self, sample)
    )
    with caplog.at_level(logging.INFO):
        done = train(options)
    assert rows == [0, 6, 12, 18]
    assert (done.samples, done.skipped, done.steps) == (24, {}, 6)
    assert "left out of its step and counted" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_used_is_left_out_and_counted_once(options, workers):
    spoil(options, 1, 2)
    (options.images / "005.png").unlink()
    done = train(replace(options, epochs=2, workers=workers))
    assert (done.samples, done.steps) == (21, 12)  # the steps are those of all rows: nothing else is known at first
    assert done.skipped == {"image_unreadable": 2, "image_missing": 1}
    assert all(np.isfinite(entry[1]) for entry in history(options.output))


def test_a_step_without_any_usable_sample_has_no_loss(options):
    bad = [row for row in range(24) if row != 3]
    spoil(options, *bad)
    done = train(replace(options, max_skipped=1))
    assert (done.samples, done.skipped) == (1, {"image_unreadable": 23})
    losses = [loss for _, loss, *_ in history(options.output)]
    assert losses.count(0.0) == 5 and all(np.isfinite(losses))


def test_the_mean_is_over_the_rest_of_the_step(options, tmp_path):
    """Three good samples and a bad one in a step are the same step as those three alone."""
    few = replace(options, steps=1, batch_size=24)
    spoil(options, 7)
    train(few)
    rows = [row for index, row in enumerate(tiny.rows(24, text_only=(3,))) if index != 7]
    (tmp_path / "data/rest.json").write_text(json.dumps(rows))
    train(replace(few, data=tmp_path / "data/rest.json", batch_size=23, output=tmp_path / "rest"))
    assert history(few.output)[0][1] == pytest.approx(history(tmp_path / "rest")[0][1], rel=1e-5)


def test_an_interrupted_run_takes_the_same_samples_and_forgets_none(options, tmp_path, monkeypatch):
    spoil(options, 1, 2, 9, 10)
    whole = replace(options, output=tmp_path / "whole")
    train(whole)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(Stop):
            train(options)
    done = train(options)
    assert history(options.output) == history(whole.output)
    assert done.skipped == {"image_unreadable": 4}


def test_the_order_does_not_depend_on_what_is_known_of_images(options, tmp_path):
    """A kept survey of the whole file changes no sample of a step."""
    spoil(options, 1, 2)
    train(options)
    check_data(CheckOptions(options.data, options.images, model=options.student, template="qa"))
    other = replace(options, output=tmp_path / "other")
    train(other)
    assert history(other.output) == history(options.output)


def test_too_many_stop_the_run(options):
    spoil(options, *[row for row in range(24) if row % 6 and row != 3])
    with pytest.raises(DataError, match=r"1[1-4] samples of .* cannot be used: .*allows 10 of 24"):
        train(options)


def test_a_part_that_is_bad_stops_the_run_before_a_model_loads(options, monkeypatch):
    monkeypatch.setattr("switchkd.pipelines.training.train.set_up_models", lambda *_: pytest.fail("a model was loaded"))
    spoil(options, 0, 6, 12, 18)
    with pytest.raises(DataError, match=r"4 of 4 samples from all over"):
        train(options)
    assert not (options.output / "run.yaml").exists()


def test_a_failure_around_the_data_still_stops(options, monkeypatch):
    real = SampleInspector.inspect

    def failing(self, sample):
        if sample.index == 6:
            raise ReadFailure("row 6: EIO")
        return real(self, sample)

    monkeypatch.setattr(SampleInspector, "inspect", failing)
    with pytest.raises(ReadFailure, match="row 6"):
        train(options)


def test_a_small_file_is_surveyed_whole_and_a_resume_must_find_the_same(options, monkeypatch):
    monkeypatch.setattr(dataset, "SURVEYED_ROWS", 4096)
    spoil(options, 1)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(Stop):
            train(options)
    assert yaml.safe_load((options.output / "run.yaml").read_text())["samples"].startswith("23 of 24, ")
    tiny.image(options.images / "001.png", 1)
    with pytest.raises(ConfigError, match=r"samples: run '23 of 24, .*', now '24 of 24, "):
        train(options)


PRELUDE = """
from switchkd.pipelines.preflight.options import CheckOptions
from switchkd.pipelines.training.batches import dataset
from switchkd.pipelines.preflight import inspector, kept
import os
dataset.SURVEYED_ROWS = {surveyed}
kept.BLOCK_ROWS = 4
original = inspector.SampleInspector.inspect
def inspect(self, sample):
    print("inspected by", os.environ["RANK"], flush=True)
    return original(self, sample)
inspector.SampleInspector.inspect = inspect
"""


@pytest.mark.parametrize("surveyed", [0, 4096])
def test_only_the_first_of_two_processes_inspects(options, tmp_path, surveyed):
    spoil(options, 1, 2, 9)
    more = {
        "teacher": None,
        "cache": None,
        "objective": "sft",
        "switch": False,
        "template": "qa",
        "steps": 6,
        "batch_size": 2,
    }
    done = two_processes(options, tmp_path, PRELUDE.format(surveyed=surveyed), **more)
    assert done.returncode == 0, done.stderr
    assert "inspected by 0" in done.stdout
    assert "inspected by 1" not in done.stdout
    assert "skipped: 3 image_unreadable" in done.stdout
