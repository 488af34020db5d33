"""Samples of questions: fixed, nested, and equal over strata."""

import random

import pytest

from switchkd.pipelines.evaluation.sampling import sample_of

STRATA = {f"q{n}": "abc"[n % 3] if n < 12 else "c" for n in range(40)}  # a and b have four each


def test_a_sample_does_not_depend_on_the_order_of_questions():
    keys = list(STRATA)
    random.Random(0).shuffle(keys)
    assert sample_of({key: STRATA[key] for key in keys}, 10) == sample_of(STRATA, 10)


@pytest.mark.parametrize("limit", range(1, 41))
def test_samples_are_nested_and_fill_strata_in_turns(limit):
    found = sample_of(STRATA, limit)
    assert len(found) == limit and found <= sample_of(STRATA, limit + 1)
    counts = [sum(STRATA[key] == stratum for key in found) for stratum in "abc"]
    assert counts[0] >= counts[1] >= counts[0] - 1
    assert max(counts) - min(counts) <= 1 or counts[:2] == [4, 4]


def test_without_a_limit_or_with_a_large_one_all_are_asked():
    assert sample_of(STRATA, None) == sample_of(STRATA, 40) == sample_of(STRATA, 41) == set(STRATA)
    assert sample_of({}, 3) == set()
