"""The losses under torch.compile and torch.export: one graph, the same values and gradients; and a student that is compiled."""

from dataclasses import replace

import pytest
import torch
import training
from training import history

from switchkd.losses import LMHead, bild_loss, dbild_loss, fused_dbild, kneedle, pairwise_kl, selection, signals
from switchkd.losses.objective import OBJECTIVES, Objective
from switchkd.losses.signals import TAIL_POLICIES, DenseSignal, HiddenSignal, SparseSignal
from switchkd.pipelines.training.train import train

cached, options = training.cached, training.options
# Dynamo looks at the .grad of what a graph hands over, and torch warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
POSITIONS, ROWS, CACHED = 5, 300, 40
ON_IMAGE = torch.tensor([True, False, True, True, False])


@pytest.fixture(autouse=True)
def from_scratch():
    torch._dynamo.reset()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def sparse(tail):
    logits = normal(POSITIONS, ROWS, seed=1)
    top = logits.topk(CACHED)
    others = logits.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    return SparseSignal(top.indices, top.values, others, kneedle(logits), ROWS, tail)


SIGNALS = {
    "live": lambda: DenseSignal(normal(POSITIONS, ROWS, seed=1)),
    "hidden": lambda: HiddenSignal(normal(POSITIONS, 16, seed=1), normal(ROWS, 16, seed=2)),
    **{f"topk, tail {tail}": (lambda tail=tail: sparse(tail)) for tail in TAIL_POLICIES},
}


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("name", ("sft", "switch-ce", "fkl", "bild-fkl", "dbild-fkl", "dbild-rkl"))
def test_an_objective_is_one_graph(name, signal):
    assert name in OBJECTIVES
    teacher = SIGNALS[signal]()
    objective = Objective(name, switch=name != "sft")
    student = normal(POSITIONS, ROWS + 10, seed=3).requires_grad_()
    switch = normal(int(ON_IMAGE.sum()), ROWS + 20, seed=4).requires_grad_()
    inputs = (student, switch) if objective.switch else (student,)

    def total(student, switch):
        targets = torch.arange(POSITIONS)
        return objective.total(
            objective.terms(student, targets, teacher, switch if objective.switch else None, ON_IMAGE)
        )

    expected = total(student, switch)
    found = torch.compile(total, fullgraph=True, backend="aot_eager")(student, switch)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("loss", (dbild_loss, bild_loss))
def test_an_exported_loss_takes_any_number_of_positions(loss):
    class Module(torch.nn.Module):
        def forward(self, student, teacher):
            return loss(student, teacher)

    logits = normal(POSITIONS, ROWS), normal(POSITIONS, ROWS, seed=1)
    positions = {0: torch.export.Dim("positions", min=1)}
    program = torch.export.export(Module(), logits, dynamic_shapes=(positions, positions)).module()
    for count in (1, 3, 5, 17):
        student, teacher = normal(count, ROWS, seed=5), normal(count, ROWS, seed=6)
        torch.testing.assert_close(program(student, teacher), loss(student, teacher))


def test_the_operators_keep_torch_s_rules():
    logits = normal(POSITIONS, ROWS)
    check = torch.library.opcheck
    check(selection._top_of_rows, (logits, 7))
    for window in (None, 30):
        check(selection._lead_of_rows, (logits, window))
    check(signals._ids_up_to, (logits.topk(7).indices, logits, torch.full((POSITIONS,), 20)))
    keep = torch.arange(9).expand(POSITIONS, 9) < torch.tensor([2, 9, 5, 3, 4]).unsqueeze(-1)
    for wants_v in (False, True):
        u, v = normal(POSITIONS, 9, seed=1).requires_grad_(), normal(POSITIONS, 9, seed=2).requires_grad_(wants_v)
        check(pairwise_kl._pair_kl, (u, v, keep, True, wants_v))


def test_a_compiled_student_steps_out_for_the_fused_loss():
    layer, head = torch.nn.Linear(16, 16), torch.nn.Linear(16, ROWS, bias=False)
    teacher = normal(POSITIONS, ROWS, seed=1)

    def total(x):
        hidden = torch.tanh(layer(x))
        return fused_dbild(hidden, LMHead(head.weight), torch.arange(POSITIONS), DenseSignal(teacher)).total * 2

    x = normal(POSITIONS, 16)
    of = (layer.weight, head.weight)
    expected = total(x)
    gradients = torch.autograd.grad(expected, of)
    found = torch.compile(total, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, of), gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_run_with_a_compiled_student_is_the_same(options):
    options = replace(options, steps=3)
    train(options)
    compiled = replace(
        options,
        output=options.output.parent / "compiled",
        trainer={"torch_compile": True, "torch_compile_backend": "aot_eager"},
    )
    train(compiled)
    for one, other in zip(history(options.output), history(compiled.output), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
