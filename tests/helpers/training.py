"""A small training run and what tests look at in it; fixtures and helpers of several test files."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import tiny
import torch
from safetensors.torch import load_file

from switchkd.models.switch import switch_states
from switchkd.pipelines.capture.cache_teacher import cache_teacher
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.trainer import SwitchTrainer


@pytest.fixture(scope="module")
def cached(teacher, tmp_path_factory):
    """A data file with a text-only and a two-turn row, and its store."""
    folder = tmp_path_factory.mktemp("cached")
    data = tiny.data(folder, tiny.rows(12, text_only=(3,), two_turns=(5,)))
    cache_teacher(
        CacheOptions(
            teacher=teacher,
            data=data,
            images=folder / "images",
            out=folder / "stores/s.zarr",
            template="qa",
            part_size=5,
            payload="topk",  # all logits of this small vocabulary
            fine=1 / 4096,
            coarse=1 / 4096,
        )
    )
    return folder


@pytest.fixture
def options(teacher, student, cached, tmp_path):
    return train_options(teacher, student, cached, tmp_path / "run")


def train_options(teacher, student, cached, output):
    """The options of the small run."""
    return TrainOptions(
        student=student,
        teacher=teacher,
        data=cached / "data.json",
        images=cached / "images",
        cache=cached / "stores",
        output=output,
        steps=6,
        batch_size=4,
        lr=5e-3,
        log_every=1,
        save_every=2,
    )


def logged(run):
    """Return the entries of the training log that hold losses."""
    return [e for e in json.loads((run / "summary.json").read_text())["history"] if "loss_ce" in e]


def history(run):
    entries = json.loads((run / "summary.json").read_text())["history"]
    return [
        [entry[name] for name in ("step", "loss_ce", "loss_align", "loss_vsd")]
        for entry in entries
        if "loss_ce" in entry
    ]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(a, b, **tolerance):
    """Bit for bit, or within a tolerance; a key bias has no gradient but rounding, which Adam blows up, and is left out then."""
    assert a.keys() == b.keys()
    for name in a:
        if tolerance and name.endswith("k_proj.bias"):
            continue
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 0, "atol": 0}))


class Stop(Exception):
    pass


def interrupt_after(monkeypatch, steps):
    """Make the trainer fail in step `steps` + 1."""
    original, seen = SwitchTrainer.compute_loss, []

    def counting(self, *args, **kwargs):
        seen.append(1)
        if len(seen) > steps:
            raise Stop
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SwitchTrainer, "compute_loss", counting)


@contextmanager
def kept_bytes(models):
    """Count the bytes that autograd keeps for the backward pass, each storage once, parameters not."""
    parameters = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


RUN = "from switchkd.cli.main import main; main()"


def flags_of(options, **changed):
    """The command line of some options."""
    words = {"student": options.student, "teacher": options.teacher, "data": options.data, "images": options.images}
    words |= {"cache": options.cache, "output": options.output, "steps": 6, "batch_size": 4, "lr": 5e-3}
    words |= {"log_every": 1, "save_every": 2} | changed
    flags = (
        ("--" + ("no-" if value is False else "") + name.replace("_", "-"), value)
        for name, value in words.items()
        if value is not None
    )
    return [text for flag, value in flags for text in ([flag] if isinstance(value, bool) else [flag, str(value)])]


def two_processes(options, tmp_path, prelude="", **changed):
    """Train under torchrun with gloo, after `prelude` ran in both processes; the run is in `tmp_path / "two"`."""
    flags = flags_of(options, **{"output": tmp_path / "two", "save_every": 500} | changed)
    script = tmp_path / "main.py"
    script.write_text(f"{prelude}\nfrom switchkd.cli.main import main\nif __name__ == '__main__':\n    main()\n")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, str(script), "train", *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def assert_equal_runs(a, b, atol=1e-5):
    """Losses equal to 1e-5 (or to 1e-6 nats, for the small ones), weights to `atol`."""
    for mine, other in zip(history(a), history(b), strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert_same_weights(weights(a), weights(b), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def hidden(teacher, cached, tmp_path_factory):
    """A store of the same data with payload `hidden`."""
    store = tmp_path_factory.mktemp("hidden") / "h.zarr"
    cache_teacher(
        CacheOptions(
            teacher=teacher,
            data=cached / "data.json",
            images=cached / "images",
            out=store,
            template="qa",
            payload="hidden",
            hidden_dtype="float16",
        )
    )
    return store


def switch_inputs():
    """Features, ids, mask and rows of two samples with an image, for a tiny teacher of width 64."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 14, (2, 12), generator=generator)
    ids[:, 2:6] = 2
    rows = torch.zeros_like(ids, dtype=torch.bool)
    rows[:, 7:11] = True
    features = torch.randn(2, 4, 32, generator=generator, requires_grad=True)
    return features, ids, torch.ones_like(ids), rows


def switch_outcome(model):
    """The states of the switch pathway for `switch_inputs`, and the gradient of the features."""
    features, *rest = switch_inputs()
    states = switch_states(model, features, *rest)
    return states.detach(), torch.autograd.grad(states.sin().sum(), features)[0]
