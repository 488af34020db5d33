"""Counts with their noun."""

import pytest

from switchkd.counting import counted


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "part", "0 parts"),
        (1, "part", "1 part"),
        (12000, "part", "12,000 parts"),
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (2, "batch", "2 batches"),
        (3, "entry", "3 entries"),
        (1, "entry", "1 entry"),
        (2, "day", "2 days"),
        (2, "image token", "2 image tokens"),
    ],
)
def test_the_noun_takes_the_counts_number(count, noun, text):
    assert counted(count, noun) == text
