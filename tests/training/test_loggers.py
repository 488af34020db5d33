"""`train --log-to`: what reaches a logger, offline; a resumed run goes on in the logger's run that it began."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import training
import yaml
from training import Stop, flags_of, interrupt_after

from switchkd.errors import ConfigError
from switchkd.pipelines.training.loggers import require_loggers
from switchkd.pipelines.training.train import train
from switchkd.stores import TeacherStore

cached, options = training.cached, training.options

METRICS = {
    f"train/{name}"
    for name in (
        "loss", "loss_ce", "loss_align", "loss_vsd", "mfu", "tflops_per_second", "samples_per_second", "tokens_per_second",
        "wait_share", "knee_teacher_mean", "knee_student_p95", "padding_share", "learning_rate",
    )
}  # fmt: skip


def needs(*packages):
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"`make test-loggers` installs {', '.join(missing)}")


@needs("tensorboard")
def test_tensorboard_has_every_step_of_a_resumed_run_once(options, cached, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = replace(options, log_to=("tensorboard",), peak_tflops=0.1)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)  # the last checkpoint is that of step 4
        with pytest.raises(Stop):
            train(options)
    train(options)
    events = EventAccumulator(str(options.output / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) >= METRICS
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    logged = {entry["step"]: entry["loss"] for entry in training.logged(options.output)}
    told = {event.step: event.value for event in events.Scalars("train/loss")}
    assert told == pytest.approx(logged, rel=1e-6)
    (text,) = {bytes(tensor.tensor_proto.string_val[0]) for tensor in events.Tensors("switchkd/text_summary")}
    about = yaml.safe_load(text)
    assert about["made_from"]["store"] == TeacherStore.open(cached / "stores").manifest.identity
    assert about["objective"] == options.objective and about["student"] == str(options.student)


def test_without_loggers_nothing_is_imported_or_written(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    require_loggers(())
    train(replace(options, steps=1))
    assert not (options.output / "tensorboard").exists() and not (options.output / "logger.json").exists()


def run(folder, *flags, **environment):
    """Train by the command, as a user does; returns the finished process."""
    command = [sys.executable, "-c", "from switchkd.cli.main import main; main()", "train", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(folder)} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)


@pytest.mark.loggers
@needs("wandb")
def test_wandb_offline(options, cached, tmp_path):
    flags = [*flags_of(options, steps=3, peak_tflops=0.1), "--log-to", "wandb"]
    done = run(tmp_path, *flags, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    identity = json.loads((options.output / "logger.json").read_text())["id"]
    (file,) = options.output.glob(f"wandb/offline-run-*-{identity}/run-{identity}.wandb")
    records = records_of_wandb(file)
    (begun,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (begun.project, begun.run_id, begun.display_name) == ("switchkd", identity, f"run-{identity}")
    configs = [update for record in records for update in record.config.update] + list(begun.config.update)
    told = [json.loads(update.value_json) for update in configs if update.key == "switchkd"]
    assert told[0]["made_from"]["store"] == TeacherStore.open(cached / "stores").manifest.identity
    history = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    rows = [{".".join(item.nested_key) or item.key: item.value_json for item in row.item} for row in history]
    steps = [json.loads(row["train/global_step"]) for row in rows if "train/loss_ce" in row]
    assert steps == [1, 2, 3]
    assert {name for row in rows for name in row} >= METRICS


def records_of_wandb(file):
    """Return the records of an offline run's file: a log in blocks of 32 KiB as LevelDB writes it, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, found, begun = file.read_bytes(), 7, [], b""
    while at < len(content):
        if (left := -at % 32768) < 7:  # no room for another head in this block
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        begun, at = begun + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(wandb_internal_pb2.Record.FromString(begun))
            begun = b""
    return found


@pytest.mark.loggers
@needs("wandb")
@pytest.mark.parametrize(("key", "message"), [(None, "needs an account: run `wandb login`"), ("short", "must have 40")])
def test_wandb_without_an_account_is_refused_first(options, tmp_path, key, message):
    environment = {"WANDB_MODE": "online", "NETRC": str(tmp_path / "none")} | ({"WANDB_API_KEY": key} if key else {})
    done = run(tmp_path, *flags_of(options), "--log-to", "wandb", **environment)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not options.output.exists()


@pytest.mark.loggers
@needs("trackio")
def test_trackio_on_this_disk(options, cached, tmp_path):
    folder = tmp_path / "trackio"
    flags = [*flags_of(options, steps=3, peak_tflops=0.1), "--log-to", "trackio"]
    done = run(tmp_path, *flags, TRACKIO_DIR=str(folder))
    assert done.returncode == 0, done.stderr
    identity = json.loads((options.output / "logger.json").read_text())["id"]
    reading = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as s; "
        "print(json.dumps([s.get_projects(), s.get_runs('switchkd'), s.get_logs('switchkd', sys.argv[1]), "
        "s.get_run_config('switchkd', sys.argv[1])]))"
    )
    command = [sys.executable, "-c", reading, f"run-{identity}"]
    read = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRACKIO_DIR": str(folder)})
    projects, runs, logs, config = json.loads(read.stdout.splitlines()[-1])
    assert (projects, runs) == (["switchkd"], [f"run-{identity}"])
    assert [log["train/global_step"] for log in logs if "train/loss_ce" in log] == [1, 2, 3]
    assert {name for log in logs for name in log} >= METRICS
    assert config["switchkd"]["made_from"]["store"] == TeacherStore.open(cached / "stores").manifest.identity


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(
        ConfigError, match=r"--log-to trackio needs the package trackio.*pip install 'switchkd\[loggers\]'"
    ):
        require_loggers(("trackio",))


def test_the_option_in_a_file_and_several_times(options, tmp_path):
    """A single word in YAML is one logger; unknown ones are refused with those that there are."""
    import click

    from switchkd.cli.main import main

    (tmp_path / "c.yaml").write_text("log-to: neptune\n")
    with pytest.raises(click.ClickException) as caught:
        main(["train", "--config", str(tmp_path / "c.yaml"), *flags_of(options)], standalone_mode=False)
    assert "'neptune' is not one of 'tensorboard', 'wandb', 'trackio'" in caught.value.format_message()
    with pytest.raises(ConfigError, match="log_to is one of tensorboard, wandb, trackio, got 'neptune'"):
        replace(options, log_to=("neptune",))


@pytest.mark.slow
@needs("tensorboard")
def test_one_process_of_two_sends(options, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = training.two_processes(options, tmp_path, steps=2, batch_size=2, log_to="tensorboard")
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "two/tensorboard").iterdir()
    events = EventAccumulator(str(file)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
