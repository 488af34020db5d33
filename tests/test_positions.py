"""The label shift: a hand-written example that names every token, odd shapes, and three functions that agree."""

import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from switchkd.positions import IGNORED, count_positions, per_sample_weights, predicting_rows, targets

# Two samples of one batch, token by token: (token, supervised?, does its logits row predict a supervised token?).
ONE_TURN = [
    ("<image>", False, False),
    ("what", False, False),
    ("shape", False, False),
    ("?", False, True),
    ("circle", True, True),
    ("<eos>", True, False),
    ("<pad>", False, False),
    ("<pad>", False, False),
]
TWO_TURNS = [
    ("what", False, False),
    ("?", False, True),
    ("red", True, True),
    ("<eos>", True, False),
    ("it", False, True),
    ("a", True, True),
    ("square", True, True),
    ("<eos>", True, False),
]


def labels_of(*samples):
    ids = tiny.tokenizer().convert_tokens_to_ids
    return torch.tensor([[ids(token) if supervised else IGNORED for token, supervised, _ in s] for s in samples])


def test_every_token_of_a_batch_by_name():
    labels = labels_of(ONE_TURN, TWO_TURNS)
    rows = predicting_rows(labels)
    assert rows.dtype == torch.bool
    assert rows.tolist() == [[predicts for _, _, predicts in sample] for sample in (ONE_TURN, TWO_TURNS)]
    words = tiny.tokenizer().convert_ids_to_tokens(targets(labels).tolist())
    assert words == ["circle", "<eos>", "red", "<eos>", "a", "square", "<eos>"]
    assert count_positions(labels).tolist() == [2, 5]
    assert count_positions(labels).dtype == torch.int64


def test_a_model_that_copies_the_next_token_is_right_at_every_position():
    """The shift seen from a model: a row of logits that names the following token meets the target of that row."""
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    labels = torch.tensor([[IGNORED, IGNORED, 6, IGNORED, 8]])
    logits = torch.nn.functional.one_hot(ids.roll(-1, dims=1), 10)
    assert logits[predicting_rows(labels)].argmax(-1).tolist() == targets(labels).tolist() == [6, 8]


def test_no_position():
    labels = torch.full((2, 5), IGNORED)
    assert not predicting_rows(labels).any()
    assert targets(labels).shape == (0,)
    assert count_positions(labels).tolist() == [0, 0]


def test_a_sample_that_is_all_padding_adds_nothing_to_its_batch():
    padding = [("<pad>", False, False)] * len(TWO_TURNS)
    labels = labels_of(padding, TWO_TURNS)
    assert not predicting_rows(labels)[0].any()
    assert count_positions(labels).tolist() == [0, 5]
    assert targets(labels).tolist() == targets(labels_of(TWO_TURNS)).tolist()


def test_a_supervised_first_token_has_no_row_that_predicts_it():
    labels = torch.tensor([[7, 8], [7, IGNORED]])
    assert predicting_rows(labels).tolist() == [[True, False], [False, False]]
    assert targets(labels).tolist() == [8]
    assert count_positions(labels).tolist() == [1, 0]


def test_one_token_and_no_token():
    for labels in (torch.tensor([[7]]), torch.zeros(1, 0, dtype=torch.long)):
        assert not predicting_rows(labels).any()
        assert targets(labels).numel() == 0
        assert count_positions(labels).tolist() == [0]


@st.composite
def batches(draw):
    length = draw(st.integers(1, 12))
    label = st.one_of(st.just(IGNORED), st.integers(0, 50))
    return torch.tensor(draw(st.lists(st.lists(label, min_size=length, max_size=length), min_size=1, max_size=4)))


@given(batches())
def test_rows_targets_and_counts_agree(labels):
    rows, before = predicting_rows(labels), labels.clone()
    assert rows.shape == labels.shape
    assert not rows[:, -1].any()
    assert rows.sum(-1).tolist() == count_positions(labels).tolist()
    expected = [  # read off the definition, row by row: row j predicts the label at j + 1
        int(labels[sample, column + 1]) for sample, column in rows.nonzero().tolist()
    ]
    assert targets(labels).tolist() == expected
    assert torch.equal(labels, before)


@given(batches())
def test_padding_on_the_right_changes_no_position(labels):
    padded = torch.nn.functional.pad(labels, (0, 3), value=IGNORED)
    assert torch.equal(predicting_rows(padded)[:, : labels.shape[1]], predicting_rows(labels))
    assert torch.equal(targets(padded), targets(labels))
    assert torch.equal(count_positions(padded), count_positions(labels))


def test_weights_give_the_mean_over_samples_of_means_over_positions():
    labels = torch.tensor([[-100, 3, 4, 5], [-100, -100, -100, -100], [-100, -100, -100, 7]])
    weights = per_sample_weights(labels)
    values = torch.tensor([1.0, 2.0, 6.0, 10.0])  # of the positions: 3 of sample 0, 1 of sample 2
    assert (weights * values).sum() / 2 == ((1 + 2 + 6) / 3 + 10) / 2
