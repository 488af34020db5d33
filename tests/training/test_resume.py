"""Runs that stop and go on: the same losses and weights, and nothing bad in a checkpoint."""

import pickletools
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import training
from safetensors import SafetensorError
from safetensors.torch import load_file
from training import RUN, Stop, assert_same_weights, flags_of, history, interrupt_after, weights

from switchkd.errors import CheckpointError, ConfigError, RunError
from switchkd.pipelines.training.lifecycle import checkpointing, sealed
from switchkd.pipelines.training.train import train

cached, hidden, options = training.cached, training.hidden, training.options


def test_nothing_that_is_written_is_a_pickle(options):
    train(options)
    for file in options.output.rglob("*"):
        if file.is_file():
            assert file.suffix in {".json", ".safetensors", ".yaml", ".jinja", ".png"}, file
            data = file.read_bytes()
            assert not data.startswith(b"PK"), file  # a torch archive
            with pytest.raises((ValueError, UnicodeDecodeError, IndexError)):
                list(pickletools.genops(data))


def test_a_finished_run_returns_at_once(options):
    first, again = train(options), train(options)
    assert not first.already_finished
    assert again.already_finished
    assert again.losses == first.losses


def test_other_options_for_the_same_output_are_refused(options):
    train(options)
    with pytest.raises(ConfigError, match=r"begun with other options:\n  lr: run 0.005, now 0.1"):
        train(replace(options, lr=0.1, log_every=3))


def test_a_resumed_run_equals_an_undisturbed_one(options, monkeypatch, tmp_path):
    whole = replace(options, output=tmp_path / "whole")
    train(whole)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Stop):
            train(options)
    assert (options.output / "checkpoint-4").is_dir()
    # A checkpoint that was being written when the process died is passed over.
    torn = shutil.copytree(options.output / "checkpoint-4", options.output / "checkpoint-5")
    (torn / "trainer_state.json").write_text("{")
    train(options)
    assert history(options.output) == history(whole.output)
    assert_same_weights(weights(options.output), weights(whole.output))
    assert_same_weights(
        load_file(options.output / "checkpoint-6/optimizer.safetensors"),
        load_file(whole.output / "checkpoint-6/optimizer.safetensors"),
    )


def test_interrupted_training_says_how_to_go_on(options):
    """Ctrl-C; a scheduler's signals are in test_stopping.py."""
    command = [sys.executable, "-c", RUN, "train", *flags_of(options, steps=100_000)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while process.poll() is None and sealed.last_checkpoint(options.output) is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-2000:]
    assert errors.splitlines()[-1] == "Error: interrupted; run the same command again to go on where it stopped"
    assert "Traceback" not in errors


def test_killed_training_goes_on(options, tmp_path):
    """SIGKILL in the middle of a real process, then the same command."""
    whole = replace(options, output=tmp_path / "whole", steps=8)
    train(whole)
    flags = flags_of(options, steps=8)
    kill = (
        "import os, signal\n"
        "from switchkd.pipelines.training.lifecycle import checkpointing\n"
        "save = checkpointing.save\n"
        "def dying(folder, *rest):\n"
        "    if folder.name == 'checkpoint-6': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    save(folder, *rest)\n"
        "checkpointing.save = dying\n"
    )
    killed = subprocess.run([sys.executable, "-c", kill + RUN, "train", *flags], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert sealed.last_checkpoint(options.output).name == "checkpoint-4"
    again = subprocess.run([sys.executable, "-c", RUN, "train", *flags], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "checkpoint-4" in again.stderr
    assert history(options.output) == history(whole.output)
    assert_same_weights(weights(options.output), weights(whole.output))


def test_a_checkpoint_without_a_weight_is_refused(options, monkeypatch):
    interrupt_after(monkeypatch, 5)
    with pytest.raises(Stop):
        train(options)
    file = options.output / "checkpoint-4/model.safetensors"
    (file.parent / sealed.FILES).unlink()  # as an earlier version wrote it
    record = options.output / "run.yaml"
    record.write_text(record.read_text().replace("checkpoints_have_digests: true\n", ""))
    found = weights(file.parent)
    gone = next(name for name in found if "down_proj" in name)
    from safetensors.torch import save_file

    save_file({name: tensor for name, tensor in found.items() if name != gone}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 weights, the first is .*down_proj"):
        train(options)


def test_a_full_disk_names_the_last_good_checkpoint(options, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    save = checkpointing.save
    monkeypatch.setattr(checkpointing, "save", lambda f, *rest: save(f, *rest) if f.name == "checkpoint-2" else full())
    with pytest.raises(
        RunError, match=r"No space left on device. Make room\nThe last good checkpoint: .*checkpoint-2\. The same"
    ):
        train(options)
