"""Packed rows: conversion of the teacher's final states to a store's payload, on the teacher's device. Shared by all backends.

Selection and statistics are computed on the device of the logits; one array of *packed rows* leaves it, [P, 5 + 2K + d] float32:
the statistics, K ids (int32, their bits viewed as float32), K logits, and d numbers of the hidden state if it is kept.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from switchkd.errors import RunError
from switchkd.losses.selection import in_blocks, tops_and_knees
from switchkd.stores import Payload
from switchkd.stores.layout import STAT_COLUMNS

# Rows of logits [rows, V] in memory at a time. On a CPU fewer: what is selected from then still lies in the cache.
LOGIT_ROWS = {"cpu": 128}
LOGIT_ROWS_ELSEWHERE = 1024


def pack(
    states: Tensor, lm_head: Callable[[Tensor], Tensor], vocab_rows: int | None, top_k: int, keep_hidden: bool
) -> Tensor:
    """Pack P positions on their device.

    Args:
        states: [P, d], after the final norm; P > 0. lm_head: [p, d] → [p, V], float32 whatever the dtype of its weight (see
            `switchkd.losses.lm_head`); it runs on `LOGIT_ROWS` states at a time.
        vocab_rows: N, the rows in use; None takes all V.

    Returns:
        Packed rows, see above.
    """
    rows = LOGIT_ROWS.get(states.device.type, LOGIT_ROWS_ELSEWHERE)
    pieces = [
        pack_logits(lm_head(chunk)[:, :vocab_rows], top_k, chunk if keep_hidden else None)
        for chunk in torch.split(states, rows)
    ]
    return torch.cat(pieces)


def pack_logits(logits: Tensor, top_k: int, hidden: Tensor | None = None) -> Tensor:
    """Keep the K largest logits of each row and statistics over all of them.

    Args:
        logits: [P, N] over the rows in use, float32 or above. top_k: K ≤ N; 0 keeps no logits. hidden: [P, d] to keep beside
            them.

    Returns:
        Packed rows. `tail_logsumexp` is log Σ e^z over the N - K smallest logits, -inf if K = N; `knee` is eqs. 8-9 over all N.

    Raises:
        TypeError: half-precision logits, whose order and knee are those of rounded numbers.
    """
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a capture needs float32 logits, got {logits.dtype}")
    packed = torch.cat([_pack_block(block.float(), top_k) for block in in_blocks(logits)])
    return packed if hidden is None else torch.cat([packed, hidden.float()], dim=-1)


def _pack_block(logits: Tensor, top_k: int) -> Tensor:
    """Pack logits that fit into the cache: they are read several times."""
    ids, knee = tops_and_knees(logits, top_k)
    top = logits.gather(-1, ids)
    tail = logits.logsumexp(-1) if not top_k else logits.scatter(-1, ids, -torch.inf).logsumexp(-1)
    columns = {
        "z_max": logits.amax(-1),
        "z_min": logits.amin(-1),
        "logsumexp": torch.logaddexp(top.logsumexp(-1), tail) if top_k else tail,
        "tail_logsumexp": tail,
        "knee": knee.float(),
    }
    pieces = [
        torch.stack([columns[name] for name in STAT_COLUMNS], dim=-1),
        ids.to(torch.int32).view(torch.float32),
        top,
    ]
    return torch.cat(pieces, dim=-1)


def unpack(rows: Tensor, top_k: int) -> Payload:
    """Unpack packed rows.

    Args:
        rows: [P, 5 + 2K + d], on any device. top_k: K, as they were packed.

    Raises:
        RunError: a logit was not finite.
    """
    widths = [len(STAT_COLUMNS), top_k, top_k, rows.shape[1] - len(STAT_COLUMNS) - 2 * top_k]
    stats, ids, logits, hidden = (part.contiguous().numpy() for part in torch.split(rows.cpu(), widths, dim=1))
    payload = Payload(
        stats=stats,
        ids=ids.view(np.int32) if top_k else None,
        logits=logits if top_k else None,
        hidden=hidden if widths[3] else None,
    )
    # NaN sorts as the largest and the smallest of a row, so checking both ends covers every logit between them.
    if not np.isfinite([payload.stat(name) for name in ("z_max", "z_min")]).all():
        raise RunError("the teacher's logits are not finite")
    return payload
