"""Cached and live teachers behind one type: where a store covers what is asked, both give the same loss."""

import pytest
import torch

from switchkd.losses import bild_loss, dbild_loss, kl_loss, kneedle
from switchkd.signals import TAIL_POLICIES, DenseSignal, SparseSignal

T, N = 5, 40


def normal(seed, spread=3.0):
    return torch.randn(T, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * spread


def sparse(teacher, k, tail="uniform"):
    ordered, ids = teacher.sort(dim=-1, descending=True, stable=True)
    tail_logsumexp = ordered[:, k:].logsumexp(-1)
    return SparseSignal(ids[:, :k], ordered[:, :k], tail_logsumexp, kneedle(teacher), teacher.shape[-1], tail)


@pytest.mark.parametrize("loss", [dbild_loss, bild_loss, kl_loss])
def test_a_full_cache_equals_the_live_teacher(loss):
    student, teacher = normal(1), normal(2)
    torch.testing.assert_close(loss(student, sparse(teacher, N)), loss(student, DenseSignal(teacher)))


def test_a_window_inside_the_cache_leads_as_the_live_teacher():
    teacher = normal(4)
    ids, k = sparse(teacher, 12).lead(window=12)
    live_ids, live_k = DenseSignal(teacher).lead(window=12)
    assert k.tolist() == live_k.tolist()
    assert torch.equal(ids, live_ids)


def test_a_window_beyond_the_cache_is_refused():
    with pytest.raises(ValueError, match="window = 13 asks for more than the 12 cached"):
        sparse(normal(4), 12).lead(window=13)


def test_bild_inside_the_cache_equals_the_live_teacher_where_the_student_stays_inside():
    teacher = normal(5)
    student = teacher * 1.1  # the same order, so the student's eight are cached too
    torch.testing.assert_close(bild_loss(student, sparse(teacher, 8)), bild_loss(student, teacher))


def test_more_leaders_than_cached_are_refused():
    with pytest.raises(ValueError, match="8 leading logits asked for, 6"):
        bild_loss(normal(1), sparse(normal(2), 6))


def test_the_full_vocabulary_lead_is_cut_at_the_cache():
    signal = sparse(normal(6), 4)
    _, k = signal.lead()
    assert k.tolist() == signal.knee.clamp(2, 4).tolist()


def test_the_uniform_tail_keeps_the_probability_of_every_cached_entry():
    teacher = normal(7)
    signal = sparse(teacher, 6)
    probabilities, live = signal.rows().softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(probabilities.gather(-1, signal.ids), live.gather(-1, signal.ids))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(T, dtype=torch.float64))


def test_the_floor_tail_is_the_smallest_cached_logit():
    teacher = normal(8)
    rows = sparse(teacher, 6, "floor").rows()
    smallest = teacher.sort(descending=True).values[:, 5]
    outside = torch.ones_like(rows, dtype=torch.bool).scatter_(-1, sparse(teacher, 6).ids, False)
    assert (rows[outside].reshape(T, -1) == smallest.unsqueeze(-1)).all()
    assert (rows >= teacher)[outside].all()


def test_every_tail_policy_is_described():
    assert set(TAIL_POLICIES) == {"uniform", "floor"}


@pytest.mark.parametrize("make", [lambda z: sparse(z, 9), DenseSignal])
def test_select_keeps_the_chosen_positions(make):
    teacher = normal(9)
    keep = torch.tensor([True, False, True, True, False])
    chosen = make(teacher).select(keep)
    assert len(chosen) == 3
    torch.testing.assert_close(chosen.rows(), make(teacher).rows()[keep])
    assert chosen.lead()[1].tolist() == make(teacher).lead()[1][keep].tolist()


def test_no_position():
    signal = sparse(normal(1), 6).select(torch.zeros(T, dtype=torch.bool))
    assert signal.rows().shape == (0, N)
    assert dbild_loss(torch.zeros(0, N), signal) == 0
