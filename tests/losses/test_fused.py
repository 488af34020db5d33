"""The fused objective against the same one on whole logits: values, gradients, dtypes, memory."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from loss_cases import Case, N, P, V, normal, objective
from side_by_side import peak_here

from switchkd.losses import LMHead, dbild_loss, fused_dbild
from switchkd.losses.baselines import BASELINES
from switchkd.losses.fused import CHUNK_LOGITS, loss_in_chunks
from switchkd.losses.objective import OBJECTIVES
from switchkd.losses.signals import HiddenSignal


@pytest.mark.parametrize("chunk", (1, 3, P, 100))
@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in BASELINES])
def test_fused_equals_whole_logits(name, chunk):
    case = Case.make(switch=name != "sft")
    wanted = objective(name)
    signal = case.signal() if wanted.needs_signal else None
    found = case.fused(wanted, signal, chunk)
    parts = case.whole(wanted, signal)
    torch.testing.assert_close(found.total, wanted.total(parts), rtol=1e-12, atol=1e-12)
    for a, b in zip(found.terms, parts, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(wanted.total(parts) / 11, case.inputs())
    for a, b in zip(torch.autograd.grad(found.total / 11, case.inputs()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ("hidden", "logits", "topk"))
@pytest.mark.parametrize("switch", (True, False))
def test_every_kind_of_teacher(kind, switch):
    case = Case.make(switch=switch)
    wanted = objective(switch=switch)
    parts = case.whole(wanted, case.signal(kind))
    expected = torch.autograd.grad(wanted.total(parts), case.inputs())
    found = torch.autograd.grad(case.fused(wanted, case.signal(kind), 3).total, case.inputs())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("block_logits", (1, 2 * V))
def test_blocks_of_a_chunk_change_nothing(monkeypatch, block_logits):
    case = Case.make()
    whole = torch.autograd.grad(case.fused(objective(), case.signal(), 5).total, case.inputs())
    monkeypatch.setattr("switchkd.losses.fused.BLOCK_LOGITS", {"cpu": block_logits})
    for a, b in zip(
        torch.autograd.grad(case.fused(objective(), case.signal(), 5).total, case.inputs()), whole, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_positions_have_weights():
    case, weights = Case.make(), torch.arange(P) / P
    wanted = objective()
    parts = case.whole(wanted, case.signal(), weights)
    found = case.fused(wanted, case.signal(), 3, weights)
    expected = torch.autograd.grad(wanted.total(parts), case.inputs())
    for a, b in zip(torch.autograd.grad(found.total, case.inputs()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(found.terms.vsd, parts.vsd.detach())


def test_float32_stays_close_to_float64():
    exact, single = Case.make(positions=40), Case.make(torch.float32, positions=40)
    results = []
    for case in (exact, single):
        total = case.fused(objective(), case.signal(), 16).total
        results.append([total.detach(), *torch.autograd.grad(total, case.inputs())])
    for a, b in zip(results[1], results[0], strict=True):
        assert (a.double() - b).abs().max() / b.abs().max() < 1e-5


def test_gradients_are_those_of_finite_differences():
    """gradcheck's comparison; it cannot be used itself, since it retains the graph."""
    case = Case.make(positions=3)
    wanted = objective(temperature=1.5)

    def value():
        with torch.no_grad():
            return case.fused(wanted, case.signal(), 2).total.item()

    found = torch.autograd.grad(case.fused(wanted, case.signal(), 2).total, case.inputs())
    step = 1e-6
    for tensor, gradient in zip(case.inputs(), found, strict=True):
        flat = tensor.detach().view(-1)
        for i in range(0, len(flat), 7):
            before = flat[i].item()
            flat[i] = before + step
            up = value()
            flat[i] = before - step
            down = value()
            flat[i] = before
            assert gradient.view(-1)[i].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-6)


def test_fused_dbild_is_the_public_face():
    case = Case.make(bias=False)
    found = fused_dbild(case.hidden, LMHead(case.weight), case.targets, case.signal(), window=12)
    logits = F.linear(case.hidden, case.weight)
    torch.testing.assert_close(found.terms.ce, F.cross_entropy(logits, case.targets, reduction="sum").detach())
    align = dbild_loss(logits[:, :N], case.teacher_logits, window=12, reduction="sum")
    torch.testing.assert_close(found.terms.align, align.detach())
    assert found.terms.vsd is None
    with pytest.raises(ValueError, match="divergence must be"):
        fused_dbild(case.hidden, LMHead(case.weight), case.targets, case.signal(), divergence="js")


def test_a_head_tied_to_the_embedding_gets_both_gradients():
    case = Case.make(bias=False, switch=False)
    ids = torch.arange(P)

    def gradient(loss_of):
        weight = case.weight.detach().clone().requires_grad_()
        hidden = F.embedding(ids, weight).tanh()
        return torch.autograd.grad(loss_of(hidden, weight), weight)[0]

    wanted = objective("sft")
    whole = gradient(lambda h, w: F.cross_entropy(F.linear(h, w), case.targets, reduction="sum"))
    fused = gradient(lambda h, w: wanted.fused(h, LMHead(w), case.targets, None).total)
    torch.testing.assert_close(fused, whole)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_heads_have_float32_losses(dtype):
    """Rounded weights and states, then the float32 loss on their logits; gradients in the dtype of what they belong to."""
    half = Case.make(dtype)
    names = ("hidden", "weight", "bias", "switch_hidden")
    raised = {name: getattr(half, name).detach().float().requires_grad_() for name in names}
    teacher = {name: getattr(half, name).float() for name in ("teacher_hidden", "teacher_head")}
    single = replace(half, **raised, **teacher)
    results = []
    for case in (half, single):
        total = case.fused(objective(), case.signal(), 3).total
        assert total.dtype == torch.float32
        results.append([total.detach(), *torch.autograd.grad(total, case.inputs())])
    assert [g.dtype for g in results[0][1:]] == [dtype] * 4
    for a, b in zip(*results, strict=True):
        assert (a.float() - b).abs().max() / b.abs().max() < 0.05


def test_autocast_runs_the_students_head_in_its_dtype_and_leaves_float32_gradients():
    case = Case.make(torch.float32)
    wanted = objective("fkl")  # smooth: rounded logits move no knee
    with torch.autocast("cpu", torch.bfloat16):
        total = case.fused(wanted, case.signal(), 3).total
    gradients = torch.autograd.grad(total, case.inputs())
    assert [g.dtype for g in gradients] == [torch.float32] * 4
    exact = case.fused(wanted, case.signal(), 3).total
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=0.02) and total.item() != exact.item()
    for a, b in zip(gradients, torch.autograd.grad(exact, case.inputs()), strict=True):
        assert (a - b).abs().max() / b.abs().max() < 0.05


def test_frozen_inputs_get_no_gradient():
    case = Case.make()
    case.weight.requires_grad_(False)
    total = case.fused(objective(), case.signal()).total
    total.backward()
    assert case.weight.grad is None
    assert case.hidden.grad is not None and case.switch_hidden.grad is not None


def test_without_gradients_the_value_is_the_same():
    case = Case.make()
    with torch.no_grad():
        found = case.fused(objective(), case.signal()).total
    assert not found.requires_grad
    torch.testing.assert_close(found, case.fused(objective(), case.signal()).total.detach())


@pytest.mark.parametrize("switch", (True, False))
def test_no_position_gives_zero_with_a_graph(switch):
    case = Case.make(positions=0, switch=switch)
    found = case.fused(objective(switch=switch), case.signal())
    found.total.backward()
    assert found.total == 0
    assert all(x.grad.abs().sum() == 0 for x in case.inputs())


def test_it_goes_backward_once():
    case = Case.make()
    total = case.fused(objective(), case.signal()).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can go backward once: do not retain its graph"):
        total.backward()


def test_switch_arguments_go_together():
    case = Case.make()
    with pytest.raises(ValueError, match="switch_hidden comes with switch_head and on_image"):
        fused_dbild(case.hidden, LMHead(case.weight), case.targets, case.signal(), switch_hidden=case.switch_hidden)
    case.on_image = ~case.on_image
    with pytest.raises(ValueError, match=r"on_image marks 2 positions, switch_hidden has 5"):
        case.fused(objective(), case.signal())


def test_the_teachers_knee_is_looked_for_once_a_chunk(monkeypatch):
    calls = []
    from switchkd.losses import signals

    find = signals.leading_entries
    monkeypatch.setattr(signals, "leading_entries", lambda *a: calls.append(1) or find(*a))
    case = Case.make()
    case.fused(objective(), case.signal(), 3)
    assert len(calls) == 3  # chunks of 3, 3 and 1 positions; Align and VSD share


def test_memory_does_not_grow_with_the_positions():
    """T = 256 and T = 4,096 within 10 %; only the gradients of the hidden states, [T, d], are taken off."""
    width, vocabulary = 16, 1000
    peaks = {}
    for positions in (256, 4096):
        hidden, switch_hidden = (normal(i, positions, width, dtype=torch.float32).requires_grad_() for i in (1, 2))
        weight, head = normal(3, vocabulary, width, dtype=torch.float32).requires_grad_(), normal(4, vocabulary, width)
        signal = HiddenSignal(normal(5, positions, width, dtype=torch.float32), head.float())
        targets, on_image = torch.zeros(positions, dtype=torch.long), torch.ones(positions, dtype=torch.bool)

        def step(
            hidden=hidden, weight=weight, switch_hidden=switch_hidden, signal=signal, targets=targets, on=on_image
        ):
            total = fused_dbild(
                hidden,
                LMHead(weight),
                targets,
                signal,
                switch_hidden=switch_hidden,
                switch_head=LMHead(signal.head),
                on_image=on,
                chunk_positions=256,
            ).total
            return torch.autograd.grad(total, (hidden, weight, switch_hidden))

        peaks[positions] = peak_here(step) - 2 * hidden.nbytes
    assert peaks[4096] < 1.1 * peaks[256]
    assert peaks[256] > 4 * 256 * vocabulary  # a chunk's logits are among what is counted


def test_chunks_are_bounded_by_their_logits():
    seen = []

    def open_chunk(rows):
        seen.append(rows.stop - rows.start)
        return lambda block: (block.logits.sum(), torch.zeros(3))

    loss_in_chunks(torch.zeros(10, 1), LMHead(torch.zeros(CHUNK_LOGITS // 4, 1)), open_chunk)
    assert seen == [4, 4, 2]
