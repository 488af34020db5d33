"""Triton's kernel of fp8 quantisation equals torch's operators bit for bit, on a GPU or in its interpreter (`make test-triton`)."""

import on_triton
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchkd.pipelines.training.step_ways import fp8_teacher

pytestmark = on_triton.MARKS


def assert_same(x, columns=None):
    pytest.importorskip("triton", reason="needs triton")
    from switchkd.pipelines.training.step_ways.fp8_kernel import quantise_rows_in_triton

    rows, scales = fp8_teacher.quantise_rows(x, columns)
    found, of_found = quantise_rows_in_triton(
        x.to(on_triton.DEVICE), None if columns is None else columns.to(on_triton.DEVICE)
    )
    assert torch.equal(of_found.cpu(), scales)
    torch.testing.assert_close(found.cpu().float(), rows.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("columns", (1, 16, 100, 2048, 5000))
def test_rows_of_any_size(columns, dtype):
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(5, columns, generator=generator) * torch.tensor([1, 1e-3, 100, 1e-20, 0]).unsqueeze(-1)
    assert_same(x.to(dtype))
    assert_same(x.to(dtype), torch.rand(columns, generator=generator))
    assert_same(x.to(dtype)[:, : columns // 2 + 1])  # rows that are not adjacent


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=20))
def test_any_row(values):
    assert_same(torch.tensor([[448.0, *values]]))
    assert_same(torch.tensor([values]))


def test_every_number_of_the_format_and_what_lies_halfway():
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    assert_same(torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2]).unsqueeze(0))
    assert_same(torch.zeros(0, 16))
