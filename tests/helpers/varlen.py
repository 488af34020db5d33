"""A stand-in for torch's variable-length attention kernel, which exists on CUDA alone: sample by sample, in any dtype."""

from itertools import pairwise

import torch
import torch.nn.functional as F


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    """[T, heads, d] → [T, heads, d]; refuses what the kernel refuses, and what only inference may pass."""
    assert (return_aux, seqused_k, block_table, num_splits) == (None,) * 4
    assert window_size == (-1, 0) and max_q == max_k and cu_seq_q is cu_seq_k
    assert cu_seq_q.dtype == torch.int32 and query.dim() == 3 and query.shape[0] == key.shape[0] == value.shape[0]
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("the same number of heads")
    ends = cu_seq_q.tolist()
    assert ends[0] == 0 and ends[-1] == len(query)
    found = []
    for start, end in pairwise(ends):
        assert 0 <= end - start <= max_q
        if end > start:
            q, k, v = (each[start:end].transpose(0, 1).unsqueeze(0) for each in (query, key, value))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=enable_gqa)
            found.append(out[0].transpose(0, 1))
    return torch.cat(found)
