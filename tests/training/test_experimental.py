"""Ways of running a step by name: what is refused, what is compiled, and that results and an exact resume stay."""

from dataclasses import replace

import pytest
import torch
import training
import varlen
import yaml
from training import Stop, assert_equal_runs, assert_same_weights, history, interrupt_after, weights

from switchkd.errors import ConfigError
from switchkd.losses import selection
from switchkd.models import varlen_attention
from switchkd.pipelines.training.run_log import line_of
from switchkd.pipelines.training.step_ways import experimental
from switchkd.pipelines.training.train import train

cached, hidden, options = training.cached, training.hidden, training.options


@pytest.fixture(autouse=True)
def as_before():
    """Compiled code and the chosen kernels are of the whole process."""
    yield
    torch._dynamo.reset()
    torch._dynamo.config.suppress_errors = False
    selection.use_kernels("torch")


@pytest.fixture
def compiled(options, hidden, monkeypatch):
    monkeypatch.setattr(experimental, "BACKEND", "aot_eager")  # inductor: below, marked as slow
    return replace(options, cache=hidden, experimental="compile-layers")


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{}, {"packing": 32}, {"student_checkpointing": True}], ids=str)
def test_compiled_layers_give_the_same_run(compiled, tmp_path, changed):
    compiled = replace(compiled, **changed)
    train(compiled)
    train(replace(compiled, experimental=None, output=tmp_path / "eager"))
    assert_equal_runs(compiled.output, tmp_path / "eager")
    logged = training.logged(compiled.output)
    graphs = [entry["compiled_graphs"] for entry in logged]
    assert graphs[0] > 0 and graphs[-1] == graphs[2]  # batches of other sizes compile nothing
    assert {entry["not_compiled"] for entry in logged} == {0}
    assert "compiled_graphs" not in training.logged(tmp_path / "eager")[0]
    assert f"compiled {graphs[0]} graphs, 0 frames not" in line_of(logged[0])


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit_and_as_compiled_alone(compiled, monkeypatch, tmp_path):
    train(replace(compiled, output=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Stop):
            train(compiled)
    assert yaml.safe_load((compiled.output / "run.yaml").read_text())["experimental"] == "compile-layers"
    with pytest.raises(ConfigError, match="experimental: run 'compile-layers', now None"):
        train(replace(compiled, experimental=None))
    train(compiled)
    assert history(compiled.output) == history(tmp_path / "whole")
    assert_same_weights(weights(compiled.output), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_compiled_layers_read_the_copies_of_their_weights(compiled, tmp_path):
    copied = replace(compiled, precision="bfloat16-copies")
    train(copied)
    train(replace(copied, experimental=None, output=tmp_path / "eager"))
    for mine, other in zip(history(copied.output), history(tmp_path / "eager"), strict=True):
        assert mine == pytest.approx(other, rel=1e-2, abs=2.5e-3)


@pytest.mark.slow
def test_what_cannot_be_compiled_runs_uncompiled(compiled, monkeypatch, tmp_path):
    def broken(graph, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(experimental, "BACKEND", broken)
    short = replace(compiled, steps=2)
    train(short)
    train(replace(short, experimental=None, output=tmp_path / "eager"))
    assert_equal_runs(short.output, tmp_path / "eager")
    assert training.logged(short.output)[-1]["not_compiled"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.timeout(900)
def test_inductor(options, tmp_path):
    """The language model's layers alone, since a compiler takes half a minute for each graph."""
    compiled = replace(options, objective="sft", switch=False, train_parts="language", steps=2)
    compiled = replace(compiled, experimental="compile-layers")
    train(compiled)
    train(replace(compiled, experimental=None, output=tmp_path / "eager"))
    assert_equal_runs(compiled.output, tmp_path / "eager")


def test_packed_rows_in_one_kernel(options, hidden, monkeypatch, tmp_path):
    """With a stand-in for the kernel: it is called in every layer of student and teacher, and changes nothing."""
    calls = []

    def kernel(*given, **named):
        calls.append(given[0].dtype)
        return varlen.varlen_attn(*given, **named)

    monkeypatch.setattr(experimental, "check_kernel", lambda device: None)
    monkeypatch.setattr(
        varlen_attention, "kernel_for", lambda device, dtype: kernel if dtype == torch.bfloat16 else None
    )
    looped = replace(options, cache=hidden, steps=2, packing=40, precision="bfloat16")
    train(replace(looped, output=tmp_path / "loop"))
    assert not calls
    train(replace(looped, experimental="varlen-attention"))
    assert len(calls) >= 4 and set(calls) == {torch.bfloat16}
    for mine, other in zip(history(options.output), history(tmp_path / "loop"), strict=True):
        assert mine == pytest.approx(other, rel=1e-2, abs=2.5e-3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"experimental": "fast"}, "--experimental has no 'fast'; there are varlen-attention, triton-selection, compile-layers"),
        ({"experimental": "varlen-attention"}, "is the attention of packed rows: pass --packing TOKENS"),
        ({"experimental": "varlen-attention", "packing": 99, "precision": "float32"}, "computes in half precision"),
        ({"experimental": "compile-layers", "profile": "fsdp"}, "compiles whole layers: pass --profile ddp"),
        (
            {"experimental": "compile-layers", "objective": "align-kd", "switch": False, "teacher_mode": "live"},
            "cannot be combined with objective align-kd",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_together(options, changed, message):
    with pytest.raises(ConfigError, match=message):
        replace(options, **changed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ("varlen-attention", "triton-selection"))
def test_kernels_without_a_device_are_refused_before_anything_is_read(options, name, monkeypatch):
    monkeypatch.setattr(experimental.importlib.util, "find_spec", lambda name: name)
    chosen = replace(options, experimental=name, packing=99, precision="bfloat16", student=options.output / "none")
    with pytest.raises(ConfigError, match=f"--experimental {name} needs a CUDA device, this run computes on cpu"):
        train(chosen)
    assert not (chosen.output / "run.yaml").exists()


def test_triton_is_named_where_it_is_missing(options, monkeypatch):
    monkeypatch.setattr(experimental.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs triton, which torch's CUDA build brings"):
        train(replace(options, experimental="triton-selection"))
