"""How well the questions of EmojiVQA can be answered without an image: a lower bound that a model has to leave behind."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def question_of(row: Row) -> str:
    """Return a row's question without the image marker."""
    return str(row["conversations"][0]["value"]).removeprefix("<image>\n")


def answer_of(row: Row) -> str:
    """Return a row's answer."""
    return str(row["conversations"][1]["value"])


def blind_scores(train: Sequence[Row], test: Sequence[Row], concepts: Collection[str]) -> dict[str, float]:
    """Return kind of question → share of units that a reader of the questions alone answers correctly.

    Two readers learn from the training questions. One gives the most frequent answer to the same text; the other does so after
    every concept in the text was replaced by one word. Where a text is new, each falls back to the next coarser view, at last to
    the first two words. The scores are those of the reader with the higher mean over kinds. Ties between answers go to the one
    that comes first in the alphabet.

    Args:
        train, test: rows of data files, with `question_type` and, for rotations of one question, `unit`.
        concepts: names that are replaced.
    """
    longest_first = sorted(concepts, key=len, reverse=True)

    def masked(row: Row) -> str:
        text = question_of(row)
        for concept in longest_first:
            text = text.replace(concept, "it")
        return text

    views: list[Callable[[Row], str]] = [question_of, masked, lambda row: " ".join(question_of(row).split()[:2])]
    tables = [_most_frequent(train, view) for view in views]
    return max((_score(test, views[first:], tables[first:]) for first in (0, 1)), key=macro)


def macro(scores: Mapping[str, float]) -> float:
    """Return the mean over kinds; 0 without any."""
    return sum(scores.values()) / len(scores) if scores else 0.0


def _most_frequent(train: Sequence[Row], view: Callable[[Row], str]) -> dict[str, str]:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        counts[view(row)][answer_of(row)] += 1
    return {key: min(found, key=lambda answer: (-found[answer], answer)) for key, found in counts.items()}


def _score(
    test: Sequence[Row], views: Sequence[Callable[[Row], str]], tables: Sequence[Mapping[str, str]]
) -> dict[str, float]:
    """Return kind → share of units all of whose questions are answered correctly."""
    units: dict[tuple[str, str], bool] = {}
    for row in test:
        found = next(
            (table[key] for view, table in zip(views, tables, strict=True) if (key := view(row)) in table), None
        )
        unit = row["question_type"], row.get("unit") or row["id"]
        units[unit] = units.get(unit, True) and found == answer_of(row)
    kinds: dict[str, list[bool]] = defaultdict(list)
    for (kind, _), right in units.items():
        kinds[kind].append(right)
    return {kind: sum(found) / len(found) for kind, found in sorted(kinds.items())}
