"""Checks of what was parsed from a store's metadata: types, ranges and sizes, before anything is computed or allocated from them.

The functions raise ValueError, which says what was expected and found; their callers add the file and the remedy.
"""

import json
import math
from typing import Any, NoReturn

METADATA_BYTES = 1 << 25  # of one zarr.json; a part's own has some 10 bytes for every chunk
TEXT_CHARACTERS = 1 << 20  # of one text in the metadata; a chat template has some thousand


def parse(data: bytes) -> Any:
    """Return JSON data. Raises ValueError: not JSON, nested too deep, a number too large, NaN or infinity."""
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refused, parse_float=_finite)
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None


def attribute(data: bytes, name: str) -> Any:
    """Return one attribute of a group's zarr.json, None if it has none. Raises ValueError: not the metadata of a group."""
    return mapping(mapping(parse(data), "zarr.json").get("attributes"), "attributes").get(name)


def mapping(value: Any, name: str) -> dict[str, Any]:
    """Return an object."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} should be an object, found {shown(value)}")
    return value


def whole(value: Any, name: str, low: int, high: int) -> int:
    """Return a whole number between `low` and `high`, both allowed."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} should be a whole number from {low} to {high}, found {shown(value)}")
    return value


def number(value: Any, name: str, low: float, high: float) -> float:
    """Return a finite number between `low` and `high`, both allowed."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{name} should be a number from {low:g} to {high:g}, found {shown(value)}")
    return float(value)


def text(value: Any, name: str) -> str:
    """Return a text of bounded length that can be written as UTF-8."""
    if not isinstance(value, str):
        raise ValueError(f"{name} should be a text, found {shown(value)}")
    if len(value) > TEXT_CHARACTERS:
        raise ValueError(f"{name} should have at most {TEXT_CHARACTERS} characters, found {len(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not Unicode text: {shown(value)}") from None
    return value


def texts(value: Any, name: str) -> dict[str, str]:
    """Return an object of texts."""
    return {
        text(key, f"a key of {name}"): text(each, f"{name} {key!a:.40}") for key, each in mapping(value, name).items()
    }


def one_of(value: Any, name: str, allowed: tuple[Any, ...]) -> Any:
    """Return one of the allowed values, of the same type as the one allowed."""
    for each in allowed:
        if type(value) is type(each) and value == each:
            return value
    raise ValueError(f"{name} should be {' or '.join(map(repr, allowed))}, found {shown(value)}")


def shown(value: Any) -> str:
    """Return a short form of any value, in ASCII, for an error."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if type(value) is int and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    words = ascii(value[:60]) if isinstance(value, str) else ascii(value)
    return words if len(words) <= 60 else f"{words[:57]}..."


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"{word[:20]} is not a finite number")
    return value


def _refused(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a number")
