"""The order of samples: from seed, epoch and global batch alone; groups of one modality and similar length; no repeats."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import padding
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from training import Stop, assert_same_weights, flags_of, history, interrupt_after, weights

from switchkd.data.samples import SampleFile
from switchkd.errors import ConfigError
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.training.batches.sampler import GROUPINGS, EpochOrder, StepBatches, padding_share
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.train import train


def make(grouping, samples=400, global_batch=8, seed=0):
    random = np.random.default_rng(7)
    has_image = random.random(samples) < 0.8
    lengths = random.lognormal(4, 1, samples).astype(np.int64) + 100 * has_image
    return EpochOrder(grouping, seed, samples, lengths, has_image, global_batch)


@given(st.sampled_from(GROUPINGS), st.integers(1, 200), st.integers(1, 40), st.integers(0, 3))
def test_every_epoch_takes_every_sample_once(grouping, samples, global_batch, epoch):
    assert sorted(make(grouping, samples, global_batch).epoch(epoch)) == list(range(samples))


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_seed_and_epoch_decide(grouping):
    order = make(grouping).epoch(1).tolist()
    assert make(grouping).epoch(1).tolist() == order
    assert make(grouping).epoch(0).tolist() != order
    assert make(grouping, seed=1).epoch(1).tolist() != order


def test_none_is_the_shuffle_of_the_trainers_default():
    generator = torch.Generator().manual_seed(42 + 3)
    assert make("none", seed=42).epoch(3).tolist() == torch.randperm(400, generator=generator).tolist()


def test_a_batch_is_of_one_modality_but_for_the_last_two():
    order = make("modality-length", 403, 8)
    batches = [order.has_image[batch] for batch in np.split(order.epoch(0), range(8, 403, 8))]
    mixed = [place for place, batch in enumerate(batches) if 0 < batch.sum() < len(batch)]
    assert set(mixed) <= {len(batches) - 2, len(batches) - 1}
    assert {bool(batch.all()) for batch in batches[:-2]} == {True, False}


@pytest.mark.parametrize("grouping", ["length", "modality-length"])
def test_lengths_are_similar_within_a_batch_and_the_longest_comes_first(grouping):
    order = make(grouping)
    batches = order.lengths[order.epoch(0)].reshape(-1, 8)
    assert batches[0].max() == order.lengths.max()
    spread = np.median(batches.max(1) - batches.min(1))
    assert spread < 0.1 * np.median(np.ptp(order.lengths[make("none").epoch(0)].reshape(-1, 8), axis=1))


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(("processes", "accumulation", "batch"), [(1, 1, 8), (2, 1, 4), (1, 4, 2), (4, 2, 1)])
def test_a_steps_samples_do_not_depend_on_how_they_are_divided(grouping, processes, accumulation, batch):
    order = make(grouping)
    steps = 3 * 400 // 8
    taken = [list(StepBatches(order, steps, batch, accumulation, process, processes)) for process in range(processes)]
    assert {len(batches) for batches in taken} == {steps * accumulation}
    expected = np.concatenate([order.epoch(epoch) + 400 * epoch for epoch in range(3)]).reshape(-1, 8)
    for step, global_batch in enumerate(expected):
        micro = range(step * accumulation, (step + 1) * accumulation)
        assert sorted(i for process in taken for m in micro for i in process[m]) == sorted(global_batch)


@pytest.mark.parametrize("samples", (1, 5, 7, 30))
def test_epochs_that_do_not_fill_their_last_step_go_over_into_the_next(samples):
    """No sample twice before all were seen once, whatever the division; also where a step holds several epochs."""
    order = make("none", samples)
    for batch, accumulation, processes in ((8, 1, 1), (2, 2, 2), (1, 4, 2)):
        taken = [list(StepBatches(order, 6, batch, accumulation, process, processes)) for process in range(processes)]
        steps = [
            sorted(i for part in taken for m in part[s * accumulation : (s + 1) * accumulation] for i in m)
            for s in range(6)
        ]
        stream = np.concatenate([order.epoch(epoch) + samples * epoch for epoch in range(48 // samples + 1)])[:48]
        assert steps == np.sort(stream.reshape(6, 8), axis=1).tolist()


def test_grouping_saves_padding():
    """Lengths as in Mix-665K, see benchmarks/padding.py; estimated from characters as the trainer does."""
    drawn = padding.draw(6000)
    shares = {
        grouping: padding_share(drawn.epoch(grouping, 16 * 8), drawn.tokens, 16)
        for grouping in ("none", "length", "modality-length")
    }
    assert shares["none"] > 0.25
    assert shares["length"] < 0.1
    assert shares["modality-length"] < 0.1


def test_padding_share_by_hand():
    assert padding_share(np.array([0, 1, 2]), np.array([4, 2, 3]), 2) == 1 - 9 / (8 + 3)


def test_an_unknown_grouping_is_refused():
    with pytest.raises(ConfigError, match="grouped by none, length, modality-length"):
        make("size")


def test_characters_and_images_come_from_the_columns(tmp_path):
    rows = tiny.rows(5, text_only=(1,), two_turns=(2,))
    rows[3] = {"conversations": []}
    rows[4]["conversations"][1]["value"] = "größer 😀"
    samples = SampleFile(tiny.data(tmp_path, rows))
    assert samples.characters().tolist() == [sum(len(t) for turn in s.turns for t in turn) for s in samples]
    assert samples.has_image().tolist() == [s.image is not None for s in samples]


@pytest.fixture(scope="module")
def options(teacher, student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grouped")
    rows = tiny.rows(16, text_only=(3, 4, 9, 11), two_turns=(3, 5, 6))
    data = tiny.data(folder, rows)
    cache_teacher(
        CacheOptions(
            teacher=teacher, data=data, images=folder / "images", out=folder / "stores/s.zarr", template="qa", k=8
        )
    )
    return TrainOptions(
        student=student,
        teacher=teacher,
        data=data,
        images=folder / "images",
        cache=folder / "stores",
        output=folder / "run",
        steps=8,  # two epochs
        lr=1e-2,
        batch_size=4,
        group_by="modality-length",
        log_every=1,
        save_every=1,
    )


def test_grouping_is_written_down_and_changes_the_run(options, tmp_path):
    train(replace(options, output=tmp_path / "a"))
    train(replace(options, output=tmp_path / "b", group_by="none"))
    assert "group_by: modality-length" in (tmp_path / "a/run.yaml").read_text()
    assert history(tmp_path / "a") != history(tmp_path / "b")
    with pytest.raises(ConfigError, match="group_by: run 'modality-length', now 'length'"):
        train(replace(options, output=tmp_path / "a", group_by="length"))
    with pytest.raises(ConfigError, match="train_sampling_strategy is refused: use --group-by"):
        train(replace(options, output=tmp_path / "c", trainer={"train_sampling_strategy": "group_by_length"}))


@pytest.mark.parametrize("group_by", ["none", "modality-length"])
def test_a_run_resumed_in_its_second_epoch_goes_on_in_that_order(options, monkeypatch, tmp_path, group_by):
    whole = replace(options, output=tmp_path / "whole", group_by=group_by)
    train(whole)
    broken = replace(whole, output=tmp_path / "broken")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        with pytest.raises(Stop):
            train(broken)
    train(broken)
    assert history(broken.output) == history(whole.output)
    assert_same_weights(weights(broken.output), weights(whole.output), rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_resumed_in_the_second_epoch_equal_one_undisturbed(options, tmp_path):
    """Epochs go on in the order that one process has."""
    train(replace(options, output=tmp_path / "one"))
    main = tmp_path / "main.py"
    main.write_text(
        "import os, sys\nfrom switchkd.cli.main import main\nfrom switchkd.pipelines.training.trainer import SwitchTrainer\n"
        "stop = int(os.environ['STOP_AT'])\nwhole = SwitchTrainer.compute_loss\n"
        "def compute_loss(self, *a, **k):\n"
        "    if self.state.global_step == stop:\n        os._exit(9)\n    return whole(self, *a, **k)\n"
        "SwitchTrainer.compute_loss = compute_loss\nif __name__ == '__main__':\n    main()\n"
    )
    changed = {"output": tmp_path / "two", "batch_size": 2, "steps": 8, "lr": 1e-2, "save_every": 1}
    flags = flags_of(options, group_by="modality-length", **changed)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(main)]
    for stop, code in ((6, 1), (-1, 0)):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "STOP_AT": str(stop)}
        done = subprocess.run([*launcher, "train", *flags], capture_output=True, text=True, env=environment)
        assert done.returncode == code, done.stderr[-3000:]
    assert "resuming from" in done.stderr
    for a, b in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"), rtol=1e-3, atol=1e-4)
