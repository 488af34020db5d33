"""Weights by visual advantage: VA-OPD's two means of each answer, from loops in float64; values and gradients."""

from dataclasses import replace

import pytest
import torch

from switchkd.errors import ConfigError
from switchkd.losses.fused import SwitchStates
from switchkd.losses.lm_head import LMHead
from switchkd.losses.objective import Objective
from switchkd.losses.signals import DenseSignal
from switchkd.losses.visual_weights import visual_weights
from switchkd.positions import IGNORED

N, D = 7, 5
BATCHES = {
    "two samples": [[0.1, 2.0, -0.3, 0.0, 0.05, 0.2, 1.0], [0.5, 0.0, 0.1]],
    "eleven tokens have a high group of three": [[float(n % 4) - 0.01 * n for n in range(11)]],
    "one position": [[0.7]],
    "two positions": [[0.7, 0.1]],
    "no position": [[]],
    "a sample without one": [[0.1, 0.4, 0.2], [], [1.0, -1.0, 0.0, 0.0]],
    "all equal": [[0.0] * 6, [1.5] * 3],
    "ties at the threshold": [[1.0, 0.0, 1.0, 1.0, 0.0, -1.0, 0.0]],
    "ties below it": [[2.0, 0.0, 0.0, 0.0, 0.0]],
    "all negative": [[-0.1, -0.2, -0.3, -0.4]],
}


def labels_of(batch):
    """Labels whose supervised tokens lie between others, of samples with these advantages."""
    longest = max(map(len, batch))
    labels = torch.full((len(batch), longest + 4), IGNORED)
    for row, values in enumerate(batch):
        labels[row, 2 + row % 2 : 2 + row % 2 + len(values)] = torch.arange(len(values)) % N
    return labels


def answer_loss(values, advantages):
    """ℓ of one answer, from the paper's text: means of the tokens of largest advantage and of the others, halved and added."""
    size = -(-len(values) // 5)
    least = sorted(advantages, reverse=True)[size - 1]
    high = [value for value, advantage in zip(values, advantages, strict=True) if advantage >= least]
    low = [value for value, advantage in zip(values, advantages, strict=True) if advantage < least]
    if not low:
        return sum(high) / len(high)
    return 0.5 * sum(high) / len(high) + 0.5 * sum(low) / len(low)


@pytest.mark.parametrize("normalize_by", ("position", "sample"))
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_a_weighted_sum_is_that_of_two_means(batch, normalize_by):
    labels, advantage = labels_of(batch), torch.tensor([value for row in batch for value in row])
    values = torch.randn(len(advantage), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    objective = Objective("fkl", False, normalize_by=normalize_by, weight_by="visual-advantage")
    found = (values * objective.distil_weights(labels, advantage)).sum() / objective.count(labels).clamp_min(1)
    pieces = [piece.tolist() for piece in values.split([len(row) for row in batch])]
    answers = [(len(row), answer_loss(piece, row)) for piece, row in zip(pieces, batch, strict=True) if row]
    weigh = {"position": lambda size: size, "sample": lambda size: 1}[normalize_by]
    whole = sum(weigh(size) for size, _ in answers)
    expected = sum(weigh(size) * loss for size, loss in answers) / max(whole, 1)
    assert float(found) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", ("one position", "two positions", "all equal"))
def test_with_one_group_it_is_the_ordinary_mean_bit_for_bit(name):
    batch = BATCHES[name]
    found = visual_weights(torch.tensor([value for row in batch for value in row]), labels_of(batch))
    assert found.dtype == torch.float32 and (found == 1).all()


def test_the_weights_of_a_sample_do_not_depend_on_its_batch():
    batch = BATCHES["a sample without one"] + BATCHES["two samples"]
    alone = [visual_weights(torch.tensor(row), labels_of([row])) for row in batch]
    together = visual_weights(torch.tensor([value for row in batch for value in row]), labels_of(batch))
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=0)
    sums = [float(weights.sum()) for weights in alone]
    assert sums == pytest.approx([len(row) for row in batch])
    high, low = alone[0].max(), alone[0].min()  # of three tokens: one against two
    assert (high, low) == (1.5, 0.75)


def kl(p, q):
    """KL(p ‖ q) of two rows of logits, entry by entry."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return sum(a.exp() * (a - b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("chunk", (None, 1))
@pytest.mark.parametrize("normalize_by", ("position", "sample"))
def test_the_fused_loss_and_its_gradients_are_the_naive_ones(normalize_by, chunk):
    """CE of all positions alike, Align and VSD weighted, at states of two heads; the second sample has no image."""
    batch = [*BATCHES["two samples"], BATCHES["all equal"][1]]
    labels, advantage = labels_of(batch), torch.tensor([value for row in batch for value in row])
    counts, generator = [len(row) for row in batch], torch.Generator().manual_seed(1)
    states, head, through, other, teacher = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=number in (0, 2))
        for number, shape in enumerate([(sum(counts), D), (N, D), (counts[0] + counts[2], D), (N, D), (sum(counts), N)])
    )
    on_image = torch.tensor([True, False, True]).repeat_interleave(torch.tensor(counts))
    targets = torch.cat([torch.arange(count) % N for count in counts])
    objective = Objective("fkl", True, 0.7, 1.3, normalize_by=normalize_by, weight_by="visual-advantage")
    total, terms = objective.fused(
        states,
        LMHead(head),
        targets,
        DenseSignal(teacher),
        SwitchStates(through, LMHead(other), on_image),
        weights=objective.weights(labels),
        chunk_positions=chunk,
        distil_weights=objective.distil_weights(labels, advantage),
    )
    count = objective.count(labels)
    found = torch.autograd.grad(total / count, (states, through))

    logits, switched = states @ head.T, through @ other.T
    ce, align = [], []
    for row in range(sum(counts)):
        ce.append(-logits[row].log_softmax(-1)[targets[row]])
        align.append(kl(teacher[row], logits[row]))
    vsd = iter([kl(teacher[row], switched[at]) for at, row in enumerate(on_image.nonzero().squeeze(-1).tolist())])
    vsd = [next(vsd) if there else None for there in on_image.tolist()]
    ends = torch.tensor(counts).cumsum(0).tolist()
    expected, of_align = torch.zeros((), dtype=torch.float64), 0.0
    for sample, (end, size) in enumerate(zip(ends, counts, strict=True)):
        rows, factor = slice(end - size, end), size if normalize_by == "position" else 1
        mean = sum(ce[rows]) / size + 0.7 * answer_loss(align[rows], batch[sample])
        of_align += (factor * answer_loss(align[rows], batch[sample])).item()
        if on_image[end - 1]:
            mean = mean + 1.3 * answer_loss(vsd[rows], batch[sample])
        expected = expected + factor * mean
    wanted = torch.autograd.grad(expected / count, (states, through))
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert float(terms.align) == pytest.approx(of_align, rel=1e-6)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)
    assert replace(objective, weight_by=None).distil_weights(labels, None) is None


def test_positions_are_weighted_by_nothing_else():
    with pytest.raises(ConfigError, match="no weights 'attention'; there are visual-advantage"):
        Objective(weight_by="attention")
    with pytest.raises(ConfigError, match="objective switch-ce compares with no logits"):
        Objective("switch-ce", weight_by="visual-advantage")
