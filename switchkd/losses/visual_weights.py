"""Weights of positions by the teacher's visual advantage: VA-OPD's token groups (arXiv 2605.21924, eqs. 5-6).

In an answer of T tokens with the visual advantages a_1 … a_T, the high group H are the ⌈T/5⌉ tokens with the largest ones, and the
low group L are the others. The divergence d of the answer is averaged in each group by itself,

    ℓ = ½ · mean over H of d  +  ½ · mean over L of d,

so that the few tokens that need the image weigh as much as all others together. The share 0.2 and the weight ½ are the paper's.
The paper names no rule for ties: here a token that ties with the last one of H belongs to H, so that no token is favoured by its
place. Without a token in L (equal advantages, as those of a sample without an image, or one token alone) ℓ is the ordinary mean;
it is that, too, for two tokens. The paper also weights a prompt's rollouts by a softmax over their mean advantages; a
data file has one answer to each prompt, whose weight is 1.
"""

import torch
from torch import Tensor

from switchkd.positions import count_positions, predicting_rows

TOKENS_PER_HIGH = 5  # one token of so many is in the high group


def visual_weights(advantage: Tensor, labels: Tensor) -> Tensor:
    """Return the weight of each position in a sum of which T · ℓ is a sample's part, see above.

    The weights of a sample's T positions add up to T, whatever else is in the batch: sums over positions are divided by the same
    counts as without weights, and a mean over a global batch does not depend on how it is divided.

    Args:
        advantage: [P], nats, in the order of `positions.predicting_rows`. labels: [B, L].

    Returns:
        [P] float32: T / (2 |H|) in the high group, T / (2 |L|) in the low group; 1 in a sample without a low group.
    """
    rows = predicting_rows(labels)  # [B, L]
    positions = count_positions(labels)[:, None]  # [B, 1], T of each sample
    spread = torch.full(rows.shape, -torch.inf, dtype=advantage.dtype, device=advantage.device)
    spread[rows] = advantage
    last = (-(-positions // TOKENS_PER_HIGH) - 1).clamp_min(0)  # place of the last token of H
    threshold = spread.sort(-1, descending=True).values.gather(-1, last)  # [B, 1]
    high = rows & (spread >= threshold)
    highs = high.sum(-1, keepdim=True)
    lows = positions - highs
    of_high, of_low = positions / (2 * highs.clamp_min(1)), positions / (2 * lows.clamp_min(1))
    weights = torch.where(high, torch.where(lows > 0, of_high, 1.0), of_low)
    return weights[rows].float()
