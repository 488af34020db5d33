"""The knee against eqs. 8-9 written as a loop."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchkd.losses import kneedle


@pytest.mark.parametrize(("positions", "rows"), [(1, 2), (3, 3), (7, 47), (5, 1234)])
@pytest.mark.parametrize("ties", (False, True))
def test_equals_the_loop(positions, rows, ties):
    z = torch.randn(positions, rows, dtype=torch.float64, generator=torch.Generator().manual_seed(rows)) * 5
    z = z.round() if ties else z
    assert kneedle(z).tolist() == [reference.knee(row) for row in z]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(-8, 8), min_size=2, max_size=30), st.sampled_from([None, 2, 3, 7]))
def test_equals_the_loop_on_anything(values, window):
    z = torch.tensor([values], dtype=torch.float64)
    assert kneedle(z, window).item() == reference.knee(z[0], window)


def test_all_equal_logits_give_two():
    assert kneedle(torch.full((2, 9), 1.5)).tolist() == [2, 2]


def test_a_drop_after_k_is_found():
    z = torch.cat([torch.full((1, 100), 10.0), torch.linspace(1, 0, 900).unsqueeze(0)], dim=-1)
    assert 100 <= kneedle(z).item() <= 102


def test_float32_and_half_agree_with_float64_of_the_same_values():
    z = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1)) * 6
    for dtype in (torch.float32, torch.bfloat16):
        assert kneedle(z.to(dtype)).tolist() == kneedle(z.to(dtype).double()).tolist()


def test_no_position_gives_no_knee():
    assert kneedle(torch.zeros(0, 9)).shape == (0,)


def test_one_column_is_refused():
    with pytest.raises(ValueError, match="at least 2 logits"):
        kneedle(torch.zeros(3, 1))
