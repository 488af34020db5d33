"""What can end a run: each stop is an error with its cause, and with a checkpoint that is good."""

import math
import os
import shutil
import signal
from dataclasses import replace

import pytest
import training
from safetensors.torch import load_file, save_file
from training import two_processes

from switchkd.errors import RunError
from switchkd.pipelines.training.batches.dataset import TrainingSamples
from switchkd.pipelines.training.lifecycle import sealed
from switchkd.pipelines.training.train import train
from switchkd.pipelines.training.trainer import SwitchTrainer
from switchkd.stores import reader

cached, options = training.cached, training.options


def at_step(monkeypatch, step, act):
    """Call `act(trainer)` before the forward pass of a step."""
    original = SwitchTrainer.training_step

    def acting(self, *args, **kwargs):
        if self.state.global_step == step:
            act(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SwitchTrainer, "training_step", acting)


def assert_good(run, step):
    """The last checkpoint is that of `step`, and everything in it is finite."""
    last = sealed.last_checkpoint(run)
    assert last.name == f"checkpoint-{step}"
    for file in last.glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values() if tensor.is_floating_point()), file


@pytest.mark.parametrize("log_every", (1, 100))
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(options, monkeypatch, log_every):
    """Between two logs too; every checkpoint is looked at."""
    monkeypatch.setattr(
        SwitchTrainer, "loss_terms", poisoned(SwitchTrainer.loss_terms, lambda trainer: trainer.state.global_step == 3)
    )
    stopped = (
        r"the loss is not finite at step 4.*lower --lr .*\nThe last good checkpoint: .*checkpoint-3\. The same command"
    )
    with pytest.raises(RunError, match=stopped):
        train(replace(options, log_every=log_every, save_every=1))
    assert_good(options.output, 3)


def poisoned(loss_terms, when):
    def spoilt(self, *args, **kwargs):
        loss = loss_terms(self, *args, **kwargs)
        if not when(self):
            return loss
        return loss._replace(total=loss.total * math.inf, terms=loss.terms._replace(ce=loss.terms.ce * math.inf))

    return spoilt


def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(options, monkeypatch):
    """The loss of that step is fine and so is the next log; only the weights tell."""

    def spoil(trainer):
        next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(lambda g: g * math.nan)

    at_step(monkeypatch, 2, spoil)
    with pytest.raises(RunError, match=r"a weight is not finite at step 3.*\nThe last good checkpoint: .*checkpoint-2"):
        train(replace(options, log_every=100, save_every=1))
    assert_good(options.output, 2)


@pytest.mark.parametrize("lost", (".", "parts/00001", "parts/00001/topk"))
@pytest.mark.parametrize("workers", (0, 1))
def test_a_store_that_vanishes_stops_the_run(options, cached, monkeypatch, tmp_path, lost, workers):
    """Also the files of one array: Zarr reads a missing chunk as zeros, which no digest would notice."""
    store = shutil.copytree(cached / "stores/s.zarr", tmp_path / "s.zarr")
    monkeypatch.setattr(
        reader.TeacherStore.__init__, "__defaults__", (0, None, True)
    )  # bytes of cache: each sample is read anew
    at_step(monkeypatch, 3, lambda trainer: shutil.rmtree(store / lost))
    with pytest.raises(
        RunError, match=r"the run cannot go on: .*s\.zarr.*\nThe last good checkpoint: .*checkpoint-\d"
    ) as stop:
        train(replace(options, cache=store, steps=30, save_every=1, workers=workers))
    assert "Traceback" not in str(stop.value), str(stop.value)


def test_a_loader_process_that_dies_stops_the_run(options, monkeypatch):
    main, read = os.getpid(), TrainingSamples.__getitem__

    def dying(self, item):
        if os.getpid() != main and sealed.last_checkpoint(options.output) is not None:
            os.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory runs out
        return read(self, item)

    monkeypatch.setattr(TrainingSamples, "__getitem__", dying)
    with pytest.raises(
        RunError, match=r"a loader process died.*fewer --workers.*\nThe last good checkpoint: .*checkpoint-\d"
    ):
        train(replace(options, steps=100, save_every=1, workers=1))


def test_a_process_that_dies_ends_all_of_them(options, tmp_path):
    """SIGKILL of one of two: the other does not wait for ever, torchrun ends with 1, and the checkpoint is named."""
    kill = (
        "import os, signal\nfrom switchkd.pipelines.training.trainer import SwitchTrainer\n"
        "step = SwitchTrainer.training_step\n"
        "def dying(self, *args, **kwargs):\n"
        "    if self.state.global_step == 3 and self.args.process_index == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, *args, **kwargs)\n"
        "SwitchTrainer.training_step = dying\n"
    )
    done = two_processes(options, tmp_path, prelude=kill, batch_size=2, steps=50, save_every=1)
    assert done.returncode == 1
    said = done.stderr.lower()
    assert "the last good checkpoint: " in said and "checkpoint-3" in said, done.stderr[-3000:]
    assert "lost another process of this run" in said or "interrupted; run the same command again" in said
    assert_good(tmp_path / "two", 3)


def test_logits_that_are_not_finite_end_the_run_with_their_position(options, student, tmp_path):
    """A student whose LM head holds NaN: no loss is taken of its logits, and the user sees a message instead of a traceback."""
    broken = shutil.copytree(student, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name][3] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RunError, match="the student's logits at position 0 of [0-9]+ are not finite: the largest is nan"
    ):
        train(replace(options, student=broken))
