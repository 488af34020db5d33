"""Threshold and count against a stable full sort: which entries lead, in which order, up to which knee."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import SPECTRA, assert_leads

from switchkd.losses import selection
from switchkd.losses.selection import kneedle, leading_entries, top_of_rows, tops_and_knees


def normal(positions, rows, seed=0, dtype=torch.float32):
    return torch.randn(positions, rows, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("positions", "rows"), [(1, 2), (3, 7), (5, 3000), (2, 9001)])
def test_leads_are_those_of_a_stable_sort(positions, rows, spectrum, dtype):
    z = SPECTRA[spectrum](normal(positions, rows)).to(dtype)
    found = leading_entries(z)
    assert found[1].tolist() == [reference.knee(row) for row in z]
    assert_leads(found, z)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_what_an_accelerator_runs_finds_the_same(spectrum, dtype, monkeypatch):
    z = SPECTRA[spectrum](normal(5, 3000)).to(dtype)
    found, top = leading_entries(z), top_of_rows(z, 100)
    monkeypatch.setattr(selection, "_in_numpy", lambda rows: False)
    assert_leads(leading_entries(z), z)
    assert torch.equal(leading_entries(z)[1], found[1]) and torch.equal(top_of_rows(z, 100), top)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 0.75, 2.0, 9.0]), min_size=2, max_size=40),
    st.sampled_from([2, 3, 50]),
)
def test_any_number_of_bins_gives_the_same(values, bins):
    z = torch.tensor([values])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "BINS", bins)
        assert_leads(leading_entries(z), z)
        assert kneedle(z).item() == reference.knee(z[0])
        assert top_of_rows(z, 2)[0].tolist() == reference.ranking(z[0])[:2]
        for count in (0, 1, 2, len(values)):
            ids, k = tops_and_knees(z, count)
            assert ids[0].tolist() == reference.ranking(z[0])[:count] and k.item() == reference.knee(z[0])


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("count", (2, 8, 1000, 3000))
def test_tops_are_those_of_a_stable_sort(spectrum, count):
    z = SPECTRA[spectrum](normal(4, 3000))
    expected = z.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(top_of_rows(z, count), expected)


@pytest.mark.parametrize("in_numpy", (True, False))
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("count", (0, 1, 8, 2500, 3000))
def test_tops_and_knees_at_once(spectrum, count, in_numpy, monkeypatch):
    z = SPECTRA[spectrum](normal(4, 3000))
    expected = z.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    if not in_numpy:
        monkeypatch.setattr(selection, "_in_numpy", lambda rows: False)
    ids, k = tops_and_knees(z, count)
    assert torch.equal(ids, expected) and k.tolist() == [reference.knee(row) for row in z]


@pytest.mark.parametrize("window", (2, 5, 300, 4000))
def test_a_window_looks_at_the_leading_logits_alone(window):
    z = SPECTRA["ties"](normal(3, 3000))
    found = leading_entries(z, window)
    assert found[1].tolist() == [reference.knee(row, window) for row in z]
    assert_leads(found, z)


def test_blocks_of_rows_change_nothing(monkeypatch):
    z = normal(11, 500) * torch.arange(1, 12).unsqueeze(-1)
    whole = leading_entries(z)
    monkeypatch.setattr(selection, "BLOCK_LOGITS", {"cpu": 1000})  # two rows at a time
    ids, k = leading_entries(z)
    assert torch.equal(k, whole[1])
    assert_leads((ids, k), z)


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
def test_what_is_not_finite_is_no_crash(value):
    """The loss is then not finite either, and the trainer stops the run."""
    z = normal(2, 100)
    z[0, 3] = value
    ids, _ = leading_entries(z)
    assert ids.min() >= 0 and ids.max() < 100
    assert kneedle(z)[1] == reference.knee(z[1])


def test_only_a_little_more_than_the_knee_is_sorted():
    z = SPECTRA["a long tail"](normal(4, 100_000))
    _, from_bin, _ = selection._histogram(z)
    floor = selection._bins_of_knee(from_bin)[0]
    assert (from_bin.gather(-1, floor.unsqueeze(-1)).squeeze(-1) < 2 * kneedle(z)).all()


def test_no_position():
    ids, k = leading_entries(torch.zeros(0, 9))
    assert ids.shape == (0, 2) and k.shape == (0,)
    assert top_of_rows(torch.zeros(0, 9), 3).shape == (0, 3)
