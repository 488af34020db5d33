"""`--teacher-dtype int8`: what is quantised, that gradients pass, what is kept, and where it is refused."""

import copy
import importlib.util
from dataclasses import replace

import pytest
import tiny
import torch
import training
from training import history, kept_bytes, switch_inputs, switch_outcome

from switchkd.errors import ConfigError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.switch import switch_states
from switchkd.models.vlm import enable_activation_checkpointing, freeze, load_model
from switchkd.pipelines.training.cost_model import CostModel
from switchkd.pipelines.training.int8_teacher import GROUP, check_int8, stored_bytes, to_int8
from switchkd.pipelines.training.train import train
from switchkd.pipelines.training.trainer import SwitchTrainer

cached, hidden, options = training.cached, training.hidden, training.options
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao: make test-torchao"
)


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    """A teacher without a vision tower, of width 64."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("int8") / "teacher", 0, width=64, layers=3)
    return freeze(load_model(open_checkpoint(folder), vision=False, dtype="float32"))


def quantised(model):
    made = copy.deepcopy(model)
    to_int8(made.model.language_model)
    return made


@needs_torchao
def test_weights_are_within_half_a_step_of_their_group(blind):
    made = quantised(blind)
    layers = zip(blind.model.language_model.layers, made.model.language_model.layers, strict=True)
    for before, after in layers:
        for name, module in before.named_modules():
            if isinstance(module, torch.nn.Linear):
                groups = module.weight.unflatten(1, (-1, GROUP))
                step = groups.abs().amax(-1, keepdim=True) / 127.5
                error = after.get_submodule(name).weight.dequantize().unflatten(1, (-1, GROUP)) - groups
                assert (error.abs() <= 0.51 * step).all(), name
                assert not after.get_submodule(name).weight.requires_grad
    same = [name for name, p in made.named_parameters() if type(p) is torch.nn.Parameter]
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} & set(same)
    assert [name for name in same if "_proj.weight" in name] == []


@needs_torchao
@pytest.mark.parametrize("recompute", (False, True))
def test_states_and_gradient_are_those_of_the_weights_that_it_stands_for(blind, recompute):
    made, plain = quantised(blind), copy.deepcopy(blind)
    for name, module in plain.model.language_model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = made.model.language_model.layers.get_submodule(name).weight.dequantize()
    if recompute:
        enable_activation_checkpointing(made.model.language_model)
    for mine, expected in zip(switch_outcome(made), switch_outcome(plain), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)
    for mine, exact in zip(switch_outcome(made), switch_outcome(blind), strict=True):
        assert 1e-5 < (mine - exact).norm() / exact.norm() < 0.1


@needs_torchao
def test_no_dequantised_weight_is_kept_for_the_backward_pass(blind):
    sizes = []
    for model in (blind, quantised(blind)):
        own = torch.nn.ParameterList(p for p in model.parameters() if type(p) is torch.nn.Parameter)
        with kept_bytes([own]) as kept:
            switch_states(model, *switch_inputs())
        sizes.append(sum(size for size, _ in kept.values()))
    assert sizes[1] <= sizes[0]


@needs_torchao
def test_the_estimate_of_memory_knows_its_bytes(blind, student):
    made = quantised(blind)
    whole, parts = blind.model.language_model.layers, made.model.language_model.layers
    linear = sum(m.weight.numel() for m in whole.modules() if isinstance(m, torch.nn.Linear))
    found = sum(map(stored_bytes, parts.parameters())) - sum(p.numel() * 4 for p in whole.parameters()) + 4 * linear
    assert linear * (1 + 4 / GROUP) <= found <= linear * (1 + 8 / GROUP)  # a scale, and a zero point that is 0
    pupil = load_model(open_checkpoint(student), dtype="float32")
    teacher = [
        CostModel(pupil, model, None, 0, 4).memory(1, 8, processes=1, sharded=None, half=False)["teacher"]
        for model in (blind, made)
    ]
    assert teacher[0] - teacher[1] == pytest.approx(4 * linear - found)


@needs_torchao
def test_a_run_trains_with_it(options, hidden, tmp_path, monkeypatch):
    looked = []
    compute = SwitchTrainer.compute_loss

    def looking(self, *args, **kwargs):
        weights = [
            p for n, p in self.teacher.named_parameters() if "language_model.layers" in n and "_proj.weight" in n
        ]
        looked.append((str(self.teacher.lm_head.weight.dtype), {str(getattr(p, "qdata", p).dtype) for p in weights}))
        return compute(self, *args, **kwargs)

    plain = replace(options, cache=hidden, steps=2, precision="bfloat16")
    train(plain)
    monkeypatch.setattr(SwitchTrainer, "compute_loss", looking)
    made = replace(plain, output=tmp_path / "int8", teacher_dtype="int8", teacher_checkpointing=True)
    train(made)
    assert looked == [("torch.bfloat16", {"torch.int8"})] * 2
    for mine, exact in zip(history(made.output), history(plain.output), strict=True):
        assert mine[:3] == pytest.approx(exact[:3], rel=1e-3)  # CE and Align do not read the layers
        assert mine[3] > 0


@needs_torchao
def test_a_width_that_has_no_groups_is_refused(tmp_path):
    folder = tiny.checkpoint(tmp_path / "teacher", 0, width=48)
    model = load_model(open_checkpoint(folder), vision=False, dtype="float32")
    with pytest.raises(ConfigError, match=r"multiples of 32; layer 0\.self_attn\.q_proj of the teacher has 48 inputs"):
        to_int8(model.model.language_model)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher_mode": "live", "cache": None}, "a live teacher is the reference of cached runs"),
        ({"profile": "fsdp"}, "--profile fsdp shards the teacher's layers and cannot shard int8 ones"),
    ],
)
def test_it_is_refused_where_it_has_no_place(options, changed, message):
    with pytest.raises(ConfigError, match=message):
        train(replace(options, teacher_dtype="int8", **changed))
    assert not options.output.exists()


def test_a_missing_torchao_is_named(options, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs torchao, which is not installed: pip install 'switchkd\[torchao\]'"):
        check_int8(replace(options, teacher_dtype="int8"))
    check_int8(options)
