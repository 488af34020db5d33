"""What benchmarks/exchange.py counts is what real runs exchange, and gradients are exchanged while others are still computed."""

import json

import exchange
import pytest
import step
import torch
import training
from transformers import LlavaForConditionalGeneration

from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.vlm import freeze, freeze_unused_vision, load_model

cached, hidden, options = training.cached, training.hidden, training.options

# Written before `switchkd train` in each process: the first one reports the bytes of whole tensors.
COUNT = """
import atexit, json, os
import torch
import torch.distributed as dist
counted, events = {"gathered": 0, "scattered": 0, "all-reduced": 0}, []
if os.environ["RANK"] == "0":
    atexit.register(lambda: open(os.environ["COUNTED"], "w").write(json.dumps([counted, events])))
def counting(name, kind, place):
    original = getattr(dist, name)
    def call(*given, **named):
        tensor = named.get("output" if place == 0 else "input", given[place] if len(given) > place else None)
        counted[kind] += tensor.nbytes
        return original(*given, **named)
    setattr(dist, name, call)
counting("all_gather_single", "gathered", 0)
counting("reduce_scatter_single", "scattered", 1)
from torch.nn.parallel import DistributedDataParallel
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
made = DistributedDataParallel.__init__
def make(self, module, *given, **named):
    made(self, module, *given, **(named | {"bucket_cap_mb": 0.02}))
    def hook(state, bucket):
        counted["all-reduced"] += bucket.buffer().nbytes
        events.append("bucket")
        return allreduce_hook(state, bucket)
    self.register_comm_hook(None, hook)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: events.append("gradient"))
DistributedDataParallel.__init__ = make
"""


def counted(options, tmp_path, monkeypatch, **changed):
    out = tmp_path / "counted.json"
    monkeypatch.setenv("COUNTED", str(out))
    done = training.two_processes(options, tmp_path, COUNT, **changed)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.fixture
def models(student, teacher):
    pupil = load_model(open_checkpoint(student), dtype="float32")
    freeze_unused_vision(pupil, None)
    return pupil, freeze(load_model(open_checkpoint(teacher), vision=False, dtype="float32"))


@pytest.mark.slow
def test_ddp_exchanges_each_gradient_once_a_step_and_while_others_are_computed(
    options, hidden, models, tmp_path, monkeypatch
):
    found, events = counted(
        options, tmp_path, monkeypatch, cache=hidden, steps=2, batch_size=2, accumulation=2, global_batch=None
    )
    each = exchange.exchanged_bytes(*models, "ddp", half=False)["all-reduced"]
    assert found == {"gathered": 0, "scattered": 0, "all-reduced": 2 * each}
    trained = sum(p.requires_grad for p in models[0].parameters())
    assert (
        events.count("gradient") == 2 * 2 * trained
    )  # of two micro-batches a step, the first of which exchanges nothing
    assert "bucket" not in events[:trained]
    # torch arranges the buckets in the first step by the order in which gradients come. From then on they overlap.
    second = events[len(events) - 1 - events[::-1].index("gradient") :: -1][::-1]  # without the last bucket
    second = second[[i for i, event in enumerate(second) if event == "gradient"][2 * trained] :]
    assert "bucket" not in second[:trained] and second.count("gradient") == 2 * trained
    of_exchange = second[trained:]
    assert of_exchange.count("bucket") >= 3 and of_exchange.index("bucket") < trained / 2


@pytest.mark.slow
def test_fsdp_gathers_layers_twice_and_scatters_gradients_once(options, hidden, models, tmp_path, monkeypatch):
    found, _ = counted(options, tmp_path, monkeypatch, cache=hidden, steps=1, batch_size=2, profile="fsdp")
    wanted = exchange.exchanged_bytes(*models, "fsdp", half=False)
    assert found["all-reduced"] == 0
    assert found["scattered"] == pytest.approx(wanted["scattered"], rel=0.05)  # rows are filled up to the processes
    assert found["gathered"] == pytest.approx(wanted["gathered"], rel=0.1)


def test_counts_at_real_sizes():
    """2 (n - 1) / n of float32 gradients; the student has about 0.5 billion weights beside its tower's 0.4."""
    student, teacher, flops = exchange.models_and_flops()
    weights = sum(p.numel() for p in student.parameters())
    assert 0.85e9 < weights < 1.0e9 and flops > 1e14
    assert exchange.sent_bytes(exchange.exchanged_bytes(student, teacher, "ddp", half=True), 2) == 4 * weights
    shared = exchange.exchanged_bytes(student, teacher, "fsdp", half=True)
    assert shared["scattered"] == 4 * weights
    layers = sum(p.numel() for p in teacher.model.language_model.layers.parameters())
    assert 4 * layers + 2 * weights < shared["gathered"] < 4 * layers + 4 * weights
    with pytest.raises(ValueError, match="'ddp' or 'fsdp', got 'zero3'"):
        exchange.exchanged_bytes(student, teacher, "zero3", half=True)
    assert step.SCALES["cuda"].samples == 16 and next(student.parameters()).device == torch.device("meta")
    assert isinstance(student, LlavaForConditionalGeneration)
