"""Stages: defaults that anything given overrides, parts that train or stay, learning rates of their own, the mean."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
import training
import yaml
from click.testing import CliRunner
from transformers import LlavaForConditionalGeneration

from switchkd.cli.main import main
from switchkd.errors import ConfigError
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.training.option_checks import PARTS
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.stages import STAGES, with_stage
from switchkd.pipelines.training.student_parts import part_of, set_part_rates
from switchkd.pipelines.training.train import train
from switchkd.pipelines.training.trainer import SwitchTrainer

cached, options = training.cached, training.options
history, weights = training.history, training.weights


def moved_parts(student, run):
    before, after = (LlavaForConditionalGeneration.from_pretrained(f).state_dict() for f in (student, run))
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}


def test_the_papers_settings():
    assert STAGES["pt"]["train_parts"] == STAGES["dpt"]["train_parts"] == "projector"
    assert {name: (stage["lr"], stage["global_batch"]) for name, stage in STAGES.items()} == {
        "pt": (1e-3, 256),
        "dpt": (1e-3, 256),
        "sft": (2e-5, 128),
        "dft": (2e-5, 128),
    }
    for stage in STAGES:
        TrainOptions(student="s", data="d", output="o", **with_stage(stage, {})).as_objective()


def test_what_is_given_wins_over_the_stage():
    found = with_stage("dft", {"lr": 1.0, "accumulation": 4})
    assert found["lr"] == 1.0
    assert "global_batch" not in found
    assert found["stage"] == "dft"
    with pytest.raises(ConfigError, match="no stage 'xft'; there are pt, dpt, sft, dft"):
        with_stage("xft", {})


@pytest.mark.parametrize("parts", ["projector", "vision, projector", "language", "vision,projector,language"])
def test_only_the_named_parts_move(options, student, parts):
    named = {part.strip() for part in parts.split(",")}
    train(replace(options, train_parts=parts, switch="vision" in named, steps=2))
    assert moved_parts(student, options.output) == named


def test_each_part_has_its_own_peak_rate_and_the_schedule_scales_them_alike(options, monkeypatch):
    rates = []
    step = SwitchTrainer.training_step

    def spy(self, *args, **kwargs):
        part_by_id = {id(p): part_of(name) for name, p in self.model.named_parameters()}
        groups = self.optimizer.param_groups
        rates.append({part_by_id[id(p)]: group["lr"] for group in groups for p in group["params"]})
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SwitchTrainer, "training_step", spy)
    train(replace(options, lr=1e-3, lr_vision=4e-3, lr_language=5e-4, warmup=0.0, schedule="linear", steps=4))
    assert rates[0] == pytest.approx({"vision": 4e-3, "projector": 1e-3, "language": 5e-4})
    assert rates[2] == pytest.approx({"vision": 2e-3, "projector": 5e-4, "language": 2.5e-4})


def test_a_resumed_run_keeps_the_rates(options, monkeypatch, tmp_path):
    rated = replace(options, lr_vision=1e-2, lr_projector=2e-2)
    train(replace(rated, output=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        training.interrupt_after(patch, 5)
        with pytest.raises(training.Stop):
            train(rated)
    train(rated)
    training.assert_same_weights(weights(options.output), weights(tmp_path / "whole"))


def test_equal_rates_change_nothing(options, tmp_path):
    train(options)
    train(replace(options, lr_vision=options.lr, lr_language=options.lr, output=tmp_path / "split"))
    assert history(options.output) == history(tmp_path / "split")


def test_groups_are_split_without_losing_a_parameter():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in ("vision_tower", "lm_head")})
    outside = torch.nn.Parameter(torch.zeros(1))  # of a module beside the student
    optimizer = torch.optim.AdamW([{"params": [*model.parameters(), outside], "weight_decay": 0.1}], lr=1.0)
    set_part_rates(optimizer, model, {"vision": 3.0})
    found = [(len(group["params"]), group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(2, 3.0, 0.1), (2, 1.0, 0.1), (1, 1.0, 0.1)]


def test_a_batch_of_text_alone_does_no_harm_to_a_projector_stage(options, tmp_path):
    data = tiny.data(tmp_path / "text", tiny.rows(4, text_only=(0, 1, 2)))
    moved = replace(
        options, objective="sft", switch=False, teacher=None, cache=None, template="qa", train_parts="projector"
    )
    train(replace(moved, data=data, images=data.parent / "images", batch_size=1, steps=4))
    assert moved_parts(options.student, options.output) == {"projector"}


def longer(cached, folder):
    """Rows whose answers have 1 to 4 words, and their store."""
    rows = tiny.rows(8, text_only=(3,))
    for i, row in enumerate(rows):
        row["conversations"][-1]["value"] = " ".join(["red"] + ["a"] * (i % 4))
    data = tiny.data(folder, rows)
    cache_teacher(
        CacheOptions(teacher=cached, data=data, images=data.parent / "images", out=folder / "s.zarr", template="qa")
    )
    return data


@pytest.fixture
def unequal(options, teacher, tmp_path):
    data = longer(teacher, tmp_path / "unequal")
    return replace(
        options, data=data, images=data.parent / "images", cache=data.parent / "s.zarr", steps=2, mean="sample"
    )


def test_the_mean_over_samples_is_exact_under_accumulation(unequal, tmp_path):
    """Micro-batches of one sample with 2 to 5 positions each."""
    whole = replace(unequal, output=tmp_path / "whole")
    train(whole)
    small = replace(unequal, output=tmp_path / "small", batch_size=1, accumulation=4)
    train(small)
    for a, b in zip(history(whole.output), history(small.output), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    training.assert_same_weights(weights(whole.output), weights(small.output), rtol=1e-3, atol=1e-4)
    positions = replace(unequal, mean="position", output=tmp_path / "positions")
    train(positions)
    assert history(positions.output)[0][1] != pytest.approx(history(whole.output)[0][1], rel=1e-3)


@pytest.mark.slow
def test_the_mean_over_samples_is_exact_over_two_processes(unequal, tmp_path):
    train(replace(unequal, steps=4, batch_size=2))
    done = training.two_processes(unequal, tmp_path, steps=4, batch_size=1, mean="sample")
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(history(unequal.output), history(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    training.assert_same_weights(weights(unequal.output), weights(tmp_path / "two"), rtol=1e-3, atol=1e-4)


def test_the_command_line_resolves_a_stage_and_records_it(options, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"stage": "pt", "lr": 2e-3, "template": "qa"}))
    words = [
        "train",
        "--config",
        config,
        "--student",
        options.student,
        "--data",
        options.data,
        "--images",
        options.images,
    ]
    words += ["--output", options.output, "--steps", 2, "--warmup", 0.5]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    found = yaml.safe_load((options.output / "run.yaml").read_text())
    wanted = {"stage": "pt", "lr": 2e-3, "warmup": 0.5, "train_parts": "projector", "global_batch": 256}
    assert wanted.items() <= found.items()
    state = json.loads((options.output / "checkpoint-2/trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert moved_parts(options.student, options.output) == {"projector"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_parts": "eyes"}, f"no part 'eyes' to train; parts are {', '.join(PARTS)}"),
        ({"train_parts": ""}, "no part '' to train"),
        (
            {"train_parts": "projector"},
            "the switch pathway teaches the vision tower alone: add vision to --train-parts",
        ),
        (
            {"train_parts": "vision", "lr_language": 1.0},
            "--lr-language is given, but --train-parts vision leaves language",
        ),
        ({"global_batch": 6}, "global batch of 6 samples cannot be made of 1 device x 4 samples"),
        ({"global_batch": 8, "accumulation": 2}, "say the same thing twice"),
    ],
)
def test_contradictions_are_named_before_anything_runs(options, change, message):
    with pytest.raises(ConfigError, match=message):
        train(replace(options, **change))
    assert not options.output.exists()
