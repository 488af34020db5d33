"""Several processes, accumulation and loader workers: the same losses and weights as one process, in every profile."""

import importlib.util
import json
import re
from dataclasses import replace

import pytest
import training
from training import assert_equal_runs, history, two_processes
from transformers import LlavaForConditionalGeneration

from switchkd.errors import ConfigError
from switchkd.pipelines.training.parallelism import check_processes, profile_arguments, require_checkpoint
from switchkd.pipelines.training.train import train

cached, hidden, options = training.cached, training.hidden, training.options


def test_gradient_accumulation_equals_one_large_batch(options, tmp_path):
    """The mean is over the positions of the whole accumulated batch, though micro-batches hold unequal numbers of them."""
    train(options)
    small = replace(options, output=tmp_path / "small", batch_size=2, accumulation=2)
    train(small)
    assert_equal_runs(options.output, small.output)


def test_loader_workers_do_not_change_the_run(options, tmp_path):
    train(options)
    parallel = replace(options, output=tmp_path / "parallel", workers=2)
    train(parallel)
    assert history(options.output) == history(parallel.output)


def test_two_processes_equal_one_with_the_same_global_batch(options, tmp_path):
    """One sample at a time: micro-batches are of unequal length, and one is of text alone while the other process sees images."""
    train(replace(options, steps=3, batch_size=4))
    done = two_processes(options, tmp_path, steps=3, batch_size=1, accumulation=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_runs(options.output, tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("profile", ("ddp", "fsdp"))
@pytest.mark.parametrize("source", ("topk", "hidden", "live"))
def test_every_source_of_the_teachers_word_is_the_same_over_two_processes(options, hidden, tmp_path, profile, source):
    changed = {
        "topk": {},
        "hidden": {"cache": hidden},
        "live": {"cache": None, "teacher_mode": "live", "template": "qa"},
    }[source]
    train(replace(options, steps=4, batch_size=4, **changed))
    done = two_processes(options, tmp_path, steps=4, batch_size=2, profile=profile, **changed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_runs(options.output, tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "profile"),
    [("adapter", "ddp"), ("adapter", "fsdp"), ("llava-kd", "ddp"), ("align-kd", "ddp")],
)
def test_what_joins_the_student_is_the_same_over_two_processes(options, tmp_path, profile, what):
    live = {"teacher_mode": "live", "cache": None, "template": "qa"}
    changed = {"switch_adapter": "linear"} if what == "adapter" else {"objective": what, "switch": False} | live
    train(replace(options, steps=4, batch_size=4, **changed))
    done = two_processes(options, tmp_path, steps=4, batch_size=2, profile=profile, **changed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal_runs(options.output, tmp_path / "two")


SHARES = """
import os
from torch.distributed.tensor import DTensor
from switchkd.pipelines.training.trainer import SwitchTrainer
whole = SwitchTrainer.training_step
def looking(self, *args, **kwargs):
    for who, model in (("student", self.model), ("teacher", self.teacher)):
        here = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())
        share = here / sum(p.numel() for p in model.parameters())
        os.write(1, f"process {self.args.process_index} {who} {share:.3f}\\n".encode())
    return whole(self, *args, **kwargs)
SwitchTrainer.training_step = looking
"""


def test_fsdp_equals_one_process_shares_out_both_models_and_writes_ordinary_checkpoints(options, tmp_path):
    """One sample at a time, as above: processes gather layers together, also where one of them has no image."""
    train(replace(options, steps=3, batch_size=4))
    changed = {"steps": 3, "batch_size": 1, "accumulation": 2, "profile": "fsdp"}
    done = two_processes(options, tmp_path, prelude=SHARES, **changed)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "two"
    assert_equal_runs(options.output, run)
    shares = {tuple(w[1:3]): float(w[3]) for line in done.stdout.splitlines() if (w := line.split())[:1] == ["process"]}
    assert set(shares) == {(process, who) for process in "01" for who in ("student", "teacher")}
    for (_, who), share in shares.items():
        # The teacher's embedding and projector stay whole, about a fifth of this tiny one.
        assert share < (0.52 if who == "student" else 0.7), shares
    for folder in (run, run / "checkpoint-3"):
        opened, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not report["unexpected_keys"] and not set(report["missing_keys"]) - {"lm_head.weight"}
        assert type(opened).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    assert {file.suffix for file in run.rglob("*") if file.is_file()} <= {".json", ".safetensors", ".yaml", ".png"}


DYING = """
import os
from switchkd.pipelines.training.trainer import SwitchTrainer
step = SwitchTrainer.training_step
def dying(self, *args, **kwargs):
    if self.state.global_step == 3: os._exit(9)
    return step(self, *args, **kwargs)
SwitchTrainer.training_step = dying
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp", "one"),
        pytest.param("one", "ddp", marks=pytest.mark.slow),
        pytest.param("ddp", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_other_processes(options, monkeypatch, tmp_path, before, after):
    """2 → 1, 1 → 2 and replicated → sharded: the undisturbed run of one process, though each is started with other batch sizes.

    Losses are equal to 1e-5 only if every step sees the same samples, and Adam's moments and the schedule went along.
    """
    whole = replace(options, output=tmp_path / "whole", steps=6)
    train(whole)
    run = replace(options, output=tmp_path / "two", steps=6, save_every=1)
    if before == "one":
        training.interrupt_after(monkeypatch, 3)
        with pytest.raises(training.Stop):
            train(run)
        monkeypatch.undo()
    else:
        done = two_processes(run, tmp_path, prelude=DYING, batch_size=2, save_every=1, profile=before)
        assert done.returncode == 1, done.stderr[-3000:]
    if after == "one":
        train(replace(run, batch_size=2))  # the accumulation that is missing is found
    else:
        done = two_processes(run, tmp_path, batch_size=1, save_every=1, profile=after)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "accumulation 2: a step of this run has 4 samples" in done.stderr
    assert_equal_runs(tmp_path / "whole", tmp_path / "two")


@pytest.mark.slow
def test_zero3_equals_one_process_and_goes_on(options, tmp_path):
    """With DeepSpeed itself, on CPUs over gloo; one sample at a time, as above."""
    pytest.importorskip("deepspeed", reason="--profile zero3 needs the extra deepspeed")
    train(options)
    for prelude, code in ((DYING, 1), ("", 0)):
        done = two_processes(
            options, tmp_path, prelude=prelude, batch_size=1, accumulation=2, save_every=1, profile="zero3"
        )
        assert done.returncode == code, done.stderr[-3000:]
    assert "resuming from" in done.stderr
    assert_equal_runs(options.output, tmp_path / "two")
    for folder in (tmp_path / "two", tmp_path / "two/checkpoint-6"):
        _, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not report["unexpected_keys"] and not set(report["missing_keys"]) - {"lm_head.weight"}


def test_deepspeeds_checkpoints_go_on_as_they_were_written(tmp_path):
    for process in range(2):
        (tmp_path / f"rng_{process}.json").touch()
    require_checkpoint("fsdp", tmp_path, 4)
    with pytest.raises(ConfigError, match="written with --profile ddp or fsdp, zero3 cannot read it"):
        require_checkpoint("zero3", tmp_path, 2)
    (tmp_path / "latest").touch()
    require_checkpoint("zero3", tmp_path, 2)
    with pytest.raises(ConfigError, match="written with --profile zero3, ddp cannot read it: pass --profile zero3"):
        require_checkpoint("ddp", tmp_path, 2)
    with pytest.raises(ConfigError, match="by 2 processes, and only as many can read it, not 4"):
        require_checkpoint("zero3", tmp_path, 4)


def test_a_run_keeps_its_global_batch(options, monkeypatch):
    training.interrupt_after(monkeypatch, 5)
    with pytest.raises(training.Stop):
        train(options)
    with pytest.raises(ConfigError, match="global batch of 4 samples cannot be made of 1 device x 3 samples"):
        train(replace(options, batch_size=3))
    with pytest.raises(
        ConfigError, match=r"begun with 4 samples a step; 1 process x batch size 4 x accumulation 3 make 12"
    ):
        train(replace(options, accumulation=3))
    with pytest.raises(ConfigError, match="global_batch: run 4, now 8"):
        train(replace(options, global_batch=8))


def test_a_sharding_profile_is_refused_where_it_cannot_run(options, monkeypatch):
    with pytest.raises(ConfigError, match=r"--profile fsdp shares one model among processes: start it with `torchrun"):
        train(replace(options, profile="fsdp"))
    with pytest.raises(ConfigError, match="profile is one of ddp, fsdp, zero3, got 'tp'"):
        train(replace(options, profile="tp"))
    assert not options.output.exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'switchkd\[deepspeed\]'"):
        profile_arguments("zero3", {"LOCAL_RANK": "0"})


LAUNCHED = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1", "WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    ("environment", "devices", "message"),
    [
        (LAUNCHED, 4, "torchrun started 8 processes on a machine with 4 GPUs: pass --nproc-per-node 4"),
        (
            LAUNCHED | {"SLURM_JOB_NUM_NODES": "2"},
            8,
            "Slurm gave this job 2 nodes, and torchrun started on 1: put `srun`",
        ),
        (
            LAUNCHED | {"SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_NUM_NODES": "2"},
            8,
            "Slurm runs this step on 2 nodes, and torchrun was told of 1: pass it --nnodes",
        ),
        (
            LAUNCHED | {"GROUP_WORLD_SIZE": "4", "SLURM_JOB_NUM_NODES": "4", "SLURM_STEP_NUM_NODES": "2"},
            8,
            "this step on 2 nodes, and torchrun was told of 4",
        ),
        ({"SLURM_STEP_NUM_NODES": "2"}, 1, "on 2 nodes, and each would train the same run alone"),
    ],
)
def test_processes_that_are_not_those_of_the_job_are_refused(options, monkeypatch, environment, devices, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_processes(environment, devices)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(options)
    assert not options.output.exists()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        LAUNCHED,
        LAUNCHED | {"GROUP_WORLD_SIZE": "2", "SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_NUM_NODES": "2"},
        LAUNCHED | {"SLURM_JOB_NUM_NODES": "4", "SLURM_STEP_NUM_NODES": "1"},
        {"SLURM_JOB_NUM_NODES": "2"},
    ],
)
def test_processes_of_the_job_are_taken(environment):
    for devices in (0, 8):
        check_processes(environment, devices)


def test_a_world_size_that_does_not_divide_the_global_batch_is_refused(options, monkeypatch):
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"a global batch of 48 samples cannot be made of 8 devices x 4 samples"):
        train(replace(options, global_batch=48))
    assert not options.output.exists()
