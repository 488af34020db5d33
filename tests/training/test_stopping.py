"""Signals of schedulers, checkpoints by the clock, and one run for each output folder."""

import errno
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import training
from training import RUN, assert_same_weights, flags_of, history, interrupt_after, weights

from switchkd.errors import ConfigError, Stopped
from switchkd.pipelines.training.lifecycle import begun, lock, sealed, stopping
from switchkd.pipelines.training.train import train
from switchkd.pipelines.training.trainer import SwitchTrainer

cached, options = training.cached, training.options


def steps_of(run):
    return [begun.step_of(path) for path in begun.checkpoints(run)]


def signal_in_step(monkeypatch, step, *numbers):
    original = SwitchTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SwitchTrainer, "training_step", training_step)


@pytest.mark.parametrize(
    ("workers", "numbers"),
    [
        (0, (signal.SIGTERM,)),
        (1, (signal.SIGUSR1,)),
        (0, (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)),
    ],
)
def test_a_signal_saves_the_step_and_ends_the_run(options, monkeypatch, tmp_path, numbers, workers):
    """Repeated signals too, as from a scheduler and a launcher; then the same command reaches the same weights."""
    options = replace(options, save_every=500, workers=workers)
    whole = replace(options, output=tmp_path / "whole")
    train(whole)
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with monkeypatch.context() as patch:
        signal_in_step(patch, 3, *numbers)
        with pytest.raises(Stopped, match=r"after step 3, which is saved in .*run; run the same command again") as stop:
            train(options)
    assert stop.value.exit_code == 143
    assert steps_of(options.output) == [3] and not (options.output / "summary.json").exists()
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    train(options)
    assert history(options.output) == history(whole.output)
    assert_same_weights(weights(options.output), weights(whole.output))


def test_a_signal_in_the_last_step_changes_nothing(options, monkeypatch):
    signal_in_step(monkeypatch, 6, signal.SIGTERM)
    assert train(options).steps == 6


def test_a_signal_before_the_first_step_ends_the_run_at_once(options, monkeypatch):
    from switchkd.pipelines.training import train as module

    monkeypatch.setattr(module, "open_inputs", lambda _: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(9))
    with pytest.raises(Stopped, match="stopped by SIGTERM before a step was done"):
        train(options)
    assert not options.output.exists()


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGUSR1))
def test_the_command_line_ends_with_143(options, number):
    """With loader processes that get the signal too, as from a scheduler that signals every process of a job."""
    command = [sys.executable, "-c", RUN, "train", *flags_of(options, steps=100_000, workers=1)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    )
    while process.poll() is None and not begun.checkpoints(options.output):
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 143, errors[-3000:]
    last = errors.splitlines()[-1]
    assert last.startswith(f"Error: stopped by {number.name} after step ") and "Traceback" not in errors
    newest = begun.checkpoints(options.output)[0]
    assert f"after step {begun.step_of(newest)}, " in last
    assert sealed.damage_of(newest, sealed=True) is None
    assert not (options.output / ".lock").exists()


def test_a_failed_run_leaves_no_loader_that_its_process_would_wait_for(options, tmp_path):
    """An error whose traceback is kept, as debuggers and test runners do, holds the loader and its processes."""
    script = tmp_path / "failing.py"
    script.write_text(
        "import pickle, sys, torch\n"
        "from switchkd.pipelines.training.train import train\n"
        "from switchkd.pipelines.training.trainer import SwitchTrainer\n"
        "step = SwitchTrainer.training_step\n"
        "def failing(self, *args, **kwargs):\n"
        "    if self.state.global_step == 2: raise ValueError('in a step')\n"
        "    return step(self, *args, **kwargs)\n"
        "SwitchTrainer.training_step = failing\n"
        "try:\n"
        "    train(pickle.load(open(sys.argv[1], 'rb')))\n"
        "except ValueError as error:\n"
        "    kept = error\n"
        "import multiprocessing\n"
        "print(kept, len(multiprocessing.active_children()))\n"
    )
    (tmp_path / "options").write_bytes(pickle.dumps(replace(options, workers=2, steps=30)))
    command = [sys.executable, script, tmp_path / "options"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "in a step 2"
    assert "Traceback" not in done.stderr, done.stderr[-3000:]


def test_processes_of_the_program_itself_end_as_they_would_without_switchkd(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import multiprocessing, signal, sys, time\n"
        "import switchkd.pipelines.training.lifecycle.stopping\n"
        "def clean(*_):\n"
        "    open(sys.argv[1], 'w').close()\n"
        "    sys.exit()\n"
        "def work(ready):\n"
        "    signal.signal(signal.SIGTERM, clean)\n"
        "    ready.set()\n"
        "    time.sleep(100)\n"
        "ready = multiprocessing.get_context('fork').Event()\n"
        "multiprocessing.get_context('fork').Process(target=work, args=(ready,), daemon=True).start()\n"
        "ready.wait()\n"
    )
    subprocess.run([sys.executable, script, tmp_path / "cleaned"], check=True, timeout=60)
    assert (tmp_path / "cleaned").exists()


def test_all_processes_stop_after_the_same_step(options, tmp_path):
    """One of two gets the signal; and both go on from what they saved."""
    send = (
        "import os, signal\nfrom switchkd.pipelines.training.trainer import SwitchTrainer\n"
        "step = SwitchTrainer.training_step\n"
        "def training_step(self, *args, **kwargs):\n"
        "    if self.state.global_step == 2 and self.args.process_index == 1: os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    return step(self, *args, **kwargs)\n"
        "SwitchTrainer.training_step = training_step\n"
    )
    done = training.two_processes(options, tmp_path, prelude=send, batch_size=2)
    assert done.returncode == 1, done.stderr[-3000:]  # torchrun's own
    assert steps_of(tmp_path / "two") == [3]
    assert "after step 3, which is saved in" in done.stderr and "exitcode  : 143" in done.stderr, done.stderr[-3000:]
    done = training.two_processes(options, tmp_path, batch_size=2)
    assert done.returncode == 0, done.stderr[-3000:]
    train(options)
    training.assert_equal_runs(options.output, tmp_path / "two")


class Clock:
    """Time that passes at one minute a step."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(stopping.time, "monotonic", lambda: self.now)
        original = SwitchTrainer.training_step

        def training_step(trainer, *args, **kwargs):
            self.now += 60
            return original(trainer, *args, **kwargs)

        monkeypatch.setattr(SwitchTrainer, "training_step", training_step)


@pytest.mark.parametrize(
    ("minutes", "every", "saved"),
    [
        (2.5, 500, [3, 6, 7]),
        (1, 500, [1, 2, 3, 4, 5, 6, 7]),
        (3, 2, [2, 4, 6, 7]),  # a checkpoint by steps begins the minutes anew
        (None, 500, [7]),
    ],
)
def test_checkpoints_by_the_clock(options, monkeypatch, minutes, every, saved):
    found, commit = [], sealed.commit

    def committing(run, name, keep):
        found.append(int(name.removeprefix("checkpoint-")))
        commit(run, name, keep)

    monkeypatch.setattr(sealed, "commit", committing)
    Clock(monkeypatch)
    train(replace(options, steps=7, save_every=every, save_minutes=minutes))
    assert found == saved
    assert steps_of(options.output) == saved[::-1][:2]


def test_the_minutes_may_change_when_a_run_goes_on(options, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(training.Stop):
            train(replace(options, save_minutes=10))
    train(replace(options, save_minutes=None))


def test_a_second_run_in_one_folder_is_refused(options, tmp_path):
    """While the first goes on, in another process; after that was killed, the folder is free, with loader processes too."""
    command = [sys.executable, "-c", RUN, "train", *flags_of(options, steps=100_000, workers=1)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None and not begun.checkpoints(options.output):
            time.sleep(0.05)
        holder = json.loads((options.output / ".lock").read_text())
        with pytest.raises(ConfigError) as refused:
            train(replace(options, steps=100_000))
        assert f"still going, process {process.pid} on {holder['host']}: wait" in str(refused.value)
        assert refused.value.exit_code == 2
    finally:
        process.kill()
        process.wait()
    with lock.one_run(options.output, True):
        assert json.loads((options.output / ".lock").read_text())["pid"] == os.getpid()


def test_a_lock_leaves_nothing_behind(tmp_path):
    with lock.one_run(tmp_path / "a/b", True):
        pass
    assert not (tmp_path / "a").exists()
    with lock.one_run(tmp_path / "a/b", True):
        (tmp_path / "a/b/kept").touch()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["kept"]
    with lock.one_run(tmp_path / "a/b", True), lock.one_run(tmp_path / "a/b", False):
        pass  # the other processes of one run
    with (
        lock.one_run(tmp_path / "a/b", True),
        pytest.raises(ConfigError, match="still going"),
        lock.one_run(tmp_path / "a/b", True),
    ):
        pass


@pytest.mark.parametrize("content", ("", "{", "[]", "null", '{"pid": 3}'))
def test_a_holder_that_is_not_known_is_not_named(tmp_path, content):
    handle = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    (tmp_path / ".lock").write_text(content)
    with pytest.raises(ConfigError, match="whose process is not known"), lock.one_run(tmp_path, True):
        pass
    os.close(handle)


@pytest.mark.parametrize("number", sorted(lock.UNSUPPORTED))
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.one_run(tmp_path, True):
        assert "cannot be locked" in caplog.text


def test_an_output_that_cannot_be_written_is_refused(options, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ConfigError, match="--output .* cannot be written"):
            train(replace(options, output=output))

    def mkdir(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(type(tmp_path), "mkdir", mkdir)
    with pytest.raises(ConfigError, match="Read-only file system"):
        train(options)
