"""Row 28 of the faults found by outside trials: precision, grouping and workers that are not given fit what is there."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import training
import yaml
from training import Stop, interrupt_after

from switchkd.data.samples import SampleFile
from switchkd.pipelines import cores
from switchkd.pipelines.training import inputs
from switchkd.pipelines.training.batches.dataset import TrainingSamples
from switchkd.pipelines.training.batches.sampler import EpochOrder
from switchkd.pipelines.training.inputs import resolve_options
from switchkd.pipelines.training.resuming import as_begun
from switchkd.pipelines.training.train import train

cached, options = training.cached, training.options


@pytest.mark.parametrize(
    ("gpu", "native", "precision"), [(False, False, "float32"), (True, False, "float32"), (True, True, "bfloat16")]
)
def test_precision_is_that_of_the_device(options, monkeypatch, gpu, native, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert resolve_options(options).precision == precision
    assert resolve_options(replace(options, precision="float32")).precision == "float32"


def test_workers_are_made_from_the_cores(options, monkeypatch):
    monkeypatch.setattr(cores, "cores", lambda: 64)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert resolve_options(options).workers == 6
    assert resolve_options(replace(options, workers=0)).workers == 0


def test_a_begun_run_keeps_what_it_chose(options, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Stop):
            train(options)
    record = yaml.safe_load((options.output / "run.yaml").read_text())
    assert (record["precision"], record["group_by"], record["workers"]) == ("float32", "none", 0)
    monkeypatch.setattr(inputs, "precision_here", lambda: "bfloat16")  # on another machine
    assert resolve_options(options).precision == "float32"
    assert train(options).steps == 6
    assert train(options).already_finished
    assert (
        as_begun(replace(options, precision="bfloat16")).precision == "bfloat16"
    )  # given: it is refused, not replaced


@pytest.mark.parametrize(
    ("lengths", "packing", "grouping"),
    [
        ("different", None, "modality-length"),
        ("different", 4096, "none"),
        ("equal", None, "none"),
        ("few", None, "none"),
    ],
)
def test_samples_are_grouped_where_it_saves_padding(cached, tmp_path, monkeypatch, lengths, packing, grouping):
    samples = object.__new__(TrainingSamples)
    count = 300 if lengths == "few" else 3000
    random = np.random.default_rng(0)
    sizes = np.full(count, 100) if lengths == "equal" else random.integers(20, 400, count)
    samples.usable = np.arange(count)

    def order(name, seed, global_batch):
        return EpochOrder(name, seed, count, sizes, np.arange(count) % 4 > 0, global_batch)

    monkeypatch.setattr(samples, "order", order)
    assert samples.grouping(4, 8, packing) == grouping


def test_what_was_chosen_is_said_first(options, caplog):
    with caplog.at_level("INFO"):
        train(replace(options, steps=1))
    said = next(record.getMessage() for record in caplog.records if "options (in" in record.getMessage())
    assert "precision float32" in said
    assert "group_by none" in said
    assert "workers 0" in said
    assert len(SampleFile(options.data)) == len(json.loads(options.data.read_text()))
