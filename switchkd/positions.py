"""Implements the shift between labels and the logits rows that predict them.

A label at index j is predicted by the logits row at index j - 1. A *position* is one supervised token; the row that predicts
is the row that a store keeps and that the losses compare. All code that needs positions uses these functions.

    index        0        1     2     3       4      5
    token        <image>  what  ?     circle  <eos>  <pad>
    label        -100     -100  -100  circle  <eos>  -100
    predicting   .        .     x     x       .      .        rows 2 and 3 give the two positions
"""

import torch
from torch import Tensor

IGNORED = -100


def predicting_rows(labels: Tensor) -> Tensor:
    """Mark the logits rows that predict a supervised token: [B, L] labels → [B, L] bool, the last column always False."""
    rows = torch.zeros_like(labels, dtype=torch.bool)
    rows[:, :-1] = labels[:, 1:] != IGNORED
    return rows


def targets(labels: Tensor) -> Tensor:
    """Return the supervised token ids, [P], in the order in which `predicting_rows` selects rows."""
    shifted = labels[:, 1:]
    return shifted[shifted != IGNORED]


def count_positions(labels: Tensor) -> Tensor:
    """Return the number of positions of each sample, [B, L] → [B] int64."""
    return (labels[:, 1:] != IGNORED).sum(-1)


def teacher_weights(labels: Tensor, teacher_labels: Tensor, weights: Tensor | None) -> Tensor:
    """Return weights of the teacher's positions that give each sample the same total weight as the student's do, [P_T] float32.

    Args:
        labels, teacher_labels: [B, L], [B, L_T], of one batch under two tokenizers. weights: [P], the student's; None for 1 each.
    """
    ours, theirs = count_positions(labels), count_positions(teacher_labels)
    total = (
        ours.float() if weights is None else torch.stack([part.sum() for part in torch.split(weights, ours.tolist())])
    )
    return (total / theirs.clamp_min(1)).repeat_interleave(theirs)


def per_sample_weights(labels: Tensor) -> Tensor:
    """Return the weight of each position in a mean over samples: 1 / the positions of its sample, [P] float32."""
    counts = count_positions(labels)
    return (1 / counts.clamp_min(1)).repeat_interleave(counts)
