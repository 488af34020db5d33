"""KL losses against a loop over the definition, values and gradients."""

import pytest
import torch

from switchkd.losses import kl_loss


def normal(seed, shape=(3, 47)):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3


def naive(student, teacher, direction, temperature):
    out = []
    for s, t in zip(student, teacher, strict=True):
        p, q = (s / temperature).softmax(0), (t / temperature).softmax(0)
        if direction == "forward":
            p, q = q, p
        out.append(sum(a * (a / b).log() for a, b in zip(p, q, strict=True)))
    return torch.stack(out)


@pytest.mark.parametrize("temperature", (0.5, 1.0, 3.0))
@pytest.mark.parametrize("direction", ("forward", "reverse"))
def test_equals_the_definition(direction, temperature):
    student, teacher = normal(1).requires_grad_(), normal(2)
    found = kl_loss(student, teacher, direction=direction, temperature=temperature, reduction="none")
    expected = naive(student, teacher, direction, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    grads = [torch.autograd.grad(x.sum(), student)[0] for x in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("direction", ("forward", "reverse"))
def test_a_model_is_at_no_distance_from_itself(direction):
    assert kl_loss(normal(3), normal(3), direction=direction) == 0


def test_the_directions_differ_and_swap():
    a, b = normal(4), normal(5)
    forward, reverse = kl_loss(a, b), kl_loss(a, b, direction="reverse")
    assert not torch.isclose(forward, reverse)
    torch.testing.assert_close(reverse, kl_loss(b, a))


def test_no_position_gives_zero():
    assert kl_loss(torch.zeros(0, 4), torch.zeros(0, 4)) == 0


def test_the_teacher_gets_no_gradient():
    teacher = normal(6).requires_grad_()
    kl_loss(normal(7).requires_grad_(), teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [({"direction": "both"}, "direction must be"), ({"temperature": -1.0}, "temperature must be positive")],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        kl_loss(normal(1), normal(2), **options)
