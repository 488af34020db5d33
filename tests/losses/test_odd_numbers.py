"""Logits as they come from elsewhere: masked columns, NaN, other strides, saturated rows."""

import pytest
import reference
import torch
from torch.autograd import gradcheck

from switchkd.errors import NonFiniteLogits, RunError
from switchkd.losses import bild_loss, dbild_loss, kl_loss, kneedle, selection
from switchkd.losses.objective import OBJECTIVES, Objective
from switchkd.losses.selection import leading_entries, top_of_rows
from switchkd.losses.signals import DenseSignal, SparseSignal

T, N = 5, 400
LOSSES = {"dbild": dbild_loss, "bild": bild_loss, "kl": kl_loss}


def rows(seed, scale=4.0, positions=T, columns=N, dtype=torch.float64):
    return torch.randn(positions, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def value_and_gradient(loss, student, teacher, **options):
    leaf = student.detach().requires_grad_()
    found = loss(leaf, teacher, reduction="none", **options)
    return found.detach(), torch.autograd.grad(found.sum(), leaf)[0]


@pytest.fixture(params=("numpy", "what an accelerator runs"))
def path(request, monkeypatch):
    if request.param != "numpy":
        monkeypatch.setattr(selection, "_in_numpy", lambda rows: False)


# ---- masked columns


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("divergence", (0, 1))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_masked_columns_give_the_value_of_the_others(name, divergence, dtype):
    """A vocabulary whose last columns and some others are masked, on both sides: value and gradient are those without them."""
    kept = torch.tensor([i for i in range(N) if i % 7 != 3 and i < N - 25])
    options = {"direction": ("forward", "reverse")[divergence]} if name == "kl" else {
        "divergence": ("forward_kl", "reverse_kl")[divergence]
    }  # fmt: skip
    student, teacher = rows(1, dtype=dtype), rows(2, dtype=dtype)
    mask = torch.ones(N, dtype=torch.bool)
    mask[kept] = False
    expected, gradient = value_and_gradient(LOSSES[name], student[:, kept], teacher[:, kept], **options)
    found, of_all = value_and_gradient(
        LOSSES[name], student.masked_fill(mask, -torch.inf), teacher.masked_fill(mask, -torch.inf), **options
    )
    close = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(of_all[:, kept], gradient, **close)
    assert (of_all[:, mask] == 0).all()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("window", (None, 2, 30, 399))
def test_the_knee_and_order_of_masked_rows_are_those_of_the_other_columns(window):
    z = rows(3)
    z[0, ::2] = -torch.inf
    z[1, 2:] = -torch.inf  # two columns are left
    z[3, :] = z[3, :].round()
    z[3, 5:300] = -torch.inf
    ids, k = leading_entries(z, window)
    for row, found, count in zip(z, ids, k.tolist(), strict=True):
        there = (row > -torch.inf).nonzero().flatten()
        assert count == reference.knee(row[there], window)
        assert found[:count].tolist() == there[reference.ranking(row[there])][:count].tolist()
    assert kneedle(z, window).tolist() == k.tolist()


@pytest.mark.usefixtures("path")
def test_the_tops_of_a_row_with_few_columns_end_with_masked_ones():
    z = rows(4, columns=12)
    z[2, 3:] = -torch.inf
    expected = z.sort(dim=-1, descending=True, stable=True).indices[:, :8]
    assert torch.equal(top_of_rows(z, 8), expected)


def test_a_column_that_one_side_masks_is_in_no_pair():
    student, teacher = rows(5), rows(6)
    leading = int(teacher[0].argmax())
    student[:, leading] = -torch.inf
    found, gradient = value_and_gradient(dbild_loss, student, teacher)
    assert found.isfinite().all() and gradient.isfinite().all()
    ids, k = leading_entries(teacher)
    led_t = [i for i in ids[0, : k[0]].tolist() if i != leading]
    there = [i for i in range(N) if i != leading]
    led_s = [there[i] for i in reference.ranking(student[0][there])[: reference.knee(student[0][there])]]
    sides = [reference.logits_difference(student[0], teacher[0], ids, 3.0, "reverse_kl") for ids in (led_t, led_s)]
    torch.testing.assert_close(found[0], sum(sides), rtol=1e-10, atol=1e-12)


def test_gradients_of_masked_rows_are_those_of_finite_differences():
    student, teacher = rows(7, positions=2, columns=9), rows(8, positions=2, columns=9)
    mask = torch.arange(9) % 4 == 1
    teacher = teacher.masked_fill(mask, -torch.inf)
    free = student[:, ~mask].requires_grad_()

    def loss(part):
        whole = torch.full_like(student, -torch.inf)
        return dbild_loss(whole.masked_scatter(~mask.expand_as(whole), part), teacher, reduction="sum")

    assert gradcheck(loss, (free,), eps=1e-7, atol=1e-5)


def test_too_few_columns_are_refused_with_the_position():
    z = rows(9)
    z[3, 1:] = -torch.inf
    for window in (None, 10):
        with pytest.raises(ValueError, match="a knee needs at least 2 logits a row, all but 1 of position 3 are -inf"):
            leading_entries(z, window)


# ---- NaN and infinity


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("side", ("student", "teacher"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_what_is_not_finite_is_refused_with_its_position(name, side, value):
    logits = {"student": rows(10), "teacher": rows(11)}
    logits[side][2, int(logits[side][2].argmin())] = value  # nowhere near the leading entries
    with pytest.raises(
        NonFiniteLogits, match=f"the {side}'s logits at position 2 of {T} are not finite: .* is {value}"
    ):
        LOSSES[name](logits["student"], logits["teacher"])
    assert issubclass(NonFiniteLogits, RunError) and issubclass(NonFiniteLogits, ValueError)


@pytest.mark.parametrize("name", [name for name, loss in OBJECTIVES.items() if loss is not None])
def test_every_objective_refuses_nan(name):
    student = rows(12)
    student[1, 0] = float("nan")
    with pytest.raises(NonFiniteLogits, match="position 1"):
        Objective(name, switch=False).divergence(student, DenseSignal(rows(13)))


# ---- strides

LAYOUTS = {
    "transposed": lambda z: z.t().contiguous().t(),
    "every second column": lambda z: torch.stack([z, z + 1], -1).reshape(len(z), -1)[:, ::2],
    "columns of a wider row": lambda z: torch.cat([z, z], -1)[:, : z.shape[1]],
    "one row expanded": lambda z: z[:1].expand_as(z),
    "reversed rows of a stack": lambda z: torch.stack([z, z])[1],
}


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_strides_change_nothing(name, layout, dtype):
    student, teacher = (LAYOUTS[layout](rows(seed).to(dtype)) for seed in (14, 15))
    expected = value_and_gradient(LOSSES[name], student.contiguous(), teacher.contiguous())
    found = value_and_gradient(LOSSES[name], student, teacher)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_change_no_selection(layout):
    z = LAYOUTS[layout](rows(16, dtype=torch.float32))
    assert torch.equal(top_of_rows(z, 50), top_of_rows(z.contiguous(), 50))
    for a, b in zip(leading_entries(z), leading_entries(z.contiguous()), strict=True):
        assert torch.equal(a, b)


# ---- saturated rows


@pytest.mark.parametrize("divergence", ("reverse_kl", "forward_kl"))
@pytest.mark.parametrize("temperature", (0.5, 3.0))
def test_saturated_rows_in_float32(divergence, temperature):
    """A spread of 60 at τ = 0.5: float32 stays as near to float64 as the rounding of its own logits allows."""
    positions, columns = 4, 3000
    student, teacher = (rows(seed, positions=positions, columns=columns) for seed in (17, 18))
    student, teacher = (60 * (z - z.amin()) / (z.amax() - z.amin()) for z in (student, teacher))
    student, teacher = student.float(), teacher.float()
    options = {"divergence": divergence, "temperature": temperature}
    exact, of_exact = value_and_gradient(dbild_loss, student.double(), teacher.double(), **options)
    found, of_found = value_and_gradient(dbild_loss, student, teacher, **options)
    # Logits of 60 are known to 2^-18 = 4e-6 in float32, differences over τ to 4e-6 · 2 / τ, and the value is a mean of them.
    bound = 2**-18 * 4 / temperature
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=bound)
    assert ((of_found.double() - of_exact).norm() / of_exact.norm()) < 2e-5


def test_an_unknown_tail_is_refused():
    ordered, ids = rows(19, columns=12).sort(dim=-1, descending=True)
    with pytest.raises(ValueError, match="tail is one of student, uniform, floor, got 'studnet'"):
        SparseSignal(ids[:, :4], ordered[:, :4], ordered[:, 4:].logsumexp(-1), torch.full((T,), 3), 12, "studnet")
