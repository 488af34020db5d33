"""Activation checkpointing of student and frozen teacher, each on its own: the same run, with less kept for the backward pass."""

from collections import Counter
from dataclasses import replace

import pytest
import training
from training import assert_same_weights, history, kept_bytes, two_processes, weights

from switchkd.errors import ConfigError
from switchkd.pipelines.training.train import train
from switchkd.pipelines.training.trainer import SwitchTrainer
from switchkd.settings import BASELINE_OBJECTIVES

cached, hidden, options = training.cached, training.hidden, training.options
SIDES = ("student", "teacher")


@pytest.fixture
def watched(monkeypatch):
    """What the runs of a test did: bytes kept by each loss, and how often each layer ran."""
    compute, kept, calls = SwitchTrainer.compute_loss, [], Counter()

    def watching(self, model, inputs, *args, **kwargs):
        models = {"student": self.model} | ({} if self.teacher is None else {"teacher": self.teacher})
        if not kept:
            for who, of in models.items():
                for tower in ("vision_tower", "language_model"):
                    for module in (m for n, m in of.named_modules() if f"{tower}." in n and n.endswith(".mlp")):
                        module.register_forward_pre_hook(lambda *_, name=f"{who} {tower}": calls.update([name]))
        with kept_bytes(models.values()) as found:
            loss = compute(self, model, inputs, *args, **kwargs)
        kept.append(sum(size for size, _ in found.values()))
        return loss

    def take():
        taken = kept.copy(), dict(calls)
        kept.clear()
        calls.clear()
        return taken

    monkeypatch.setattr(SwitchTrainer, "compute_loss", watching)
    return take


def checkpointing(*sides):
    return {f"{side}_checkpointing": True for side in sides}


@pytest.mark.parametrize(
    ("switch", "sides", "precision"),
    [
        (True, ("student",), "float32"),
        (True, ("teacher",), "float32"),
        (True, SIDES, "bfloat16"),
        (False, ("student",), "float32"),
        (False, ("teacher",), "float32"),
    ],
)
def test_a_checkpointed_run_is_the_same_and_keeps_less(options, hidden, tmp_path, watched, switch, sides, precision):
    plain = replace(options, cache=hidden, steps=2, save_every=100, switch=switch, precision=precision)
    train(plain)
    kept, calls = watched()
    less = replace(plain, output=tmp_path / "less", **checkpointing(*sides))
    train(less)
    kept_less, calls_less = watched()
    assert history(less.output) == history(plain.output)
    assert_same_weights(weights(less.output), weights(plain.output))
    sides = [side for side in sides if switch or side == "student"]  # without switch the teacher runs in neither
    for name, count in calls.items():
        assert calls_less[name] == count * (2 if name.split()[0] in sides else 1), name
    for before, after in zip(kept, kept_less, strict=True):
        assert after < 0.9 * before if sides else after == before


def test_towers_that_do_not_train_are_not_run_again(options, tmp_path, watched):
    plain = replace(options, steps=2, switch=False, train_parts="projector")
    train(plain)
    _, calls = watched()
    less = replace(plain, output=tmp_path / "less", **checkpointing("student"))
    train(less)
    _, calls_less = watched()
    assert history(less.output) == history(plain.output)
    assert calls_less["student vision_tower"] == calls["student vision_tower"]
    assert calls_less["student language_model"] == 2 * calls["student language_model"]


@pytest.mark.parametrize("objective", BASELINE_OBJECTIVES)
def test_baselines_too(options, tmp_path, objective):
    """Their losses read hidden states and attention maps from inside the layers."""
    live = {"cache": None, "teacher_mode": "live", "template": "qa", "switch": False}
    plain = replace(options, steps=2, objective=objective, **live)
    train(plain)
    less = replace(plain, output=tmp_path / "less", **checkpointing("student"))
    train(less)
    assert history(less.output) == history(plain.output)
    assert_same_weights(weights(less.output), weights(plain.output))


@pytest.mark.slow
@pytest.mark.parametrize("profile", ("ddp", "fsdp"))
def test_over_two_processes(options, hidden, tmp_path, profile):
    train(replace(options, steps=4, cache=hidden))
    done = two_processes(
        options, tmp_path, steps=4, batch_size=2, cache=hidden, profile=profile, **checkpointing(*SIDES)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    training.assert_equal_runs(options.output, tmp_path / "two")


@pytest.mark.parametrize("name", ("gradient_checkpointing", "activation_checkpointing"))
def test_transformers_own_switch_is_refused(options, name):
    with pytest.raises(ConfigError, match=f"{name} is refused: it is for other models: pass --student-checkpointing"):
        train(replace(options, trainer={name: True}))
    assert not options.output.exists()
