"""DBiLD, BiLD and the linear-time pair KL against the naive pairwise references: values and gradients."""

import pytest
import reference
import torch

from switchkd.losses import bild_loss, dbild_loss
from switchkd.losses.pairwise_kl import pair_kl
from switchkd.losses.signals import DenseSignal

DIVERGENCES = ("reverse_kl", "forward_kl")


def logits(positions: int, rows: int, seed: int, spread: float = 4.0, ties: bool = False) -> torch.Tensor:
    z = torch.randn(positions, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * spread
    return z.round() if ties else z


def with_gradient(loss_of, student):
    student = student.clone().requires_grad_()
    value = loss_of(student)
    (grad,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), grad


def assert_relative(found, expected, bound):
    scale = expected.abs().max().clamp_min(1e-6)  # k = 2 has one pair and a loss of 0
    assert ((found - expected).abs().max() / scale).item() <= bound


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", (0.7, 1.0, 3.0))
@pytest.mark.parametrize(
    ("positions", "rows", "ties"), [(1, 2, False), (3, 7, False), (5, 47, True), (4, 123, False), (2, 300, True)]
)
def test_dbild_equals_pairs(positions, rows, ties, temperature, divergence):
    student, teacher = logits(positions, rows, 1, ties=ties), logits(positions, rows, 2, ties=ties)
    found = with_gradient(
        lambda s: dbild_loss(s, teacher, temperature=temperature, divergence=divergence, reduction="none"), student
    )
    expected = with_gradient(lambda s: reference.dbild(s, teacher, temperature, divergence), student)
    for a, b in zip(found, expected, strict=True):
        assert_relative(a, b, 1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("k", (2, 3, 8, 31, 129, 512))
def test_bild_equals_pairs(k, divergence):
    student, teacher = logits(2, 600, 3), logits(2, 600, 4)
    found = with_gradient(lambda s: bild_loss(s, teacher, top_k=k, divergence=divergence, reduction="none"), student)
    expected = with_gradient(lambda s: reference.bild(s, teacher, k, 3.0, divergence), student)
    for a, b in zip(found, expected, strict=True):
        assert_relative(a, b, 1e-9)


@pytest.mark.parametrize("window", (2, 5, 40))
def test_window_restricts_the_knee_of_both_leaders(window):
    student, teacher = logits(3, 90, 5), logits(3, 90, 6)
    found = with_gradient(lambda s: dbild_loss(s, teacher, window=window, reduction="none"), student)
    expected = with_gradient(lambda s: reference.dbild(s, teacher, 3.0, "reverse_kl", window), student)
    for a, b in zip(found, expected, strict=True):
        assert_relative(a, b, 1e-9)


def test_a_real_vocabulary():
    """V = 151,936 with a long tail; the knee lies near a thousand, so the pairwise form still fits in memory."""
    noise = logits(2, 151_936, 7, spread=1.0)
    tail = -14 * (torch.arange(151_936, dtype=torch.float64) / 151_936).pow(0.08)
    teacher = tail[torch.randperm(151_936, generator=torch.Generator().manual_seed(8))] + 0.2 * noise[:1]
    student = teacher + 0.3 * noise[1:]
    found = with_gradient(lambda s: dbild_loss(s, teacher, reduction="none"), student)
    expected = with_gradient(lambda s: reference.dbild(s, teacher, 3.0, "reverse_kl"), student)
    for a, b in zip(found, expected, strict=True):
        assert_relative(a, b, 1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float32_stays_close_to_float64(divergence):
    """k = 8,192 and a spread of about 60, the hardest case of real vocabularies."""
    student, teacher = logits(4, 12_000, 9, spread=7.5), logits(4, 12_000, 10, spread=7.5)

    def loss_of(s, dtype):
        return bild_loss(s, teacher.to(dtype), top_k=8192, divergence=divergence, reduction="none")

    exact = with_gradient(lambda s: loss_of(s, torch.float64), student)
    single = with_gradient(lambda s: loss_of(s, torch.float32), student.float())
    for a, b in zip(single, exact, strict=True):
        assert_relative(a.double(), b, 1e-4)


def test_gradcheck_reaches_both_sides():
    u, v = logits(3, 6, 11, spread=1.0).requires_grad_(), logits(3, 6, 12, spread=1.0).requires_grad_()
    keep = torch.tensor([[1, 1, 0, 0, 0, 0], [1] * 5 + [0], [1] * 6], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda u, v: pair_kl(u, v, keep), (u, v))


def test_rows_that_rise_against_the_leader_keep_their_value():
    """Every pair of v is e^{-huge}: plain sums underflow, and the log-space path must take over, even beside safe rows."""
    u = torch.tensor([[200.0, 100.0, 0.0], [1.0, 0.5, 0.0]])
    v = torch.tensor([[0.0, 150.0, 300.0], [0.3, 0.1, 0.2]], requires_grad=True)
    keep = torch.ones(2, 3, dtype=torch.bool)
    expected = []
    for a, b in zip(u.double(), v.double(), strict=True):
        first, second = torch.triu_indices(3, 3, offset=1)
        expected.append(reference.kl((a[first] - a[second]).log_softmax(0), (b[first] - b[second]).log_softmax(0)))
    expected = torch.stack(expected)
    (expected_grad,) = torch.autograd.grad(expected.sum(), v)
    found = pair_kl(u, v, keep)
    (grad,) = torch.autograd.grad(found.sum(), v)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_log_space_path_equals_plain_path():
    u, v = logits(6, 40, 13, spread=2.0).requires_grad_(), logits(6, 40, 14, spread=2.0).requires_grad_()
    keep = torch.arange(40) < torch.tensor([2, 3, 17, 39, 40, 40]).unsqueeze(-1)
    plain = pair_kl(u, v, keep)
    grads = torch.autograd.grad(plain.sum(), (u, v))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("switchkd.losses.pairwise_kl.SMALLEST_SAFE_Z", float("inf"))
        in_log_space = pair_kl(u, v, keep)
        log_grads = torch.autograd.grad(in_log_space.sum(), (u, v))
    torch.testing.assert_close(plain, in_log_space, rtol=1e-12, atol=1e-13)
    for a, b in zip(grads, log_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_have_no_loss_and_no_gradient(divergence):
    z = logits(3, 50, 15)
    value, grad = with_gradient(lambda s: dbild_loss(s, z, divergence=divergence, reduction="none"), z)
    assert value.abs().max() == 0
    assert grad.abs().max() < 1e-15


def test_a_constant_added_to_a_row_changes_nothing():
    student, teacher = logits(3, 50, 16), logits(3, 50, 17)
    torch.testing.assert_close(dbild_loss(student + 5, teacher - 7), dbild_loss(student, teacher))


def test_permuting_the_vocabulary_changes_nothing():
    student, teacher = logits(3, 50, 18), logits(3, 50, 19)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(20))
    torch.testing.assert_close(dbild_loss(student[:, order], teacher[:, order]), dbild_loss(student, teacher))


def test_all_equal_logits_use_two():
    student, teacher = torch.zeros(2, 9, dtype=torch.float64), torch.full((2, 9), 3.0, dtype=torch.float64)
    value, grad = with_gradient(lambda s: dbild_loss(s, teacher), student)
    assert value == 0 and grad.abs().max() == 0


def test_no_position_gives_zero_with_a_graph():
    student = torch.zeros(0, 9, requires_grad=True)
    loss = dbild_loss(student, torch.zeros(0, 9))
    loss.backward()
    assert loss == 0 and student.grad.shape == (0, 9)


def test_half_precision_is_raised_to_float32():
    student, teacher = logits(3, 40, 21).bfloat16(), logits(3, 40, 22).bfloat16()
    assert dbild_loss(student, teacher).dtype == torch.float32
    torch.testing.assert_close(dbild_loss(student, teacher), dbild_loss(student.float(), teacher.float()))


def test_reductions_agree():
    student, teacher = logits(5, 30, 23), logits(5, 30, 24)
    each = dbild_loss(student, teacher, reduction="none")
    torch.testing.assert_close(dbild_loss(student, teacher, reduction="sum"), each.sum())
    torch.testing.assert_close(dbild_loss(student, teacher), each.mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "js"}, "divergence must be"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"reduction": "max"}, "reduction must be"),
        ({"window": 1}, "window must be at least 2"),
        ({"teacher_logits": torch.zeros(2, 8)}, r"\(2, 9\).*\(2, 8\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"student_logits": torch.zeros(2, 9), "teacher_logits": torch.zeros(2, 9)} | change
    with pytest.raises(ValueError, match=message):
        dbild_loss(**arguments)


def test_bild_refuses_a_top_k_outside_the_vocabulary():
    with pytest.raises(ValueError, match="top_k must lie between 2 and the 9"):
        bild_loss(torch.zeros(2, 9), DenseSignal(torch.zeros(2, 9)), top_k=10)
