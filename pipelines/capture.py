"""Packing: from logits to what a `topk` payload keeps, on the device beside the logits. Shared by all backends."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchkd.errors import RunError
from switchkd.kneedle import knee_of_sorted
from switchkd.stores.layout import STAT_COLUMNS


@dataclass(frozen=True)
class Packed:
    """The teacher's word on P positions."""

    ids: NDArray[np.int32]  # [P, K]
    logits: NDArray[np.float32]  # [P, K], descending
    stats: NDArray[np.float32]  # [P, 5], columns of STAT_COLUMNS

    def split(self, positions: list[int]) -> list["Packed"]:
        """Cut into runs of the given lengths."""
        cuts = np.cumsum(positions)[:-1]
        return [
            Packed(*pieces)
            for pieces in zip(*(np.split(a, cuts) for a in (self.ids, self.logits, self.stats)), strict=True)
        ]

    @staticmethod
    def concatenate(pieces: list["Packed"], top_k: int) -> "Packed":
        """Join runs; an empty list gives no position."""
        if not pieces:
            return Packed(
                np.empty((0, top_k), np.int32),
                np.empty((0, top_k), np.float32),
                np.empty((0, len(STAT_COLUMNS)), np.float32),
            )
        return Packed(
            *(np.concatenate([getattr(piece, name) for piece in pieces]) for name in ("ids", "logits", "stats"))
        )


def pack_topk(logits: Tensor, top_k: int) -> Packed:
    """Keep the K largest logits of each row and statistics over all of them.

    Args:
        logits: [P, N] over the rows in use. top_k: K ≤ N.

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
    # .clone(): a view would keep all N columns alive on the device until the copy is done.
    top_ids, top_logits = ids[:, :top_k].to(torch.int32).clone(), ordered[:, :top_k].clone()
    return Packed(top_ids.cpu().numpy(), top_logits.cpu().numpy(), stats.cpu().numpy())
