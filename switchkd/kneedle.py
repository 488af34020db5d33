"""The knee of a logits row: where information ends and the long tail begins (paper, section 3.2, eqs. 8-9)."""

import torch
from torch import Tensor


def kneedle(logits: Tensor, window: int | None = None) -> Tensor:
    """Return the number k of leading logits that each row's knee selects.

    Eqs. 8-9: with the row sorted in descending order, x_i = i/N and y_i the value scaled to [0, 1],
    k = argmax_i (1 - x_i) - y_i for i = 1 … N; the first i on a tie. Where the paper is silent: k is at least 2, since one
    logit has no pair, and a row of equal logits (y undefined) gives 2.

    Args:
        logits: [T, N], floating point, finite, N ≥ 2. No gradient flows through the result.
        window: look for the knee in the row's `window` largest logits as if they were the whole row. None: all N (the paper).

    Returns:
        [T], int64, 2 ≤ k ≤ N (or ≤ window).

    Raises:
        ValueError: fewer than two columns, or a window below 2.
    """
    return knee_of_sorted(logits.detach().sort(dim=-1, descending=True).values, window)


def knee_of_sorted(descending: Tensor, window: int | None = None) -> Tensor:
    """`kneedle` for rows that are sorted already, [T, N] → [T] int64. Distances are taken in float64."""
    if window is not None:
        if window < 2:
            raise ValueError(f"window must be at least 2, got {window}")
        descending = descending[:, :window]
    count = descending.shape[-1]
    if count < 2:
        raise ValueError(f"a knee needs at least 2 logits a row, got {count}")
    top, bottom = descending[:, :1].double(), descending[:, -1:].double()
    spread = (top - bottom).clamp_min(torch.finfo(torch.float64).tiny)
    height = (descending.double() - bottom) / spread  # y_i; 0 everywhere if all logits are equal
    rank = torch.arange(1, count + 1, dtype=torch.float64, device=descending.device)
    distance = 1 - rank / count - height
    return distance.argmax(dim=-1).add_(1).clamp_min_(2)
