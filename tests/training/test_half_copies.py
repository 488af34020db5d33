"""Bfloat16 copies of float32 weights: what is read, what is refreshed, and how near the results are to autocast's and float32's."""

from dataclasses import replace

import pytest
import torch
import training
from torch import nn
from training import Stop, assert_same_weights, history, interrupt_after, two_processes, weights

from switchkd.errors import ConfigError
from switchkd.pipelines.training.step_ways.half_copies import HalfCopies
from switchkd.pipelines.training.train import train
from switchkd.pipelines.training.trainer import SwitchTrainer

cached, hidden, options = training.cached, training.hidden, training.options


class Tied(nn.Module):
    """An embedding whose weight is the last layer's too, a frozen layer between, and a float64 scale."""

    def __init__(self):
        super().__init__()
        self.embedding, self.frozen = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.float64))

    def forward(self, ids):
        return self.head(self.frozen(self.embedding(ids)) * self.scale.to(self.frozen.weight.dtype))


def test_modules_read_copies_and_weights_receive_float32_gradients():
    torch.manual_seed(0)
    model, ids = Tied(), torch.tensor([1, 2, 2])
    before = dict(model.named_parameters())
    copies = HalfCopies(model, torch.optim.SGD(model.parameters()))
    with copies.in_place():
        assert model.head.weight.dtype == model.frozen.bias.dtype == torch.bfloat16
        assert model.scale.dtype == torch.float64  # only float32 weights have copies
        out = model(ids)
        out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert model.frozen.weight.grad is None and model.frozen.bias.grad is None
    found, model.embedding.weight.grad = model.embedding.weight.grad, None
    assert found.dtype == torch.float32
    # The same products by hand, from rounded weights; the two uses of the tied weight add up in float32.
    leaves = [before["embedding.weight"].detach().bfloat16().requires_grad_() for _ in range(2)]
    states = nn.functional.embedding(ids, leaves[0])
    inner = nn.functional.linear(states, model.frozen.weight.bfloat16(), model.frozen.bias.bfloat16())
    nn.functional.linear(inner * torch.ones(4, dtype=torch.bfloat16), leaves[1]).float().square().sum().backward()
    torch.testing.assert_close(found, sum(leaf.grad.float() for leaf in leaves), rtol=0, atol=0)


@pytest.mark.parametrize("how", ("fused", "foreach", "load"))
def test_copies_are_written_again_after_a_change_and_only_then(how):
    model = Tied()
    flags = {} if how == "load" else {how: True}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, **flags)
    copies = HalfCopies(model, optimizer)
    for accumulated in range(2):
        with copies.in_place():
            model(torch.tensor([0, 1])).float().sum().backward()
        assert copies.refreshed == 0, accumulated
    if how == "load":
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    else:
        optimizer.step()
    for _ in range(2):
        with copies.in_place():
            assert torch.equal(model.embedding.weight, copies._places[0][2].detach().bfloat16())
        assert copies.refreshed == 1


def test_an_error_puts_the_weights_back():
    model = Tied()
    before = dict(model.named_parameters())
    with pytest.raises(KeyError), HalfCopies(model, torch.optim.SGD(model.parameters())).in_place():
        raise KeyError
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def gradients(options, monkeypatch, **changed):
    """The gradient of the first step, by parameter; the optimizer is torch's fused AdamW."""
    found = {}

    def keep(self, optimizer, *rest, **named):
        kind = self.optimizer.optimizer
        assert isinstance(kind, torch.optim.AdamW) and kind.defaults["fused"]
        found.update({name: p.grad.double().clone() for name, p in self.model.named_parameters() if p.grad is not None})
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        assert all(self.model.get_parameter(name).grad is None for name in frozen)
        dtypes = {p.dtype for p in self.model.parameters()} | {
            p.grad.dtype for p in self.model.parameters() if p.grad is not None
        }
        assert dtypes == {torch.float32}
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(SwitchTrainer, "require_finite", lambda self: None)
        patch.setattr("transformers.Trainer._get_grad_norm", lambda self, *given, **named: keep(self, *given, **named))
        with pytest.raises(Stop):
            train(replace(options, **changed))
    return found


def distance(mine, other):
    a, b = (torch.cat([each[name].flatten() for name in sorted(other)]) for each in (mine, other))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("source", ("topk", "hidden"))
def test_gradients_are_about_as_near_to_float32_as_autocasts(options, hidden, monkeypatch, tmp_path, source):
    if source == "hidden":
        options = replace(options, cache=hidden)
    found = {
        precision: gradients(
            options, monkeypatch, precision=precision, teacher_dtype="float32", output=tmp_path / precision
        )
        for precision in ("float32", "bfloat16", "bfloat16-copies")
    }
    exact = found.pop("float32")
    errors = {precision: distance(each, exact) for precision, each in found.items()}
    print(errors)
    assert found["bfloat16-copies"].keys() == exact.keys()
    assert 0 < errors["bfloat16-copies"] < 2 * errors["bfloat16"] + 0.01


@pytest.mark.parametrize(
    "changed",
    [{}, {"student_checkpointing": True, "teacher_checkpointing": True, "packing": 32, "train_parts": "vision"}],
    ids=("plain", "checkpointed, packed, the tower alone"),
)
def test_a_run_is_that_under_autocast_and_resumes_bit_for_bit(options, hidden, monkeypatch, tmp_path, changed):
    copied = replace(options, cache=hidden, precision="bfloat16-copies", **changed)
    train(replace(copied, precision="bfloat16", output=tmp_path / "autocast"))
    train(replace(copied, output=tmp_path / "whole"))
    for mine, other in zip(history(tmp_path / "whole"), history(tmp_path / "autocast"), strict=True):
        assert mine == pytest.approx(other, rel=1e-2, abs=2.5e-3)  # a knee of one position moves
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Stop):
            train(copied)
    train(copied)
    assert history(copied.output) == history(tmp_path / "whole")
    assert_same_weights(weights(copied.output), weights(tmp_path / "whole"))
    assert {value.dtype for value in weights(copied.output).values()} == {torch.float32}


@pytest.mark.slow
def test_over_two_processes(options, hidden, tmp_path):
    """DistributedDataParallel averages the float32 gradients of the weights."""
    copied = replace(options, cache=hidden, precision="bfloat16-copies")
    train(copied)
    done = two_processes(copied, tmp_path, cache=hidden, precision="bfloat16-copies", batch_size=2)
    assert done.returncode == 0, done.stderr
    for mine, other in zip(history(tmp_path / "two"), history(copied.output), strict=True):
        assert mine == pytest.approx(other, rel=1e-2, abs=2.5e-3)  # a knee of one position moves


def test_where_there_are_no_copies(options):
    with pytest.raises(ConfigError, match="--profile fsdp makes bfloat16 copies of its own: pass --precision bfloat16"):
        replace(options, precision="bfloat16-copies", profile="fsdp")
    with pytest.raises(ConfigError, match="objective align-kd trains under autocast"):
        replace(
            options, precision="bfloat16-copies", objective="align-kd", switch=False, teacher_mode="live", cache=None
        )
