"""Hidden states of several teachers behind one signal: values and gradients against each position computed alone."""

import pytest
import reference
import torch
import torch.nn.functional as F
from loss_cases import normal

from switchkd.losses import LMHead, dbild_loss
from switchkd.losses.lm_head import LogitMap
from switchkd.losses.objective import Objective
from switchkd.losses.signals import DenseSignal, MixedHiddenSignal

WIDTHS, ROWS = (5, 3), 7
MAPS = (LogitMap(), LogitMap(scale=0.5, softcap=4.0))
HEADS = tuple((normal(width, ROWS, width) * 3, logit_map) for width, logit_map in zip(WIDTHS, MAPS, strict=True))


def signal(teachers, knee=None):
    hidden = normal(1, len(teachers), max(WIDTHS))
    for position, teacher in enumerate(teachers):
        hidden[position, WIDTHS[teacher] :] = 0
    return MixedHiddenSignal(hidden, HEADS, torch.tensor(teachers, dtype=torch.int64), knee)


def naive(of):
    """Each position's logits, alone, from its own teacher: [T, N]."""
    rows = []
    for state, teacher in zip(of.hidden, of.teacher.tolist(), strict=True):
        head, logit_map = HEADS[teacher]
        product = [sum(float(a) * float(b) for a, b in zip(row, state, strict=False)) for row in head]
        rows.append(reference.capped(product, logit_map.scale, logit_map.softcap))
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), ROWS)


@pytest.mark.parametrize("teachers", [(0, 1, 1, 0), (1, 1), (0,), ()])
def test_each_position_has_the_logits_of_its_own_teacher(teachers):
    of = signal(teachers)
    student = normal(2, len(teachers), ROWS)
    torch.testing.assert_close(of.rows(student), naive(of), rtol=1e-12, atol=1e-12)
    assert (of.vocab_rows, of.positions) == (ROWS, len(teachers))
    keep = torch.arange(len(teachers)) % 2 == 0
    torch.testing.assert_close(of.select(keep).rows(student[keep]), naive(of)[keep], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("knee", [None, torch.tensor([2, 7, 3, 4, 2])])
def test_losses_and_gradients_are_those_of_whole_logits(knee):
    of = signal((0, 1, 1, 0, 1), knee)
    whole = DenseSignal(naive(of), knee)
    student = normal(3, 5, ROWS).requires_grad_()
    pairs = [dbild_loss(student, each) for each in (of, whole)]
    torch.testing.assert_close(*pairs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in pairs))
    hidden, weight = normal(4, 5, 4).requires_grad_(), normal(5, ROWS, 4).requires_grad_()
    objective, targets = Objective(switch=False), torch.tensor([0, 1, 2, 3, 6])
    found = []
    for each, chunk in ((of, 2), (whole, None)):
        fused = objective.fused(hidden, LMHead(weight, None), targets, each, None, chunk_positions=chunk)
        found.append((fused.total.detach(), *torch.autograd.grad(fused.total, (hidden, weight))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert F.linear(hidden, weight).shape == (5, ROWS)
