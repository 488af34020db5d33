"""Counts with their noun, for lines and messages that people read."""


def counted(count: int, noun: str) -> str:
    """Return a count and its noun in the right number: "1 part", "2 parts", "12,000 entries".

    Args:
        noun: in the singular, its last word the one that changes: "part", "image token", "batch", "entry".
    """
    return f"{count:,} {noun if count == 1 else _plural(noun)}"


def _plural(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")
