"""`--experimental fp8-teacher`: what is quantised and how, value and gradient, what is kept, and where it is refused."""

import copy
import importlib.util
from dataclasses import replace

import pytest
import tiny
import torch
import training
import yaml
from training import history, kept_bytes, switch_inputs, switch_outcome

from switchkd.errors import ConfigError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.switch import switch_states
from switchkd.models.vlm import enable_activation_checkpointing, freeze, load_model
from switchkd.models.weightless import build_weightless
from switchkd.pipelines.training.cost_model import CostModel
from switchkd.pipelines.training.int8_teacher import stored_bytes
from switchkd.pipelines.training.step_ways import experimental, fp8_teacher
from switchkd.pipelines.training.step_ways.fp8_teacher import (
    NEAR,
    check_fp8,
    count_as_fp8,
    dequantised,
    product_error,
    quantise_rows,
    to_fp8,
)
from switchkd.pipelines.training.train import train
from switchkd.pipelines.training.trainer import SwitchTrainer

cached, hidden, options = training.cached, training.hidden, training.options
WAY = "fp8-teacher"


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def numbers_of_e4m3():
    """All finite values of the format, written from its definition: sign, four bits of exponent (bias 7), three of mantissa."""
    found = {}
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) != (15, 7):  # NaN
                size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
                found[size] = mantissa % 2
    return sorted(found), found


def nearest(value):
    """The number of the format that is nearest to a real number; of two, the one with an even mantissa."""
    sizes, odd = numbers_of_e4m3()
    best = min(sizes, key=lambda size: (abs(abs(value) - size), odd[size]))
    return best if value >= 0 else -best


def reference_rows(x, columns=None):
    """Rows as the numbers that `quantise_rows` stands for, float64, entry by entry."""
    x = x.double() if columns is None else x.double() * columns.double()
    rows = []
    for row in x.tolist():
        scale = max(max(map(abs, row)) / 448, 1e-30)
        rows.append([nearest(value / scale) * scale for value in row])
    return torch.tensor(rows, dtype=torch.float64)


CASES = {
    "normal": normal(4, 19),
    "one column": normal(3, 1),
    "zeros": torch.zeros(2, 5),
    "equal": torch.full((2, 7), -3.0),
    "far apart": normal(3, 33) * torch.logspace(-6, 6, 33),
    "ties": torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10, 0.0]]),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("with_columns", (False, True))
def test_rows_are_rounded_to_the_nearest_number(name, with_columns):
    x = CASES[name].float()
    columns = torch.linspace(0.5, 2, x.shape[1]) if with_columns and name != "ties" else None
    rows, scales = quantise_rows(x, columns)
    assert rows.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32 and scales.shape == (len(x), 1)
    found, wanted = rows.double() * scales.double(), reference_rows(x, columns)
    # Scales are float32: an entry that lies halfway between two numbers to within that may go to the other one.
    off = (found - wanted).abs() > 1e-6 * wanted.abs() + 1e-30
    exact = (x.double() if columns is None else x.double() * columns) / scales
    assert all(abs(abs(value) / abs(nearest(value) or 1) - 1) > 1 / 18 for value in exact[off].tolist())
    assert off.double().mean() < 0.1 or not off.any()
    if name in ("ties", "zeros", "equal", "one column"):
        assert not off.any()


def holder(layer):
    """A language model of one layer."""
    made = torch.nn.Module()
    made.layers = torch.nn.ModuleList([layer.requires_grad_(False)])
    return made


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 1, 4)])
def test_value_and_gradient_are_those_of_the_quantised_product(shape, bias):
    """From the formulas of the module's docstring, in float64; the layer computes in float32 here."""
    layer = torch.nn.Linear(32, 48, bias=bias)
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    exact = layer.weight.detach().double()
    to_fp8(holder(layer))
    x, g = normal(*shape, 32, dtype=torch.float32).requires_grad_(), normal(*shape, 48, seed=2, dtype=torch.float32)
    result = layer(x)
    (found,) = torch.autograd.grad(result, x, g)
    weight = dequantised(layer).double()
    assert ((weight - exact).abs() <= exact.abs() / 16 + exact.abs().amax(-1, keepdim=True) * 2.0**-17).all()
    flat, of_flat = x.detach().reshape(-1, 32), g.reshape(-1, 48)
    rows, scales = quantise_rows(flat)
    wanted = (rows.double() * scales.double()) @ weight.T + (layer.bias.double() if bias else 0)
    rows, scales = quantise_rows(of_flat, layer.scales.squeeze(0))
    of_inputs = (rows.double() * scales.double()) @ layer.weight.detach().double()
    torch.testing.assert_close(result.reshape(-1, 48).double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.reshape(-1, 32).double(), of_inputs, rtol=1e-5, atol=1e-5)
    assert result.shape == (*shape, 48) and found.shape == x.shape
    # Against the layer as it was: three bits of mantissa, so a few per cent.
    for mine, true in (
        (result - (layer.bias if bias else 0), flat.double() @ exact.T),
        (found, of_flat.double() @ exact),
    ):
        error = (mine.reshape(true.shape).double() - true).norm() / true.norm()
        assert 1e-3 < error < 0.08


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("fp8") / "teacher", 0, width=64, layers=3)


@pytest.fixture(scope="module")
def blind(folder):
    """A teacher without a vision tower, of width 64."""
    return freeze(load_model(open_checkpoint(folder), vision=False, dtype="float32"))


def quantised(model, **how):
    made = copy.deepcopy(model)
    to_fp8(made.model.language_model, **how)
    return made


def test_the_layers_alone_are_quantised(blind):
    made = quantised(blind)
    kinds = {name: p.dtype for name, p in made.named_parameters()}
    eighth = {name for name, kind in kinds.items() if kind == torch.float8_e4m3fn}
    linear = {n for n, m in blind.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    assert eighth == {f"{name}.{part}" for name in linear for part in ("weight", "transposed")}
    assert not any(made.get_parameter(name).requires_grad for name in eighth)
    assert kinds["model.language_model.embed_tokens.weight"] == torch.float32
    assert kinds["model.multi_modal_projector.linear_1.weight"] == torch.float32


@pytest.mark.parametrize("recompute", (False, True))
def test_states_and_gradient_of_a_whole_model(blind, recompute):
    made = quantised(blind)
    if recompute:
        enable_activation_checkpointing(made.model.language_model)
    for mine, exact in zip(switch_outcome(made), switch_outcome(blind), strict=True):
        assert 1e-3 < (mine - exact).norm() / exact.norm() < 0.4
    if recompute:
        for mine, plain in zip(switch_outcome(made), switch_outcome(quantised(blind)), strict=True):
            assert torch.equal(mine, plain)


def test_layers_that_read_the_same_tensor_share_its_quantisation(blind, monkeypatch):
    made, calls = quantised(blind), []

    def counted(x, columns=None):
        calls.append(columns is None)
        return quantise_rows(x, columns)

    monkeypatch.setattr(fp8_teacher, "quantise_rows", counted)
    switch_outcome(made)
    assert calls.count(True) == 4 * 3  # q, k and v; o; gate and up; down: in three layers
    assert calls.count(False) == 7 * 3  # every gradient is its own


def test_a_tensor_that_changes_in_place_is_quantised_again():
    layer = torch.nn.Linear(16, 16)
    to_fp8(holder(layer))
    x = normal(2, 16, dtype=torch.float32)
    before = layer(x)
    x.mul_(-1)
    assert torch.allclose(layer(x) - layer.bias, -(before - layer.bias), atol=1e-6)


def test_nothing_is_kept_for_the_backward_pass_beside_what_the_model_keeps(blind):
    sizes = []
    for model in (blind, quantised(blind)):
        with kept_bytes([model]) as kept:
            switch_states(model, *switch_inputs())
        sizes.append(sum(size for size, _ in kept.values()))
    assert sizes[1] <= sizes[0]


@pytest.mark.parametrize("with_gradient", (False, True))
def test_the_estimate_of_memory_knows_its_bytes(blind, folder, student, with_gradient):
    made = quantised(blind, with_gradient=with_gradient)
    plan = build_weightless(open_checkpoint(folder), vision=False, dtype="float32")
    count_as_fp8(plan.model.language_model, with_gradient=with_gradient)
    whole = blind.model.language_model.layers
    linear = sum(m.weight.numel() for m in whole.modules() if isinstance(m, torch.nn.Linear))
    pupil = load_model(open_checkpoint(student), dtype="float32")
    before, after, planned = (
        CostModel(pupil, model, None, 0, 4).memory(1, 8, processes=1, sharded=None, half=False)["teacher"]
        for model in (blind, made, plan)
    )
    assert before - after == (4 - 1 - with_gradient) * linear
    assert planned == after == sum(map(stored_bytes, made.parameters()))


def test_a_model_without_a_gradient_has_no_second_copy(blind):
    made = quantised(blind, with_gradient=False)
    features, *rest = switch_inputs()
    with torch.no_grad():
        found = switch_states(made, features, *rest)
    assert torch.equal(found, switch_outcome(quantised(blind))[0])


@pytest.fixture
def as_on_a_device(monkeypatch):
    """The CPU computes products in float8 too, slowly; a run there is refused only because that helps nobody."""
    monkeypatch.setattr(experimental, "check_fp8", lambda device: None)


@pytest.mark.parametrize(
    "changed",
    [
        {"precision": "bfloat16"},
        {"precision": "bfloat16-copies", "packing": 40, "teacher_checkpointing": True},
        {"precision": "bfloat16", "teacher_mode": "live", "cache": None},
        {"precision": "bfloat16", "teacher_mode": "live", "cache": None, "switch": False},
    ],
    ids=("switch", "copies, packed, checkpointed", "live", "live alone"),
)
def test_a_run_trains_with_it(options, hidden, tmp_path, monkeypatch, as_on_a_device, changed):
    looked, compute = set(), SwitchTrainer.compute_loss

    def looking(self, *args, **kwargs):
        teacher = self.teacher or self.source.teacher
        looked.update(
            p.dtype
            for n, p in teacher.named_parameters()
            if ".layers." in n and "_proj.weight" in n and "vision" not in n
        )
        looked.add(teacher.lm_head.weight.dtype)
        return compute(self, *args, **kwargs)

    plain = replace(options, cache=hidden, steps=2)
    plain = replace(plain, **changed)
    train(replace(plain, output=tmp_path / "plain"))
    monkeypatch.setattr(SwitchTrainer, "compute_loss", looking)
    train(replace(plain, experimental=WAY))
    assert looked == {torch.float8_e4m3fn, torch.bfloat16}
    assert history(plain.output) != history(tmp_path / "plain")
    for mine, exact in zip(history(plain.output), history(tmp_path / "plain"), strict=True):
        assert mine == pytest.approx(exact, rel=0.25, abs=0.02)


def test_the_record_names_it_and_a_resumed_run_keeps_it(options, hidden, tmp_path, monkeypatch, as_on_a_device):
    chosen = replace(options, cache=hidden, precision="bfloat16", experimental=WAY)
    train(replace(chosen, output=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        training.interrupt_after(patch, 3)
        with pytest.raises(training.Stop):
            train(chosen)
    assert yaml.safe_load((chosen.output / "run.yaml").read_text())["experimental"] == WAY
    with pytest.raises(ConfigError, match=f"experimental: run '{WAY}', now None"):
        train(replace(chosen, experimental=None))
    train(chosen)
    assert history(chosen.output) == history(tmp_path / "whole")
    training.assert_same_weights(training.weights(chosen.output), training.weights(tmp_path / "whole"))


def test_a_width_that_the_tensor_cores_do_not_take_is_refused():
    with pytest.raises(ConfigError, match="multiples of 16; layer 0 of the teacher has 24 inputs and 32 outputs"):
        to_fp8(holder(torch.nn.Linear(24, 32)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"switch": False}, "for a teacher that runs in a step"),
        ({"objective": "sft", "switch": False}, "for a teacher that runs in a step"),
        ({"precision": "float32"}, "computes beside bfloat16: pass --precision bfloat16"),
        ({"teacher_dtype": "int8"}, "quantises a teacher in bfloat16: pass --teacher-dtype bfloat16, got int8"),
        ({"profile": "fsdp"}, "--profile fsdp was not tried with a teacher in float8"),
        (
            {"objective": "llava-kd", "switch": False, "teacher_mode": "live"},
            "cannot be combined with objective llava-kd, whose teacher is as published",
        ),
    ],
)
def test_it_is_refused_where_it_has_no_place(options, changed, message):
    with pytest.raises(ConfigError, match=message):
        replace(options, experimental=WAY, **changed)


def test_it_is_refused_on_a_device_without_such_products(monkeypatch):
    with pytest.raises(ConfigError, match="fp8-teacher needs a CUDA device, this run computes on cpu"):
        check_fp8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError, match=r"capability 8\.9 or above .*; NVIDIA A100 has 8\.0: leave it out"):
        check_fp8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="fp8-teacher needs triton, which torch's CUDA build brings"):
        check_fp8(torch.device("cuda"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def without(device):
        raise RuntimeError("torch._scaled_mm is only supported on other devices")

    monkeypatch.setattr(fp8_teacher, "product_error", without)
    with pytest.raises(ConfigError, match="torch has no such product on cuda: torch._scaled_mm is only supported"):
        check_fp8(torch.device("cuda"))
    monkeypatch.setattr(fp8_teacher, "product_error", lambda device: 0.5)
    with pytest.raises(ConfigError, match=r"differ from their reference by 50\.0%, expected 1% at most"):
        check_fp8(torch.device("cuda"))


def test_the_check_before_a_run_tells_a_wrong_product(monkeypatch):
    assert 0 < product_error(torch.device("cpu")) < NEAR
    product = torch._scaled_mm
    for wrong in ("scale_a", "scale_b"):

        def broken(*given, wrong=wrong, **named):
            return product(*given, **(named | {wrong: named[wrong].flip(0).flip(1)}))

        monkeypatch.setattr(torch, "_scaled_mm", broken)
        assert product_error(torch.device("cpu")) > NEAR


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler does
def test_compiled_layers_give_the_same_run(options, hidden, tmp_path, monkeypatch, as_on_a_device):
    """With the compiler's front end; the layers' inputs are then quantised by the compiled program."""
    monkeypatch.setattr(experimental, "BACKEND", "aot_eager")
    plain = replace(options, cache=hidden, precision="bfloat16", steps=2, experimental=WAY)
    try:
        train(replace(plain, experimental=f"{WAY},compile-layers"))
    finally:
        torch._dynamo.reset()
        torch._dynamo.config.suppress_errors = False
    train(replace(plain, output=tmp_path / "eager"))
    entry = training.logged(plain.output)[-1]
    assert entry["compiled_graphs"] > 0 and entry["not_compiled"] == 0
    for mine, other in zip(history(plain.output), history(tmp_path / "eager"), strict=True):
        assert mine == pytest.approx(other, rel=1e-2, abs=2.5e-3)
