"""Long waits say what they are for, and short ones nothing; progress has a line after two seconds, and a time left."""

import logging
import re
import time
from types import SimpleNamespace

import pytest

from switchkd import waits
from switchkd.fingerprints import hash_weights
from switchkd.pipelines import progress as progress_module
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.training.run_log import RunReport
from switchkd.waits import Waiting, duration


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A hundredth of each second."""
    for module, names in ((waits, ("FIRST_SECONDS", "NEXT_SECONDS")), (progress_module, ("FIRST_SECONDS",))):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name) / 100)


def until(there):
    """Wait until something is there, as long as a loaded machine may need."""
    end = time.monotonic() + 20
    while not there() and time.monotonic() < end:
        time.sleep(0.005)
    assert there()


def test_a_long_wait_says_what_it_is_how_much_is_left_and_how_long_it_took(caplog):
    caplog.set_level(logging.INFO, "switchkd")
    with Waiting("hashing the weights of T") as wait:
        until(lambda: len(caplog.messages) == 1)
        wait.share = 0.25
        until(lambda: len(caplog.messages) >= 2)
    assert caplog.messages[0].startswith("hashing the weights of T …")
    assert re.fullmatch(r"hashing the weights of T: 25%, \d+ seconds? left", caplog.messages[1])
    assert re.fullmatch(r"hashing the weights of T: done in \d+ seconds?", caplog.messages[-1])


def test_a_short_wait_says_nothing(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "switchkd")
    monkeypatch.setattr(waits, "FIRST_SECONDS", 1000)
    with Waiting("hashing"):
        pass
    assert caplog.messages == []


def test_a_wait_that_fails_is_not_called_done(caplog):
    caplog.set_level(logging.INFO, "switchkd")

    def fail():
        with Waiting("loading"):
            until(lambda: caplog.messages)
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert not any("done" in message for message in caplog.messages)


def test_hashing_weights_reports_its_share_and_does_not_change_them(teacher, monkeypatch):
    seen = []

    class Recording(Waiting):
        def __setattr__(self, name, value):
            if name == "share" and value is not None:
                seen.append(value)
            super().__setattr__(name, value)

    before = hash_weights(teacher)
    monkeypatch.setattr("switchkd.fingerprints.Waiting", Recording)
    assert hash_weights(teacher) == before
    assert seen and min(seen) > 0 and 0.9 < max(seen) <= 1


def test_progress_has_a_line_before_anything_is_done(capsys):
    with Progress("checking samples", 2000, "samples") as progress:
        said = []
        until(lambda: said.append(capsys.readouterr().err) or "".join(said))
        assert "".join(said) == "checking samples: 0/2,000 samples\n"
        progress.advance(1000)
    assert re.fullmatch(
        r"checking samples: 1,000/2,000 samples, [\d,.]+ samples/s, \d+ seconds? left\n", capsys.readouterr().err
    )


def test_slow_work_has_a_time_for_each_and_readable_times_left(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = Progress("table3", 13, "cells", done=1, bar=False)
    now[0] = 1200.0
    progress.advance(2, note="a cell: accuracy 0.5")
    assert capsys.readouterr().err == "table3: 3/13 cells, 10 minutes each, 100 minutes left, a cell: accuracy 0.5\n"


def test_training_tells_the_time_left_before_its_first_logging_interval(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    report = RunReport(samples=100, samples_per_step=10)
    state = SimpleNamespace(max_steps=1000, global_step=0, is_world_process_zero=True, epoch=0)
    report.on_train_begin(None, state, None)
    for seconds in (12.0, 24.0, 36.0):
        state.global_step, now[0] = state.global_step + 1, seconds
        report.on_step_end(None, state, None)
    assert capsys.readouterr().err == "training: 3/1,000 steps, 12 seconds each, 3.3 hours left\n"
    logs = {"loss": 1.0, "loss_ce": 1.0, "learning_rate": 0.1, "positions": 60}
    monkeypatch.setattr("switchkd.pipelines.training.run_log.line_of", lambda logs: "loss 1")
    report.on_log(None, state, None, logs)
    assert "training: 3/1,000 steps, 12 seconds each, 2 positions/s, 3.3 hours left, loss 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 seconds"), (119, "119 seconds"), (120, "2 minutes"), (7200, "2.0 hours")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
