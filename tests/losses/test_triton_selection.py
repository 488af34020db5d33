"""Triton's kernels against a stable full sort and the reference's knee, on a GPU or in its interpreter (`make test-triton`)."""

import on_triton
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import SPECTRA

from switchkd.losses import dbild_loss, selection
from switchkd.losses.selection import entries_up_to, leading_entries, top_of_rows

pytestmark = on_triton.MARKS


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    pytest.importorskip("triton", reason="needs triton")
    monkeypatch.setattr(selection, "_in_triton", lambda rows: rows.dtype == torch.float32)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_leads(logits):
    """Knee and order are the reference's; the ids may be more than the largest knee."""
    ids, k = leading_entries(logits.to(on_triton.DEVICE))
    expected = logits.float().sort(dim=-1, descending=True, stable=True).indices
    assert k.tolist() == [reference.knee(row) for row in logits]
    assert ids.shape[-1] >= int(k.max()) and ids.min() >= 0 and ids.max() < logits.shape[-1]
    for row, count in enumerate(k.tolist()):
        assert ids[row, :count].tolist() == expected[row, :count].tolist()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("positions", "rows"), [(1, 2), (3, 7), (4, 3000), (2, 9001)])
def test_leads_are_those_of_a_stable_sort(positions, rows, spectrum, dtype):
    assert_leads(SPECTRA[spectrum](normal(positions, rows)).to(dtype))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from([-3.0, -1.0, -0.0, 0.0, 0.5, 0.75, 2.0, 9.0]), min_size=2, max_size=40))
def test_ties_at_any_place(values):
    assert_leads(torch.tensor([values]))


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 60), st.integers(0, 10_000), st.floats(0.01, 60))
def test_any_row(columns, seed, spread):
    assert_leads(normal(2, columns, seed=seed) * spread)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("count", (2, 8, 1000, 3000))
def test_tops_are_those_of_a_stable_sort(spectrum, count):
    z = SPECTRA[spectrum](normal(3, 3000))
    expected = z.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(top_of_rows(z.to(on_triton.DEVICE), count).cpu(), expected)


def test_as_many_as_each_row_asks_for():
    z, k = SPECTRA["ties"](normal(3, 3000)), torch.tensor([2, 700, 3000])
    found = entries_up_to(z.to(on_triton.DEVICE), k.to(on_triton.DEVICE)).cpu()
    expected = z.sort(dim=-1, descending=True, stable=True).indices
    for row, count in enumerate(k.tolist()):
        assert torch.equal(found[row, :count], expected[row, :count])


def test_masked_columns_do_not_count():
    z = normal(3, 200)
    z[0, ::3] = z[1, 50:] = -torch.inf
    found, k = leading_entries(z.to(on_triton.DEVICE))
    for row in range(3):
        there = (z[row] > -torch.inf).nonzero().squeeze(-1)
        assert int(k[row]) == reference.knee(z[row][there])
        order = z[row][there].sort(descending=True, stable=True).indices[: int(k[row])]
        assert found[row, : int(k[row])].tolist() == there[order].tolist()
    assert top_of_rows(z.to(on_triton.DEVICE), 200).cpu().sort().values.tolist() == [list(range(200))] * 3
    z[1, 1:] = -torch.inf
    with pytest.raises(ValueError, match="all but 1 of position 1 are -inf"):
        leading_entries(z.to(on_triton.DEVICE))


@pytest.mark.filterwarnings(
    "ignore:invalid value encountered:RuntimeWarning"
)  # the interpreter's arithmetic is numpy's
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_what_is_not_finite_is_no_crash(value):
    z = normal(2, 100)
    z[0, 7] = value
    ids, k = leading_entries(z.to(on_triton.DEVICE))
    assert int(k[1]) == reference.knee(z[1])
    assert ids.min() >= 0 and ids.max() < 100 and k.min() >= 2


def test_the_loss_and_its_gradient_are_the_same(monkeypatch):
    student, teacher = (normal(3, 500, seed=seed).mul(3).to(on_triton.DEVICE).requires_grad_() for seed in (1, 2))
    results = []
    for in_triton in (True, False):
        monkeypatch.setattr(selection, "_in_triton", lambda rows, chosen=in_triton: chosen)
        loss = dbild_loss(student, teacher.detach())
        results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


def test_the_check_before_a_run(monkeypatch):
    from switchkd.errors import ConfigError
    from switchkd.losses import triton_selection
    from switchkd.pipelines.training.step_ways.experimental import check_selection

    monkeypatch.setattr(selection, "_in_triton", lambda rows: selection._kernels == "triton")
    check_selection(torch.device(on_triton.DEVICE))
    assert selection._kernels == "triton"
    selection.use_kernels("torch")
    lead = triton_selection.lead
    monkeypatch.setattr(triton_selection, "lead", lambda rows: (lead(rows)[0].flip(-1), lead(rows)[1]))
    with pytest.raises(ConfigError, match="triton-selection: the kernels select otherwise than torch on"):
        check_selection(torch.device(on_triton.DEVICE))
    assert selection._kernels == "torch"


def test_one_wait_a_call(monkeypatch):
    """What reads a number from the device: `tolist` once, and nothing else."""
    from switchkd.losses import triton_selection

    z, calls = normal(3, 500).to(on_triton.DEVICE), []
    for name in ("item", "tolist", "__bool__", "__int__", "nonzero"):
        original = getattr(torch.Tensor, name)

        def counted(self, *given, original=original, name=name, **options):
            calls.append(name)
            return original(self, *given, **options)

        monkeypatch.setattr(torch.Tensor, name, counted)
    triton_selection.lead(z)
    assert calls == ["tolist"]
