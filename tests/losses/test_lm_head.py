"""Float32 logits from half-precision heads, and the stored knee beside them."""

import pytest
import reference
import torch
import torch.nn.functional as F
from loss_cases import normal

from switchkd.losses import LMHead, dbild_loss, fused_dbild, kneedle, lm_head
from switchkd.losses.lm_head import float32_logits
from switchkd.losses.objective import Objective
from switchkd.losses.selection import entries_up_to, top_of_rows
from switchkd.losses.signals import DenseSignal, HiddenSignal

HALVES = (torch.bfloat16, torch.float16)
# Rows of a head: fewer than are raised at a time, exactly as many, and a last piece of one row.
SIZES = (7, lm_head.RAISED_ROWS, 2 * lm_head.RAISED_ROWS + 1)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", (False, True))
def test_half_precision_heads_give_float32_logits(dtype, rows, bias):
    hidden, weight = normal(1, 5, 64, dtype=dtype), normal(2, rows, 64, dtype=dtype)
    of_bias = normal(3, rows, dtype=dtype) if bias else None
    exact = F.linear(hidden.double(), weight.double(), None if of_bias is None else of_bias.double())
    found = LMHead(weight, of_bias).logits(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-5)
    rounded = F.linear(hidden, weight, of_bias).double()  # what a head's own product returns
    assert (found - exact).abs().max() < 1e-3 * (rounded - exact).abs().max()


@pytest.mark.parametrize("dtype", HALVES)
def test_stored_states_are_not_rounded_to_the_dtype_of_the_head(dtype):
    hidden, weight = normal(1, 5, 64, dtype=torch.float32), normal(2, 40, 64, dtype=dtype)
    torch.testing.assert_close(
        float32_logits(hidden, weight).double(), hidden.double() @ weight.double().T, rtol=1e-6, atol=1e-5
    )


@pytest.mark.parametrize(("dtype", "error"), ((torch.bfloat16, 2.0**-17), (torch.float16, 2.0**-20)))
def test_on_cuda_two_addends_hold_a_state(dtype, error):
    hidden = normal(1, 50, 64, dtype=torch.float32)
    upper, lower = lm_head._addends(hidden, dtype)
    assert upper.dtype == lower.dtype == dtype
    assert ((upper.double() + lower.double() - hidden).abs() <= error * hidden.abs() + 1e-7).all()
    assert len(lm_head._addends(hidden.to(dtype), dtype)) == 1


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_whole_precision_heads_are_plain_linear_layers(dtype):
    hidden, weight, bias = normal(1, 5, 64), normal(2, 40, 64, dtype=dtype), normal(3, 40, dtype=dtype)
    assert torch.equal(float32_logits(hidden, weight, bias), F.linear(hidden.to(dtype), weight, bias))


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_and_inference_mode_change_nothing(dtype):
    hidden, weight = normal(1, 5, 64, dtype=dtype), normal(2, 600, 64, dtype=dtype)
    exact = float32_logits(hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(float32_logits(hidden, weight), exact)
        assert float32_logits(hidden.float(), weight.float()).dtype == torch.float32
    with torch.inference_mode():
        assert torch.equal(float32_logits(hidden, weight), exact)
    assert float32_logits(hidden[:0], weight).shape == (0, 600)


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_through_a_half_precision_head(dtype):
    leaves = [normal(1, 5, 64, dtype=dtype), normal(2, 600, 64, dtype=dtype), normal(3, 600, dtype=dtype)]
    wanted = normal(4, 5, 600)

    def gradients(forward, *inputs):
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        return torch.autograd.grad((forward(*inputs) * wanted).sum(), inputs)

    found = gradients(float32_logits, *leaves)
    exact = gradients(F.linear, *(x.double() for x in leaves))
    for one, other, leaf in zip(found, exact, leaves, strict=True):
        assert one.dtype == leaf.dtype
        torch.testing.assert_close(one.double(), other, rtol=0, atol=float(other.abs().max()) * 2**-7)


@pytest.mark.parametrize("rows", (33, 1500))
def test_the_fused_loss_of_natively_bfloat16_models_is_that_of_float32_logits(rows):
    """Student, teacher and switch pathway have bfloat16 heads; the reference multiplies the same numbers in float64."""
    half = torch.bfloat16
    hidden, head = normal(1, 6, 48, dtype=half), normal(2, rows + 3, 48, dtype=half)
    theirs, their_head = normal(3, 6, 32, dtype=half), normal(4, rows, 32, dtype=half)
    switch = normal(5, 4, 32, dtype=half)
    on_image, targets = torch.tensor([1, 1, 0, 1, 0, 1]).bool(), torch.arange(6)
    found = fused_dbild(
        hidden, LMHead(head), targets, HiddenSignal(theirs, their_head),
        switch_hidden=switch, switch_head=LMHead(their_head), on_image=on_image,
    )  # fmt: skip
    student, teacher = hidden.double() @ head.double().T, theirs.double() @ their_head.double().T
    switched = switch.double() @ their_head.double().T
    exact = (
        F.cross_entropy(student, targets, reduction="sum"),
        reference.dbild(student[:, :rows], teacher, 3.0, "reverse_kl").sum(),
        reference.dbild(switched, teacher[on_image], 3.0, "reverse_kl").sum(),
    )
    torch.testing.assert_close(torch.stack(found.terms).double(), torch.stack(exact), rtol=1e-5, atol=1e-6)


def test_the_order_and_knee_of_a_bfloat16_teacher_are_those_of_float32_logits():
    # Small integers: float32 adds their products without rounding, so the order is equal and not nearly equal.
    theirs, head = ((normal(seed, size, 64) * 8).round().bfloat16() for seed, size in ((3, 40), (4, 3000)))
    exact = (theirs.double() @ head.double().T).float()
    signal = HiddenSignal(theirs, head).slice_rows(slice(None))
    ids, k = signal.leading_ids(signal.logits)
    assert torch.equal(k, kneedle(exact))
    for found, wanted, count in zip(ids, top_of_rows(exact, int(k.max())), k, strict=True):
        assert torch.equal(found[:count], wanted[:count])
    assert not torch.equal(kneedle(F.linear(theirs, head)), k)  # otherwise the test shows nothing


class TestStoredKnee:
    """`HiddenSignal.knee`: eq. 8-9's k of the exact logits, beside logits that are slightly off."""

    @staticmethod
    def signal(knee, rows=60):
        return HiddenSignal(normal(1, 5, 16), normal(2, rows, 16), torch.tensor(knee))

    def test_it_replaces_the_knee_of_the_logits(self):
        signal = self.signal([2, 9, 60, 30, 5])
        logits = signal.rows(logits_like(signal))
        ids, k = signal.leading_ids(logits)
        assert k.tolist() == [2, 9, 60, 30, 5]
        for row, (found, count) in enumerate(zip(ids, k, strict=True)):
            assert found[:count].tolist() == reference.ranking(logits[row])[:count]

    def test_a_knee_outside_the_rows_is_held_inside(self):
        signal = self.signal([0, 1, 61, 7, 8])
        assert signal.leading_ids(signal.rows(logits_like(signal)))[1].tolist() == [2, 2, 60, 7, 8]

    @pytest.mark.parametrize("window", (None, 60))
    def test_the_loss_uses_it(self, window):
        knee = [2, 9, 60, 30, 5]
        signal, student = self.signal(knee), normal(7, 5, 60).requires_grad_()
        teacher = signal.rows(student)
        exact = []
        for row, k in enumerate(knee):
            sides = reference.ranking(teacher[row])[:k], reference.ranking(student[row])[: reference.knee(student[row])]
            exact.append(
                sum(reference.logits_difference(student[row], teacher[row], ids, 3.0, "reverse_kl") for ids in sides)
            )
        found = dbild_loss(student, signal, reduction="none", window=window)
        torch.testing.assert_close(found, torch.stack(exact))

    def test_a_narrower_window_has_its_own_knee(self):
        signal, student = self.signal([2, 9, 60, 30, 5]), normal(7, 5, 60)
        plain = HiddenSignal(signal.hidden, signal.head)
        assert torch.equal(dbild_loss(student, signal, window=12), dbild_loss(student, plain, window=12))

    def test_selecting_and_slicing_keep_it(self):
        signal, keep = self.signal([2, 9, 60, 30, 5]), torch.tensor([True, False, True, False, True])
        for part, knees in (
            (signal.select(keep), [2, 60, 5]),
            (signal.slice_rows(slice(1, 4)), [9, 60, 30]),
            (signal.slice_rows(slice(0, 4)).select(keep[:4]).slice_rows(slice(1, 2)), [60]),
        ):
            logits = part.rows(torch.zeros(part.positions, 60, dtype=torch.float64))
            assert part.leading_ids(logits)[1].tolist() == knees

    def test_the_fused_loss_uses_it_in_every_term(self):
        signal = self.signal([2, 9, 60, 30, 5])
        hidden, head, switch = normal(3, 5, 8), normal(4, 60, 8), normal(5, 2, 16)
        on_image = torch.tensor([0, 1, 0, 0, 1]).bool()
        objective = Objective()
        for chunk in (None, 1, 2):
            found = fused_dbild(
                hidden, LMHead(head), torch.arange(5), signal, switch_hidden=switch,
                switch_head=LMHead(signal.head), on_image=on_image, chunk_positions=chunk,
            )  # fmt: skip
            exact = objective.terms(hidden @ head.T, torch.arange(5), signal, switch @ signal.head.T, on_image)
            torch.testing.assert_close(torch.stack(found.terms), torch.stack(exact))

    def test_no_position(self):
        signal = HiddenSignal(normal(1, 0, 16), normal(2, 60, 16), torch.zeros(0, dtype=torch.long))
        assert dbild_loss(normal(7, 0, 60), signal) == 0


def logits_like(signal):
    return torch.zeros(signal.positions, signal.vocab_rows, dtype=torch.float64)


@pytest.mark.parametrize("numbers", ("random", "ties", "equal", "masked", "nan"))
def test_entries_up_to_a_number_for_each_row(numbers):
    logits = normal(9, 6, 50, dtype=torch.float32)
    if numbers == "ties":
        logits = (logits * 2).round()
    elif numbers == "equal":
        logits = torch.zeros_like(logits)
    elif numbers == "masked":
        logits[:, ::3] = -torch.inf
    elif numbers == "nan":
        logits[2, 7] = torch.nan
    k = torch.tensor([2, 50, 11, 33, 34, 3])
    found = entries_up_to(logits, k)
    assert found.shape == (6, 50)
    for row, (ids, count) in enumerate(zip(found, k, strict=True)):
        if not logits[row].isnan().any():
            assert logits[row][ids[:count]].tolist() == sorted(logits[row].tolist(), reverse=True)[:count]
            if numbers != "masked":
                assert ids[:count].tolist() == reference.ranking(logits[row])[:count]
    assert entries_up_to(logits[:0], k[:0]).shape == (0, 2)


def test_a_window_of_all_rows_is_no_window():
    teacher, student = normal(1, 4, 30), normal(2, 4, 30)
    signal = DenseSignal(teacher, torch.tensor([5, 6, 7, 8]))
    assert torch.equal(dbild_loss(student, signal, window=30), dbild_loss(student, signal))
