"""The words of EmojiVQA's questions and answers: the vocabulary of the word tokenizer of its small models."""

import re

from switchkd.pipelines.emoji_vqa.concepts import kind_of
from switchkd.pipelines.emoji_vqa.scenes import COLORS, NUMBERS, ROWS, UNANSWERABLE

ASKING = (
    "what is are this these kind of thing which shown a b c d color the card left right above below there an in image how many "
    "times digits on sign bar highest lowest value describe . ?"
)


def vocabulary() -> list[str]:
    """Return every word that a question or an answer may have, sorted; the same for any share of the suite."""
    kinds = kind_of()
    texts = [
        *kinds,
        *(kind for kind in kinds.values() if kind is not None),
        *COLORS,
        *NUMBERS,
        *ROWS,
        UNANSWERABLE,
        ASKING,
    ]
    return sorted({*"0123456789", "yes", "no", *(word for text in texts for word in words_of(text))})


def words_of(text: str) -> list[str]:
    """Split a question or an answer as the word tokenizer does."""
    return re.findall(r"\w+|[.?]", text.lower())
