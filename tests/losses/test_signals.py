"""Cached and live teachers behind one type: where a store covers what is asked, both give the same loss."""

import pytest
import torch

from switchkd.losses import bild_loss, dbild_loss, kl_loss, kneedle
from switchkd.losses.signals import TAIL_POLICIES, DenseSignal, SparseSignal

T, N = 5, 40


def normal(seed, spread=3.0):
    return torch.randn(T, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * spread


def sparse(teacher, k, tail="student"):
    ordered, ids = teacher.sort(dim=-1, descending=True, stable=True)
    tail_logsumexp = ordered[:, k:].logsumexp(-1)
    return SparseSignal(ids[:, :k], ordered[:, :k], tail_logsumexp, kneedle(teacher), teacher.shape[-1], tail)


@pytest.mark.parametrize("loss", [dbild_loss, bild_loss, kl_loss])
def test_a_full_cache_equals_the_live_teacher(loss):
    student, teacher = normal(1), normal(2)
    torch.testing.assert_close(loss(student, sparse(teacher, N)), loss(student, DenseSignal(teacher)))


def test_a_window_inside_the_cache_leads_as_the_live_teacher():
    teacher = normal(4)
    signal = sparse(teacher, 12)
    ids, k = signal.leading_ids(signal.rows(normal(1)), window=12)
    live_ids, live_k = DenseSignal(teacher).leading_ids(teacher, window=12)
    assert k.tolist() == live_k.tolist()
    assert torch.equal(ids, live_ids)


def test_a_window_beyond_the_cache_is_refused():
    with pytest.raises(ValueError, match="window = 13 asks for more than the 12 cached"):
        sparse(normal(4), 12).leading_ids(normal(4), window=13)


def test_bild_inside_the_cache_equals_the_live_teacher_where_the_student_stays_inside():
    teacher = normal(5)
    student = teacher * 1.1  # the same order, so the student's eight are cached too
    torch.testing.assert_close(bild_loss(student, sparse(teacher, 8)), bild_loss(student, teacher))


def test_more_leaders_than_cached_are_refused():
    with pytest.raises(ValueError, match="8 leading logits asked for, 6"):
        bild_loss(normal(1), sparse(normal(2), 6))


@pytest.mark.parametrize("tail", ("uniform", "floor"))
def test_without_the_student_the_lead_is_cut_at_the_cache(tail):
    signal = sparse(normal(6), 4, tail)
    _, k = signal.leading_ids(signal.rows(normal(1)))
    assert k.tolist() == signal.knee.clamp(2, 4).tolist()


def test_with_the_student_the_lead_goes_on_to_the_knee_in_the_students_order():
    teacher, student = normal(6), normal(1)
    signal = sparse(teacher, 4)
    ids, k = signal.leading_ids(signal.rows(student))
    assert k.tolist() == kneedle(teacher).tolist()
    assert (k > 4).any()
    assert torch.equal(ids[:, :4], signal.ids)
    for row in range(T):
        tail = ids[row, 4 : k[row]]
        order = [i for i in student[row].argsort(descending=True).tolist() if i not in signal.ids[row].tolist()]
        guess = signal.rows(student)[row]
        assert sorted(guess[tail].tolist()) == sorted(guess[order[: len(tail)]].tolist())


@pytest.mark.parametrize("tail", ("student", "uniform"))
def test_the_tails_mass_keeps_the_probability_of_every_cached_entry(tail):
    teacher = normal(7)
    signal = sparse(teacher, 20, tail)
    probabilities, live = signal.rows(normal(1)).softmax(-1), teacher.softmax(-1)
    torch.testing.assert_close(probabilities.gather(-1, signal.ids), live.gather(-1, signal.ids), rtol=0.02, atol=0)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(T, dtype=torch.float64))


def test_the_students_tail_keeps_its_order_and_stays_below_the_cache():
    teacher, student = normal(7), normal(1)
    signal = sparse(teacher, 6)
    rows = signal.rows(student)
    outside = torch.ones_like(rows, dtype=torch.bool).scatter_(-1, signal.ids, False)
    for row in range(T):
        guess, own = rows[row][outside[row]], student[row][outside[row]]
        assert (guess <= signal.logits[row, -1]).all()
        assert (guess[own.argsort()].diff() >= 0).all()
    assert torch.equal(rows.gather(-1, signal.ids), signal.logits)


def test_kl_with_the_students_tail_is_the_bucket_kl():
    """Where no guess is held down, the tail counts by its mass alone: K + 1 buckets."""
    teacher = normal(7)
    teacher[:, :8] += 40  # far above the rest, so that the ceiling is never reached
    signal, student = sparse(teacher, 8), normal(1)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    inside = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, signal.ids, True)
    buckets = [
        torch.cat([x.gather(-1, signal.ids), x.masked_fill(inside, -torch.inf).logsumexp(-1, True)], -1) for x in (p, q)
    ]
    expected = (buckets[0].exp() * (buckets[0] - buckets[1])).sum(-1).mean()
    torch.testing.assert_close(kl_loss(student, signal), expected)


def test_the_guess_of_the_student_is_nearer_than_the_others():
    """The gradient of DBiLD against the live teacher's, for a student that is close to it."""
    teacher = torch.randn(8, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 3
    noise = torch.randn(8, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def gradient(signal):
        student = (teacher + 0.5 * noise).requires_grad_()
        return torch.autograd.grad(dbild_loss(student, signal, reduction="sum"), student)[0]

    exact = gradient(DenseSignal(teacher))
    errors = {
        tail: ((gradient(sparse(teacher, 20, tail)) - exact).norm() / exact.norm()).item() for tail in TAIL_POLICIES
    }
    assert errors["student"] < 0.9 * min(errors["uniform"], errors["floor"])


def test_the_floor_tail_is_the_smallest_cached_logit():
    teacher = normal(8)
    rows = sparse(teacher, 6, "floor").rows(normal(1))
    smallest = teacher.sort(descending=True).values[:, 5]
    outside = torch.ones_like(rows, dtype=torch.bool).scatter_(-1, sparse(teacher, 6).ids, False)
    assert (rows[outside].reshape(T, -1) == smallest.unsqueeze(-1)).all()
    assert (rows >= teacher)[outside].all()


def test_every_tail_policy_is_described():
    assert set(TAIL_POLICIES) == {"student", "uniform", "floor"}


@pytest.mark.parametrize("make", [lambda z: sparse(z, 9), DenseSignal])
def test_select_keeps_the_chosen_positions(make):
    teacher = normal(9)
    keep = torch.tensor([True, False, True, True, False])
    chosen = make(teacher).select(keep)
    assert chosen.positions == 3
    rows, kept = make(teacher).rows(normal(1)), chosen.rows(normal(1)[keep])
    torch.testing.assert_close(kept, rows[keep])
    assert chosen.leading_ids(kept)[1].tolist() == make(teacher).leading_ids(rows)[1][keep].tolist()


def test_no_position():
    signal = sparse(normal(1), 6).select(torch.zeros(T, dtype=torch.bool))
    assert signal.rows(torch.zeros(0, N)).shape == (0, N)
    assert dbild_loss(torch.zeros(0, N), signal) == 0
