"""The knee of a logits row: where information ends and the long tail begins (paper, section 3.2, eqs. 8-9)."""

import torch
from torch import Tensor


def knee_of_sorted(descending: Tensor, window: int | None = None, whole: tuple[int, Tensor] | None = None) -> Tensor:
    """Return the knee k of rows that are sorted already, [T, M] → [T] int64; see `selection.kneedle`.

    Args:
        descending: whole rows, or their leading entries, filled up with -inf.
        window: the knee is looked for in this many leading entries, as if they were the whole row.
        whole: for leading entries that are sure to hold the knee: (N, smallest logit of each row [T, 1]).

    Raises:
        ValueError: fewer than two columns, or a window below 2.
    """
    if window is not None:
        if window < 2:
            raise ValueError(f"window must be at least 2, got {window}")
        descending = descending[:, :window]
    count, bottom = whole or (descending.shape[-1], descending[:, -1:])
    if count < 2:
        raise ValueError(f"a knee needs at least 2 logits a row, got {count}")
    top, bottom = descending[:, :1].double(), bottom.double()
    spread = (top - bottom).clamp_min(torch.finfo(torch.float64).tiny)
    height = (descending.double() - bottom).div_(spread)  # y_i; 0 everywhere if all logits are equal
    rank = torch.arange(1, descending.shape[-1] + 1, dtype=torch.float64, device=descending.device)
    distance = height.neg_().add_(1 - rank / count).masked_fill_(descending == -torch.inf, -torch.inf)
    return distance.argmax(dim=-1).add_(1).clamp_min_(2)
