"""Attention of packed rows in one kernel: which samples it is told, and that it equals attention token by token."""

import inspect
import sys

import pytest
import reference
import torch
import varlen
from hypothesis import given, settings
from hypothesis import strategies as st

from switchkd.errors import ConfigError
from switchkd.models import varlen_attention
from switchkd.models.packing import layout, pack_rows, positions_in_rows
from switchkd.models.varlen_attention import attend_varlen, blocks_of, check_kernel


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(varlen_attention, "kernel_for", lambda device, dtype: varlen.varlen_attn)


def test_the_stand_in_is_called_as_the_kernel_is():
    kernels = pytest.importorskip("torch.nn.attention.varlen", reason="needs torch 2.10 or newer")
    mine, theirs = (inspect.signature(each).parameters for each in (varlen.varlen_attn, kernels.varlen_attn))
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize(
    "samples", ([[3, 1, 4], [6, 2]], [[8], [8]], [[1, 1, 1, 5], [4, 4]], [[1] * 8, [7, 1]]), ids=str
)
@pytest.mark.parametrize("kv_heads", (4, 2, 1))
@pytest.mark.parametrize("scaling", (None, 0.3))
def test_it_is_attention_token_by_token(samples, kv_heads, scaling, kernel):
    reference.assert_attends_within_samples(attend_varlen, samples, kv_heads, scaling)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(2, 90))
def test_samples_are_bounded_by_shapes_and_found_without_reading_them(lengths, row_tokens):
    rows, width = pack_rows(lengths, row_tokens), max(lengths) + 1
    source = layout(rows, lengths, width)
    mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(-1)).long()
    bounded, read = (positions_in_rows(mask, source) for _ in range(2))
    del read.block_bounds
    blocks, expected = blocks_of(bounded, len(rows)), blocks_of(read, len(rows))
    assert blocks_of(bounded, len(rows)) is blocks
    assert blocks.longest >= expected.longest == int(read.max()) + 1
    starts = [place for place, position in enumerate(bounded.flatten().tolist()) if position == 0]
    tokens = source.numel()
    assert expected.offsets.tolist() == [*starts, tokens]
    assert blocks.offsets.tolist() == [*starts, *[tokens] * (len(blocks.offsets) - len(starts))]


def test_rows_that_share_their_position_ids(kernel):
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 1
    q, k, v = (torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    found, weights = attend_varlen(module, q, k, v, None, position_ids=torch.tensor([[0, 1, 0, 1, 2]]))
    assert weights is None
    torch.testing.assert_close(found, reference.attention_within_samples(q, k, v, [[2, 3]] * 3))


def test_autocast_casts_what_the_kernel_reads(monkeypatch):
    seen = []

    def kernel(query, *rest, **options):
        seen.append(query.dtype)
        return varlen.varlen_attn(query, *rest, **options)

    monkeypatch.setattr(varlen_attention, "kernel_for", lambda device, dtype: kernel)
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, 1
    qkv = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        assert attend_varlen(module, *qkv, None, position_ids=torch.arange(5)[None])[0].dtype == torch.bfloat16
    assert seen == [torch.bfloat16]


def test_the_kernel_is_tried_before_a_run(kernel, monkeypatch):
    check_kernel(torch.device("cpu"))
    monkeypatch.setattr(
        varlen_attention,
        "kernel_for",
        lambda device, dtype: lambda *given, **how: varlen.varlen_attn(*given, **how) * 1.05,
    )
    with pytest.raises(ConfigError, match=r"torch's kernel is off by 5\.\d% on cpu; leave it out"):
        check_kernel(torch.device("cpu"))


def test_where_there_is_no_kernel(monkeypatch):
    with pytest.raises(ConfigError, match="needs a CUDA device, this run computes on cpu"):
        check_kernel(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(ConfigError, match=r"needs torch 2\.10 or newer, found"):
        check_kernel(torch.device("cuda"))
