"""Logits that a model scales or soft-caps: values and gradients of head, signal and fused loss, against a naive reference."""

import pytest
import reference
import torch
import torch.nn.functional as F
from loss_cases import Case, N, normal

from switchkd.losses import LMHead
from switchkd.losses.fused import SwitchStates
from switchkd.losses.lm_head import LogitMap
from switchkd.losses.objective import Objective
from switchkd.losses.signals import DenseSignal, HiddenSignal

MAPS = [LogitMap(), LogitMap(softcap=3.0), LogitMap(scale=0.25), LogitMap(scale=2.0, softcap=5.0)]


@pytest.mark.parametrize("logit_map", MAPS)
def test_logits_are_those_of_the_reference(logit_map):
    hidden, head = normal(1, 4, 5), LMHead(normal(2, 7, 5) * 3, normal(3, 7), logit_map)
    product = F.linear(hidden, head.weight, head.bias)
    wanted = [reference.capped(row, logit_map.scale, logit_map.softcap) for row in product.tolist()]
    torch.testing.assert_close(head.logits(hidden), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        HiddenSignal(hidden, head.weight, logit_map=logit_map).rows(product),
        LMHead(head.weight, None, logit_map).logits(hidden),
    )


def test_without_a_map_nothing_is_computed():
    product = normal(1, 3, 4)
    assert LogitMap()(product) is product
    assert LogitMap().is_identity
    assert not any(logit_map.is_identity for logit_map in MAPS[1:])


@pytest.mark.parametrize("logit_map", MAPS)
def test_the_gradient_is_the_derivative(logit_map):
    torch.autograd.gradcheck(logit_map, normal(1, 3, 4).requires_grad_())


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("logit_map", MAPS[1:])
def test_the_fused_loss_equals_that_of_whole_logits(logit_map, chunk):
    """Value and every gradient; student, teacher and switch pathway have maps of their own."""
    objective, case, of_teacher = Objective(), Case.make(), LogitMap(softcap=4.0)
    signal = HiddenSignal(case.teacher_hidden, case.teacher_head[:N], logit_map=of_teacher)
    switch = SwitchStates(case.switch_hidden, LMHead(case.teacher_head, None, of_teacher), case.on_image)
    fused = objective.fused(
        case.hidden, LMHead(case.weight, case.bias, logit_map), case.targets, signal, switch, chunk_positions=chunk
    )
    found = torch.autograd.grad(fused.total, case.inputs())
    terms = objective.terms(
        logit_map(F.linear(case.hidden, case.weight, case.bias)),
        case.targets,
        DenseSignal(of_teacher(case.teacher_logits)),
        of_teacher(F.linear(case.switch_hidden, case.teacher_head)),
        case.on_image,
    )
    total = terms.ce + objective.align_weight * terms.align + objective.vsd_weight * terms.vsd
    torch.testing.assert_close(fused.total, total)
    for mine, theirs in zip(found, torch.autograd.grad(total, case.inputs()), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_selected_signal_keeps_its_map():
    signal = HiddenSignal(normal(1, 4, 5), normal(2, 7, 5), logit_map=MAPS[1])
    keep = torch.tensor([True, False, True, False])
    torch.testing.assert_close(signal.select(keep).rows(torch.zeros(2, 7)), signal.rows(torch.zeros(4, 7))[keep])


@pytest.mark.parametrize("logit_map", MAPS)
def test_the_slope_is_the_derivative_at_the_logits(logit_map):
    product = normal(1, 3, 4).requires_grad_()
    logits = logit_map(product)
    (gradient,) = torch.autograd.grad(logits.sum(), product)
    torch.testing.assert_close(logit_map.slope(logits.detach()), gradient)
