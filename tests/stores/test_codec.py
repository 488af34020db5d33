"""Packing of top-k logits: round trips with the documented bound, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from switchkd.stores import tie_order
from switchkd.stores.codec import (
    LARGEST_LEVEL,
    HiddenSteps,
    TopKCodes,
    _ranks,
    decode_hidden,
    decode_topk,
    encode_hidden,
    encode_topk,
    invert,
    ranks_by_frequency,
    round_stats,
    steps_of,
)
from switchkd.stores.layout import rank_dtype

unhurried = settings(deadline=None)
LADDERS = ((1 / 1024, 1 / 1024), (0.004, 0.125), (0.02, 0.5), (0.3, 1.0))  # (fine, coarse)


@st.composite
def rows(draw):
    """(ids [P, K], logits [P, K] descending, logsumexp [P], id_of_rank [N], fine, coarse)."""
    vocab_rows = draw(st.integers(2, 60))
    top_k = draw(st.sampled_from((2, vocab_rows)) | st.integers(2, vocab_rows))
    positions = draw(st.integers(0, 5))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    z = random.normal(scale=draw(st.sampled_from((0.0, 0.01, 1.0, 9.0))), size=(positions, vocab_rows))
    if draw(st.booleans()):
        z = z.round()  # ties
    z = (z + draw(st.sampled_from((0.0, -80.0, 300.0)))).astype(np.float32)
    ids = np.argsort(-z, axis=-1, kind="stable")[:, :top_k].astype(np.int32)
    logits = np.take_along_axis(z, ids, -1)
    exact = np.log(np.exp(z.astype(np.float64) - 300).sum(-1)) + 300
    logsumexp = (np.rint(exact * 1024) / 1024).astype(np.float32)
    return ids, logits, logsumexp, random.permutation(vocab_rows).astype(np.uint32), *draw(st.sampled_from(LADDERS))


def round_trip(ids, logits, logsumexp, id_of_rank, fine, coarse):
    packed = encode_topk(ids, logits, logsumexp, invert(id_of_rank), fine, coarse)
    return decode_topk(packed, logsumexp, id_of_rank, fine, coarse)


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
def test_decoded_logits_descend_in_the_teachers_order(row):
    """As far as the code of the order goes; behind that, and in stores of version 1, equal ones come by rank."""
    ids, logits, logsumexp, id_of_rank, *steps = row
    codes = encode_topk(ids, logits, logsumexp, invert(id_of_rank), *steps)
    rank = invert(id_of_rank).astype(int)
    for order in (codes.order, None):
        found_ids, found = decode_topk(codes._replace(order=order), logsumexp, id_of_rank, *steps)
        assert (np.diff(found, axis=-1) <= 0).all()
        for mine, values, exact in zip(found_ids.tolist(), found, ids.tolist(), strict=True):
            runs = np.split(np.arange(len(mine)), np.flatnonzero(np.diff(values)) + 1)
            assert mine == expected_order(exact, runs, rank, 1 if order is None else tie_order.LIMIT)


def expected_order(exact, runs, rank, limit):
    """The rule of stores/README.md, place by place: the teacher's entry while the product of choices is at most `limit`."""
    out, product, going = [], 1, True
    for run in runs:
        left = sorted((exact[place] for place in run), key=lambda entry: rank[entry])
        for place in run:
            product *= len(left)
            going = going and product <= limit and place < tie_order.PLACES
            out.append(left.pop(left.index(exact[place]) if going else 0))
    return out


@pytest.mark.parametrize("top_k", (2, 9, 63, 64, 65, 128, 200))
@pytest.mark.parametrize("kinds", (1, 2, 12, 60))
def test_the_order_of_long_rows(top_k, kinds):
    """All entries equal, and runs of every length, also across the last place that is covered."""
    random = np.random.default_rng(top_k * kinds)
    rank = random.permutation(500)
    levels = np.sort(random.integers(0, kinds, (40, top_k)), axis=-1)
    exact = np.stack([random.permutation(500)[:top_k] for _ in levels])
    codes = tie_order.encode_order(levels, rank[exact])
    assert codes.dtype == np.uint16 and codes.max() < tie_order.LIMIT
    entries = np.take_along_axis(exact, np.lexsort((rank[exact], levels), axis=-1), -1)
    tie_order.apply_order(codes, levels, entries)
    for found, level, wanted in zip(entries.tolist(), levels, exact.tolist(), strict=True):
        runs = np.split(np.arange(top_k), np.flatnonzero(np.diff(level)) + 1)
        assert found == expected_order(wanted, runs, rank, tie_order.LIMIT)


def test_a_damaged_order_is_some_order():
    levels = np.zeros((4, 9), int)
    entries = np.tile(np.arange(9), (4, 1))
    tie_order.apply_order(np.array([0, 16383, 16384, 65535], np.uint16), levels, entries)
    assert (np.sort(entries, -1) == np.arange(9)).all()


@unhurried
@given(rows())
def test_a_decoded_row_is_encoded_to_the_same_bytes(row):
    """Packing loses something once only: a store made from a store does not drift."""
    ids, logits, logsumexp, id_of_rank, _, _ = row
    steps = (1 / 32, 1 / 32)  # decoded exactly: powers of two
    first = encode_topk(ids, logits, logsumexp, invert(id_of_rank), *steps)
    decoded = decode_topk(first, logsumexp, id_of_rank, *steps)
    again = encode_topk(*decoded, logsumexp, invert(id_of_rank), *steps)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@unhurried
@given(rows())
def test_logits_that_do_not_descend_are_refused(row):
    ids, logits, logsumexp, id_of_rank, *steps = row
    if (np.diff(logits, axis=-1) < 0).any():
        with pytest.raises(ValueError, match="logits of a position must descend"):
            encode_topk(ids[:, ::-1], logits[:, ::-1], logsumexp, invert(id_of_rank), *steps)


@pytest.mark.parametrize("finite", (True, False))
def test_every_half_is_widened_bit_for_bit(finite):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = (halves[np.isfinite(halves)] if finite else halves).reshape(-1, 16)
    found = decode_hidden(halves, "float16")
    assert np.array_equal(found.view(np.uint32), halves.astype(np.float32).view(np.uint32))  # zeros keep their signs


@pytest.mark.parametrize("vocab_rows", ((1 << 16) + 1, 151_936))
def test_a_large_vocabulary_uses_wide_gaps(vocab_rows):
    id_of_rank = np.arange(vocab_rows, dtype=np.uint32)[::-1].copy()
    ids, logits = np.array([[0, 7, vocab_rows - 1]]), np.array([[1.0, 0.5, -300.0]], np.float32)
    logsumexp = np.array([1.5], np.float32)
    gap, height, bottom, _ = encode_topk(ids, logits, logsumexp, invert(id_of_rank), 0.004, 0.125)
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
    packed = TopKCodes(np.array([[0, 60]], np.uint16), np.zeros((1, 2), np.uint16), np.zeros(1, np.uint16), None)
    with pytest.raises(ValueError, match="ranks reach 61, the vocabulary has 61 rows"):
        decode_topk(packed, np.zeros(1, np.float32), np.arange(61, dtype=np.uint32), 0.004, 0.125)


def test_quantisation_costs_what_it_promises():
    """KL of a softmax whose logits err by half a step is about fine²/32 a step, whatever the depth."""
    random = np.random.default_rng(0)
    z = random.normal(scale=3, size=(200, 64)).astype(np.float32)
    logsumexp = np.log(np.exp(z.astype(np.float64)).sum(-1)).astype(np.float32)
    ids = np.argsort(-z, axis=-1)
    z = np.take_along_axis(z, ids, -1)
    found_ids, found = round_trip(ids, z, logsumexp, np.arange(64, dtype=np.uint32), 0.05, 8.0)
    p = np.exp(by_id(ids, z) - logsumexp[:, None].astype(np.float64))
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
    logits = np.array([[max(0.0, low), min(0.0, low)]], np.float32)
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

# dtype → bound on the error of an entry, relative to itself, and half the distance of the smallest numbers
HALVES = {"float16": (2**-11, 2**-25), "bfloat16": (2**-8, 0.0)}


def random_states(positions, width, spread, seed=0):
    return np.random.default_rng(seed).normal(scale=spread, size=(positions, width)).astype(np.float32)


def random_head(rows, width, seed=1):
    """A head whose columns differ by a factor of 1,000, and whose rows have a common mean."""
    random = np.random.default_rng(seed)
    head = random.normal(size=(rows, width)) + random.normal(size=width)
    return (head * 10 ** random.uniform(-2, 1, width)).astype(np.float32)


def steps_for(head, error, mean=0.0):
    width = head.shape[1]
    return HiddenSteps(steps_of(head.std(0, dtype=np.float64), error), np.full(width, mean, np.float32))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 5), st.integers(1, 70), st.sampled_from(sorted(HALVES)), st.floats(1e-3, 300), st.integers(0, 9))
def test_half_precision_states_come_back_within_the_dtypes_bound(positions, width, dtype, spread, seed):
    states = random_states(positions, width, spread, seed)
    found = decode_hidden(encode_hidden(states, dtype), dtype)
    assert found.dtype == np.float32 and found.shape == states.shape
    relative, smallest = HALVES[dtype]
    assert (np.abs(found - states) <= relative * np.abs(states) + smallest).all()


def test_bfloat16_rounds_as_torch_does():
    torch = pytest.importorskip("torch")
    states = random_states(64, 33, 50)
    expected = torch.from_numpy(states).bfloat16().float().numpy()
    assert np.array_equal(decode_hidden(encode_hidden(states, "bfloat16"), "bfloat16"), expected)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 5), st.integers(1, 70), st.floats(1e-3, 300), st.floats(-50, 50), st.integers(0, 9))
def test_steps_come_back_within_half_a_step(positions, width, spread, mean, seed):
    states = random_states(positions, width, spread, seed)
    steps = steps_for(random_head(30, width), 0.02, mean)
    state = encode_hidden(states, "steps", steps)
    assert state.shape == states.shape and state.dtype in (np.int16, np.int32)
    found = decode_hidden(state, "steps", steps)
    assert found.dtype == np.float32
    rounding = 2**-22 * (np.abs(states) + np.abs(mean) + np.abs(state) * steps.step)
    assert (np.abs(found.astype(np.float64) - states) <= steps.step / 2 + rounding).all()
    assert np.array_equal(encode_hidden(found, "steps", steps), state)  # what was decoded is encoded as it was


def test_steps_are_those_of_the_formula():
    head, error = random_head(40, 7), 0.03
    found = steps_of(head.std(0, dtype=np.float64), error)
    for feature in range(7):
        column = [float(row[feature]) for row in head]
        mean = sum(column) / len(column)
        spread = (sum((value - mean) ** 2 for value in column) / len(column)) ** 0.5
        assert found[feature] == pytest.approx(error * (12 / 7) ** 0.5 / spread, rel=1e-6)


@pytest.mark.parametrize("error", (0.005, 0.02, 0.1))
def test_the_error_of_a_logit_is_the_requested_one(error):
    """Whatever the scale of a feature; a shift common to a position's logits does not count."""
    head, states = random_head(500, 96), random_states(400, 96, 3.0)
    steps = steps_for(head, error, 1.0)
    wrong = decode_hidden(encode_hidden(states, "steps", steps), "steps", steps).astype(np.float64) - states
    logits = wrong @ head.T
    logits -= logits.mean(-1, keepdims=True)
    assert np.sqrt(np.square(logits).mean()) == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("power", (8, -8))
def test_a_scaled_feature_gives_the_same_integers(power):
    """Real models have features that are some hundred times as large as the others, with a column of the head that is as small."""
    head, states = random_states(50, 64, 1.0, seed=1), random_states(20, 64, 3.0)
    scale = np.where(np.arange(64) % 16 == 5, 2.0**power, 1).astype(np.float32)
    plain, scaled = steps_for(head, 0.02), steps_for(head / scale, 0.02)
    assert np.array_equal(encode_hidden(states, "steps", plain), encode_hidden(states * scale, "steps", scaled))


def test_a_column_without_effect_has_a_finite_step():
    head = random_head(50, 16)
    head[:, 3] = 7.0  # the same for every row of the vocabulary
    step = steps_of(head.std(0, dtype=np.float64), 0.02)
    assert np.isfinite(step).all() and step[3] > 1000 * np.delete(step, 3).min()


def test_integers_are_as_wide_as_a_part_needs():
    steps = HiddenSteps(np.ones(2, np.float32), np.zeros(2, np.float32))
    for value, dtype in ((32767, np.int16), (-32767, np.int16), (32768, np.int32), (-(1 << 22), np.int32)):
        state = encode_hidden(np.array([[0, value]], np.float32), "steps", steps)
        assert state.dtype == dtype and state.tolist() == [[0, value]]
        assert decode_hidden(state, "steps", steps).tolist() == [[0, value]]
    assert encode_hidden(np.empty((0, 2), np.float32), "steps", steps).dtype == np.int16


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.nan, "float16", "only finite hidden states"),
        (np.inf, "bfloat16", "only finite hidden states"),
        (1e5, "float16", "a hidden state of 100000 does not fit float16; use bfloat16"),
        (np.nan, "steps", "a hidden state is not finite"),
        (-np.inf, "steps", "a hidden state is not finite"),
        (1e7, "steps", "lies 1e.07 quantisation steps from the mean, more than 4194304; use --hidden-dtype bfloat16"),
        (1.0, "int8", "hidden states are stored as steps, float16, bfloat16, not as int8"),
    ],
)
def test_states_that_do_not_fit_are_refused(value, dtype, message):
    steps = HiddenSteps(np.ones(4, np.float32), np.zeros(4, np.float32))
    with np.errstate(over="ignore"), pytest.raises(ValueError, match=message):
        encode_hidden(np.array([[0, value, 0, 0]], np.float32), dtype, steps)


@pytest.mark.parametrize("spread", ([0.0, 0.0], [1.0, np.nan], [1.0, np.inf]))
def test_heads_without_steps_are_refused(spread):
    with pytest.raises(ValueError, match="columns that are not finite, or all its rows are equal"):
        steps_of(np.array(spread), 0.02)
