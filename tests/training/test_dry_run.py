"""`train --dry-run`: the plan of the run, its figures beside those of the run itself, and nothing written."""

import re
from dataclasses import replace
from pathlib import Path

import families
import pytest
import tiny
import training
from click.testing import CliRunner
from safetensors.torch import load_file
from training import logged

from switchkd.cli.main import main
from switchkd.errors import ConfigError
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.training.dry_run import plan
from switchkd.pipelines.training.train import train
from switchkd.pipelines.training.trainer import SwitchTrainer

cached, options = training.cached, training.options


def tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def told(caplog) -> list[str]:
    """The plan, without the lines about what a run does besides it."""
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    first = next(n for n, line in enumerate(lines) if line.startswith("objective"))
    last = next(n for n, line in enumerate(lines) if line.startswith("memory, estimated"))
    return lines[first : last + 1]


CASES = {
    "switch": {},
    "sft": {"objective": "sft", "switch": False},
    "without switch": {"switch": False},
    "live": {"teacher_mode": "live", "template": "qa"},
    "packed, checkpointed": {"packing": 36, "student_checkpointing": True, "teacher_checkpointing": True},
    "parts": {"train_parts": "vision,projector", "precision": "bfloat16"},
    "adapter": {"switch_adapter": "mlp"},
    "baseline": {"objective": "llava-kd", "switch": False, "teacher_mode": "live", "template": "qa"},
    "LoRA": {"lora": 4, "packing": 36, "precision": "bfloat16"},
    "switch alone": {"objective": "switch-ce", "cache": None, "template": "qa"},
    "grouped": {"group_by": "modality-length", "accumulation": 2, "batch_size": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_that_of_the_run(options, case, caplog, monkeypatch):
    def stop(self, **_):
        raise training.Stop

    monkeypatch.setattr(SwitchTrainer, "train", stop)
    options = replace(options, **CASES[case])
    with caplog.at_level("INFO", logger="switchkd"):
        plan(options, 1)
        planned = told(caplog)
        assert not options.output.exists()
        with pytest.raises(training.Stop):
            train(options)
    assert planned == told(caplog)


@pytest.mark.parametrize("case", ["packed, checkpointed", "grouped", "live, without switch"])
def test_flops_and_checkpoints_are_those_of_the_run(options, case):
    changed = CASES.get(case, {"teacher_mode": "live", "template": "qa", "switch": False})
    options = replace(options, **changed, log_every=6, steps=3)  # one epoch of the twelve samples
    found = plan(options, 1)
    assert found.probed_samples == 12 and found.steps == 3 and found.has_store
    train(options)
    (entry,) = logged(options.output)
    measured = entry["tflops_per_second"] * entry["seconds"] * 1e12 / 3
    # A run computes once what all rows begin with, on the switch pathway, and does not count what is computed again.
    assert measured <= found.step_flops * (1 + 1e-9)
    assert measured == pytest.approx(found.step_flops, rel=0.2 if options.switch else 1e-9)
    assert bool(found.recomputed_flops) == options.student_checkpointing
    files = [options.output / "checkpoint-3" / f"{name}.safetensors" for name in ("model", "optimizer")]
    tensors = [tensor for file in files for tensor in load_file(file).values()]
    counters = sum(t.ndim == 0 for t in tensors)  # Adam's, of each parameter
    assert found.checkpoint_bytes == sum(t.nbytes for t in tensors) - 4 * counters
    assert found.student_bytes == sum(t.nbytes for t in training.weights(options.output).values())
    kept = len(list(options.output.glob("checkpoint-*")))
    assert kept <= found.checkpoints - 1 and found.disk_bytes == 3 * found.checkpoint_bytes + found.student_bytes


def test_a_plan_before_there_is_a_store_is_that_of_the_run_with_it(options, tmp_path):
    store = tmp_path / "stores/h.zarr"
    cache_teacher(CacheOptions(options.teacher, options.data, store, options.images, template="qa", payload="hidden"))
    before, after = plan(replace(options, cache=None, template="qa"), 1), plan(replace(options, cache=store), 1)
    assert not before.has_store and after.has_store
    for field in ("steps", "step_flops", "recomputed_flops", "probed_samples", "disk_bytes"):
        assert getattr(before, field) == getattr(after, field), field
    # Lengths are estimated from characters until a store records them, and with them the activations of the longest batch.
    of_lengths = {"activations": 0, "loss": 0}
    assert before.memory | of_lengths == after.memory | of_lengths
    assert before.memory["activations"] == pytest.approx(after.memory["activations"], rel=0.3)


def test_memory_and_hours_follow_the_devices(options):
    one, eight = (plan(replace(options, profile="fsdp", global_batch=32), devices) for devices in (1, 8))
    for kind in ("student", "gradients", "optimizer"):
        assert eight.memory[kind] == pytest.approx(one.memory[kind] / 8)
    assert one.step_flops == pytest.approx(eight.step_flops)
    assert one.hours(100) == pytest.approx(8 * eight.hours(100)) and one.hours(100, 1.0) < one.hours(100)


@pytest.mark.parametrize("family", ["qwen2_5_vl", pytest.param("internvl", marks=pytest.mark.families)])
def test_a_plan_of_another_family_needs_no_weights(family, tmp_path):
    data = tiny.data(tmp_path, tiny.rows(6))
    teacher, student = (families.write_checkpoint(family, tmp_path / name, n) for n, name in enumerate("ts"))
    for folder in (teacher, student):
        (folder / "model.safetensors").unlink()
    before = tree(tmp_path)
    done = CliRunner().invoke(
        main,
        ["train", "--dry-run", "--teacher", str(teacher), "--student", str(student), "--data", str(data), "--images",
         str(tmp_path / "images"), "--output", str(tmp_path / "run"), "--devices", "8", "--peak-tflops", "989",
         "--profile", "fsdp", "--batch-size", "1", "--global-batch", "16"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert tree(tmp_path) == before
    assert "1 of 16 samples on 8 devices" in done.output and "of 989 TFLOP/s a device" in done.output
    assert "store    to be made" in done.output and "nothing was written at" in done.output
    assert re.search(r"disk +about [\d.]+ MB: 3 checkpoints of", done.output)


def test_what_a_plan_refuses(options, monkeypatch):
    with pytest.raises(ConfigError, match="cannot be made of 3 devices x 4 samples"):
        plan(replace(options, global_batch=32), 3)
    with pytest.raises(ConfigError, match="pass --cache or --teacher"):
        plan(replace(options, cache=None, teacher=None, switch=False), 1)
    given = ["train", "--student", str(options.student), "--data", str(options.data), "--output", "o", "--devices", "8"]
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 2 and "--devices is for --dry-run" in done.output
    monkeypatch.setenv("LOCAL_RANK", "0")
    done = CliRunner().invoke(main, [*given, "--dry-run"])
    assert done.exit_code == 2 and "leave out torchrun" in done.output
