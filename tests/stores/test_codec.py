"""Packing of top-k logits: round trips with the documented bound, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchkd.stores.codec import (
    LARGEST_LEVEL,
    _ranks,
    decode_hidden,
    decode_topk,
    encode_hidden,
    encode_topk,
    invert,
    ranks_by_frequency,
    round_stats,
)
from switchkd.stores.layout import rank_dtype

unhurried = settings(deadline=None)
LADDERS = ((1 / 1024, 1 / 1024), (0.004, 0.125), (0.02, 0.5), (0.3, 1.0))  # (fine, coarse)


@st.composite
def rows(draw):
    """(ids [P, K], logits [P, K] in any order, logsumexp [P], id_of_rank [N], fine, coarse)."""
    vocab_rows = draw(st.integers(2, 60))
    top_k = draw(st.sampled_from((2, vocab_rows)) | st.integers(2, vocab_rows))
    positions = draw(st.integers(0, 5))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    z = random.normal(scale=draw(st.sampled_from((0.0, 0.01, 1.0, 9.0))), size=(positions, vocab_rows))
    if draw(st.booleans()):
        z = z.round()  # ties
    z = (z + draw(st.sampled_from((0.0, -80.0, 300.0)))).astype(np.float32)
    ids = random.permuted(np.argsort(-z, axis=-1)[:, :top_k], axis=-1).astype(np.int32)
    logits = np.take_along_axis(z, ids, -1)
    exact = np.log(np.exp(z.astype(np.float64) - 300).sum(-1)) + 300
    logsumexp = (np.rint(exact * 1024) / 1024).astype(np.float32)
    return ids, logits, logsumexp, random.permutation(vocab_rows).astype(np.uint32), *draw(st.sampled_from(LADDERS))


def round_trip(ids, logits, logsumexp, id_of_rank, fine, coarse):
    packed = encode_topk(ids, logits, logsumexp, invert(id_of_rank), fine, coarse)
    return decode_topk(*packed, logsumexp, id_of_rank, fine, coarse)


def by_id(ids, values):
    return np.take_along_axis(values, np.argsort(ids, axis=-1), -1)


@unhurried
@given(rows())
def test_round_trip_keeps_ids_and_bounds_the_error(row):
    ids, logits, logsumexp, _, fine, coarse = row
    found_ids, found = round_trip(*row)
    assert (found_ids.dtype, found.dtype) == (np.int32, np.float32)
    assert np.array_equal(np.sort(found_ids, -1), np.sort(ids, -1))
    # Half a step at that depth, at most half the coarse one; and the rounding of the logsumexp and of float32.
    depth = np.maximum(logsumexp[:, None].astype(np.float64) - by_id(ids, logits), 0)
    step = np.minimum(fine * np.exp((depth + coarse) / 2), coarse)
    bound = step / 2 + 1 / 1024 + 2.0**-22 * (np.abs(logsumexp[:, None]) + depth)
    assert (np.abs(by_id(found_ids, found).astype(np.float64) - by_id(ids, logits)) <= bound).all()


@unhurried
@given(rows())
def test_decoded_logits_descend_and_equal_ones_come_by_rank(row):
    found_ids, found = round_trip(*row)
    assert (np.diff(found, axis=-1) <= 0).all()
    rank = invert(row[3])[found_ids].astype(int)
    assert (np.diff(rank, axis=-1) > 0)[np.diff(found, axis=-1) == 0].all()


@unhurried
@given(rows())
def test_a_decoded_row_is_encoded_to_the_same_bytes(row):
    """Packing loses something once only: a store made from a store does not drift."""
    ids, logits, logsumexp, id_of_rank, _, _ = row
    steps = (1 / 32, 1 / 32)  # decoded exactly: powers of two
    first = encode_topk(ids, logits, logsumexp, invert(id_of_rank), *steps)
    decoded = decode_topk(*first, logsumexp, id_of_rank, *steps)
    again = encode_topk(*decoded, logsumexp, invert(id_of_rank), *steps)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@unhurried
@given(rows())
def test_the_order_of_entries_does_not_matter(row):
    ids, logits, logsumexp, id_of_rank, *steps = row
    straight = encode_topk(ids, logits, logsumexp, invert(id_of_rank), *steps)
    turned = encode_topk(ids[:, ::-1], logits[:, ::-1], logsumexp, invert(id_of_rank), *steps)
    assert all(np.array_equal(a, b) for a, b in zip(straight, turned, strict=True))


@pytest.mark.parametrize("finite", (True, False))
def test_every_half_is_widened_bit_for_bit(finite):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = (halves[np.isfinite(halves)] if finite else halves).reshape(-1, 16)
    found = decode_hidden(halves, None, "float16")
    assert np.array_equal(found.view(np.uint32), halves.astype(np.float32).view(np.uint32))  # zeros keep their signs


@pytest.mark.parametrize("vocab_rows", ((1 << 16) + 1, 151_936))
def test_a_large_vocabulary_uses_wide_gaps(vocab_rows):
    id_of_rank = np.arange(vocab_rows, dtype=np.uint32)[::-1].copy()
    ids, logits = np.array([[0, 7, vocab_rows - 1]]), np.array([[1.0, 0.5, -300.0]], np.float32)
    logsumexp = np.array([1.5], np.float32)
    gap, height, bottom = encode_topk(ids, logits, logsumexp, invert(id_of_rank), 0.004, 0.125)
    assert (gap.dtype, height.dtype, bottom.dtype) == (np.uint32, np.uint16, np.uint16)
    assert gap.tolist() == [[0, vocab_rows - 9, 6]]
    assert round_trip(ids, logits, logsumexp, id_of_rank, 0.004, 0.125)[0].tolist() == ids.tolist()


@pytest.mark.parametrize("top_k", (1, 3, 4, 8, 128))
@pytest.mark.parametrize("dtype", (np.uint16, np.uint32))
def test_gaps_add_up_to_ranks(top_k, dtype):
    """Sums of four at once are those of one after the other, up to the largest rank that 16 bits hold."""
    random = np.random.default_rng(top_k)
    ranks = np.sort([random.choice(1 << 16, top_k, replace=False) for _ in range(50)], axis=-1)
    ranks[0] = np.arange((1 << 16) - top_k, 1 << 16)
    ranks[1] = np.arange(top_k)
    gaps = np.diff(ranks, axis=-1, prepend=-1) - 1
    found = _ranks(gaps.astype(dtype))
    assert found.dtype == dtype and np.array_equal(found, ranks)
    assert _ranks(np.empty((0, top_k), dtype)).shape == (0, top_k)


def test_ranks_beyond_the_vocabulary_are_refused():
    packed = np.array([[0, 60]], np.uint16), np.zeros((1, 2), np.uint16), np.zeros(1, np.uint16)
    with pytest.raises(ValueError, match="ranks reach 61, the vocabulary has 61 rows"):
        decode_topk(*packed, np.zeros(1, np.float32), np.arange(61, dtype=np.uint32), 0.004, 0.125)


def test_quantisation_costs_what_it_promises():
    """KL of a softmax whose logits err by half a step is about fine²/32 a step, whatever the depth."""
    random = np.random.default_rng(0)
    z = random.normal(scale=3, size=(200, 64)).astype(np.float32)
    logsumexp = np.log(np.exp(z.astype(np.float64)).sum(-1)).astype(np.float32)
    ids = np.tile(np.arange(64), (200, 1))
    found_ids, found = round_trip(ids, z, logsumexp, np.arange(64, dtype=np.uint32), 0.05, 8.0)
    p = np.exp(z - logsumexp[:, None].astype(np.float64))
    q = np.exp(by_id(found_ids, found).astype(np.float64))
    q /= q.sum(-1, keepdims=True)
    kl = (p * np.log(p / q)).sum(-1).mean()
    assert kl < 64 * 0.05**2 / 24


def test_statistics_are_rounded_and_the_knee_is_not():
    stats = np.array([[1.00049, -3.3, 2.00051, -np.inf, 3001]], np.float32)
    assert round_stats(stats).tolist() == [[1.0009765625, -3.2998046875, 2.0009765625, -np.inf, 3001]]


@pytest.mark.parametrize(
    ("vocab_rows", "dtype"), [(2, np.uint16), (1 << 16, np.uint16), ((1 << 16) + 1, np.uint32), (151_936, np.uint32)]
)
def test_ranks_take_the_smallest_type(vocab_rows, dtype):
    assert rank_dtype(vocab_rows) == dtype
    assert np.iinfo(dtype).max >= vocab_rows - 1


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
@pytest.mark.parametrize("where", ("logits", "logsumexp"))
def test_what_is_not_finite_is_refused(where, bad):
    arrays = {"logits": np.array([[1.0, 0.0]], np.float32), "logsumexp": np.array([1.5], np.float32)}
    arrays[where][..., -1] = bad
    with pytest.raises(ValueError, match="only finite logits can be stored"):
        encode_topk(np.array([[0, 1]]), rank_of_id=np.arange(2, dtype=np.uint32), min_step=0.01, max_step=0.1, **arrays)


@pytest.mark.parametrize(
    ("low", "step", "message"),
    [
        (-(LARGEST_LEVEL + 1), 1.0, "logits lie 65536 below the row's logsumexp, more than 65535 levels"),
        (-2048.0, 1 / 32, "logits lie 2048 below the row's logsumexp"),
        (-3e38, 1 / 32, r"logits lie 3e\+38 below"),
        (0.1, 1 / 32, "a logit lies 0.1 above its row's logsumexp"),
    ],
)
def test_what_lies_out_of_range_is_refused(low, step, message):
    logits = np.array([[0.0, low]], np.float32)
    with pytest.raises(ValueError, match=message):
        encode_topk(np.array([[0, 1]]), logits, np.zeros(1, np.float32), np.arange(2, dtype=np.uint32), step, step)


def test_the_farthest_logit_in_range_is_kept():
    logits = np.array([[0.0, -LARGEST_LEVEL / 32]], np.float32)
    steps = (1 / 32, 1 / 32)
    found = round_trip(np.array([[0, 1]]), logits, np.zeros(1, np.float32), np.arange(2, dtype=np.uint32), *steps)
    assert np.array_equal(found[1], logits)


def test_ranks_follow_frequency_and_ties_follow_ids():
    assert ranks_by_frequency(np.array([[4, 2], [2, 5], [5, 2]]), 7).tolist() == [2, 5, 4, 0, 1, 3, 6]


def test_ranks_of_an_empty_probe_are_the_ids():
    found = ranks_by_frequency(np.empty(0, np.int32), 4)
    assert found.dtype == np.uint32
    assert found.tolist() == [0, 1, 2, 3]


@unhurried
@given(st.integers(1, 300), st.integers(0, 2**32))
def test_invert_undoes(vocab_rows, seed):
    table = np.random.default_rng(seed).permutation(vocab_rows).astype(np.uint32)
    assert np.array_equal(invert(table)[table], np.arange(vocab_rows))
    assert np.array_equal(invert(invert(table)), table)


# Hidden states

DTYPES = ("float16", "bfloat16", "int8")
SMALLEST = {"float16": 2**-25, "bfloat16": 0.0, "int8": 1e-6}  # half the distance of the smallest numbers
# dtype → bound on the error of an entry: relative to itself, and to its block's largest
BOUNDS = {"float16": (2**-11, 1e-7), "bfloat16": (2**-8, 1e-30), "int8": (0.0, 0.5 / 126)}


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 5), st.integers(1, 70), st.sampled_from(DTYPES), st.floats(1e-3, 300), st.integers(0, 9))
def test_hidden_states_come_back_within_the_dtypes_bound(positions, width, dtype, spread, seed):
    states = np.random.default_rng(seed).normal(scale=spread, size=(positions, width)).astype(np.float32)
    state, scale = encode_hidden(states, dtype)
    assert state.shape == states.shape
    found = decode_hidden(state, scale, dtype)
    assert found.dtype == np.float32 and found.shape == states.shape
    relative, of_block = BOUNDS[dtype]
    padded = np.pad(np.abs(states), ((0, 0), (0, -width % 32))).reshape(positions, -(-width // 32), 32)
    largest = np.repeat(padded.max(-1, initial=0), 32, axis=-1)[:, :width]
    assert (np.abs(found - states) <= relative * np.abs(states) + of_block * largest + SMALLEST[dtype]).all()


def test_bfloat16_rounds_as_torch_does():
    torch = pytest.importorskip("torch")
    states = np.random.default_rng(0).normal(scale=50, size=(64, 33)).astype(np.float32)
    expected = torch.from_numpy(states).bfloat16().float().numpy()
    assert np.array_equal(decode_hidden(*encode_hidden(states, "bfloat16"), "bfloat16"), expected)


def test_int8_keeps_zeros_and_uses_its_range():
    states = np.zeros((2, 64), np.float32)
    states[0, 3] = -12.7
    state, scale = encode_hidden(states, "int8")
    assert state[0, 3] == -127
    assert scale.shape == (2, 2) and scale[1].tolist() == [0, 0]
    assert (decode_hidden(state, scale, "int8")[1] == 0).all()


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, "float16", "only finite hidden states"),
        (np.inf, "int8", "only finite hidden states"),
        (1e5, "float16", "a hidden state of 100000 does not fit float16; use bfloat16"),
        (1e8, "int8", "does not fit an int8 block"),
    ],
)
def test_states_that_do_not_fit_are_refused(value, dtype, message):
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=message):
        encode_hidden(np.full((1, 4), value, np.float32), dtype)
