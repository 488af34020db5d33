"""Packing: from the teacher's final states to a store's payload, on the device beside them. Shared by all backends."""

from collections.abc import Callable

import torch
from torch import Tensor

from switchkd.errors import RunError
from switchkd.kneedle import knee_of_sorted
from switchkd.stores import Manifest, Payload
from switchkd.stores.layout import STAT_COLUMNS

LOGIT_ROWS = 1024  # rows of [rows, V] logits that exist at a time


def pack(states: Tensor, lm_head: Callable[[Tensor], Tensor], manifest: Manifest) -> Payload:
    """Pack P positions as a store's manifest asks.

    Args:
        states: [P, d], after the final norm. lm_head: [p, d] → [p, V]; it runs on `LOGIT_ROWS` states at a time.

    Returns:
        Arrays on the CPU. Statistics are taken over the N rows in use.

    Raises:
        RunError: a logit is not finite.
    """
    pieces = [
        pack_logits(lm_head(chunk)[:, : manifest.vocab_rows], manifest.top_k, chunk if manifest.has_hidden else None)
        for chunk in torch.split(states, LOGIT_ROWS)
    ]
    return Payload.concatenate(pieces)


def pack_logits(logits: Tensor, top_k: int, hidden: Tensor | None = None) -> Payload:
    """Keep the K largest logits of each row and statistics over all of them.

    Args:
        logits: [P, N] over the rows in use. top_k: K ≤ N; 0 keeps no logits. hidden: [P, d] to keep beside them.

    Returns:
        Arrays on the CPU. `tail_logsumexp` is log Σ e^z over the N - K smallest logits, -inf if K = N; `knee` is eqs. 8-9 over
        all N.

    Raises:
        RunError: a logit is not finite.
    """
    ordered, ids = logits.float().sort(dim=-1, descending=True)
    if not torch.isfinite(ordered).all():
        raise RunError("the teacher's logits are not finite")
    columns = {
        "z_max": ordered[:, 0],
        "z_min": ordered[:, -1],
        "logsumexp": ordered.logsumexp(-1),
        "tail_logsumexp": ordered[:, top_k:].logsumexp(-1),
        "knee": knee_of_sorted(ordered).float(),
    }
    stats = torch.stack([columns[name] for name in STAT_COLUMNS], dim=-1)
    return Payload(
        stats=stats.cpu().numpy(),
        # .clone(): a view would keep all N columns alive on the device until the copy is done.
        ids=ids[:, :top_k].to(torch.int32).clone().cpu().numpy() if top_k else None,
        logits=ordered[:, :top_k].clone().cpu().numpy() if top_k else None,
        hidden=None if hidden is None else hidden.float().cpu().numpy(),
    )
