"""What moves a batch to the device: without a wait from pinned memory, with a stand-in for pinned memory and device."""

from dataclasses import replace

import pytest
import torch
import training

from switchkd.pipelines.training.arguments import training_arguments
from switchkd.pipelines.training.step_ways import copying_trainer, transfers
from switchkd.pipelines.training.step_ways.transfers import on_device
from switchkd.pipelines.training.train import train

cached, hidden, options = training.cached, training.hidden, training.options


@pytest.fixture
def copies(monkeypatch):
    """Records copies as (shape, whether the host waits); tensors of an even length are pinned."""
    made, to = [], torch.Tensor.to

    def recorded(self, *given, **named):
        made.append((tuple(self.shape), not named.get("non_blocking", False)))
        return to(self, *given, **named)

    monkeypatch.setattr(torch.Tensor, "to", recorded)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: len(self) % 2 == 0)
    return made


def test_what_is_pinned_is_copied_without_a_wait(copies):
    columns = {
        "input_ids": torch.zeros(2, 3),
        "labels": torch.zeros(3),
        "teacher_media": {"pixel_values": torch.zeros(4, 1), "image_sizes": torch.zeros(5)},
        "list": [torch.zeros(6)],
        "store_seconds": 0.25,
        "left_out": ((1, "broken"),),
    }
    found = on_device(columns, torch.device("meta"))
    assert copies == [((2, 3), False), ((4, 1), False), ((6,), False)]
    assert found["input_ids"].is_meta and found["teacher_media"]["pixel_values"].is_meta and found["list"][0].is_meta
    assert found["labels"] is columns["labels"]
    assert found["teacher_media"]["image_sizes"] is columns["teacher_media"]["image_sizes"]
    assert (found["store_seconds"], found["left_out"]) == (0.25, ((1, "broken"),))


def test_on_a_cpu_nothing_is_copied(copies):
    columns = {"input_ids": torch.zeros(2, 3)}
    assert on_device(columns, torch.device("cpu")) is columns and copies == []


def test_every_micro_batch_of_a_run_takes_this_way(options, hidden, tmp_path, monkeypatch):
    moved = []

    def recorded(columns, device):
        moved.append((sorted(columns), device.type))
        return transfers.on_device(columns, device)

    monkeypatch.setattr(copying_trainer, "on_device", recorded)
    train(replace(options, cache=hidden, steps=2, batch_size=2, accumulation=2, global_batch=None))
    assert len(moved) == 4
    assert all("teacher_hidden" in columns and "pixel_values" in columns for columns, _ in moved)


def test_no_step_asks_the_device_whether_its_loss_is_a_number(options):
    assert training_arguments(options).logging_nan_inf_filter is False
    asked = replace(options, trainer={"logging_nan_inf_filter": True})
    assert training_arguments(asked).logging_nan_inf_filter is True


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; run by `make test-gpu`")
def test_a_batch_on_a_gpu_is_the_batch():
    columns = {"a": torch.randn(1000, 100).pin_memory(), "b": {"c": torch.arange(10).pin_memory()}, "d": torch.ones(3)}
    found = on_device(columns, torch.device("cuda"))
    assert torch.equal(found["a"].cpu(), columns["a"]) and torch.equal(found["b"]["c"].cpu(), columns["b"]["c"])
    assert found["d"] is columns["d"]
