"""The concepts of EmojiVQA, see `concepts.yaml`: what a drawing shows, in one or two plain words, and what kind of thing it is."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "concepts.yaml").read_text())
    return found


def kind_of() -> dict[str, str | None]:
    """Return concept → its kind; None for an object that is not asked for one."""
    named = {concept: kind for kind, concepts in _table()["kinds"].items() for concept in concepts}
    return {**named, **dict.fromkeys(_table()["objects"])}


def is_are(concept: str) -> str:
    """Return the verb that goes with a concept."""
    return "are" if concept in _table()["plural"] else "is"


def with_article(concept: str) -> str:
    """Return a concept with its indefinite article: "an owl", "sushi", "grapes"."""
    if concept in _table()["plural"] or concept in _table()["mass"]:
        return concept
    return f"{'an' if concept[0] in 'aeiou' else 'a'} {concept}"
