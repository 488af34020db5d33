"""Converts a row of a data file, plain data of any origin, to a sample: its turns, its image, what is odd about it.

A bad row becomes a sample whose `Status` gives the reason, so that row numbers never shift and every skipped row is counted.
"""

import base64
import binascii
import re
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from switchkd.data.containers import DOCUMENTED_COLUMNS, IMAGE_COLUMNS, Embedded
from switchkd.data.oddities import HOLDS_NULL, key_like_an_image, notes_on
from switchkd.data.status import BadSample, Status
from switchkd.data.templates import IMAGE_MARKER
from switchkd.printable import printable


@dataclass(frozen=True)
class Sample:
    """One row of a data file."""

    index: int  # row number, from 0
    id: str
    image: str | None  # path below the image folder; a name if the data set contains the image itself; or a data URL
    turns: list[tuple[str, str]]  # (question, answer), image markers removed
    question_type: str
    status: Status
    detail: str
    embedded: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)  # the data set's own image
    notes: tuple[str, ...] = ()  # what is odd about the row, though it is used
    unsupervised: tuple[int, ...] = ()  # numbers of the answers that the row says are not to be trained on

    def __post_init__(self) -> None:
        if self.image is not None and self.image.startswith(DATA_URL):
            object.__setattr__(self, "embedded", partial(bytes_of_data_url, self.image))

    def require_ok(self) -> None:
        """Raise BadSample if the row could not be read."""
        if self.status is not Status.OK:
            raise BadSample(self.status, f"row {self.index}: {self.detail}")


DATA_URL = "data:"
_BASE64_URL = re.compile(r"data:[^,;]{0,100}(?:;[^,;]{0,100})*;base64,", re.IGNORECASE)
_IMAGE_PARTS = ("image", "image_url")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read_row(row: Any, index: int) -> Sample:
    """Convert one row of a data file to a sample; an error in it becomes the sample's status and detail.

    The image's bytes are not read: if `embedded` is set, `SampleFile` replaces it by a function that reads them.
    """
    image: str | Embedded | None
    notes: list[str] = []
    unsupervised: tuple[int, ...] = ()
    try:
        if not isinstance(row, dict):
            raise BadSample(Status.NO_CONVERSATION, f"expected an object, found {type(row).__name__}")
        conversation = _conversation_of(row)
        image = _image_of(row, conversation, notes)
        turns = _turns_of(conversation, image is not None)
        unsupervised = _unsupervised(conversation)
        notes += notes_on(turns, image is not None)
        status, detail = Status.OK, ""
    except BadSample as bad:
        image, turns, status, detail, notes = None, [], bad.status, bad.detail, []
    named = row if isinstance(row, dict) else {}
    name = index if named.get("id") is None else named["id"]
    embedded = None
    if isinstance(image, Embedded):
        image, embedded = image.name or f"image of row {index}", bytes
    question_type = _writable(_text_of_id(named.get("question_type") or ""))
    return Sample(
        index,
        _writable(_text_of_id(name)),
        image,
        turns,
        question_type,
        status,
        detail,
        embedded,
        tuple(notes),
        unsupervised,
    )


def _text_of_id(name: Any) -> str:
    try:
        return str(name)
    except (ValueError, RecursionError):  # a number of thousands of digits, or nested too deep
        return f"a {type(name).__name__} too large to print"


def _writable(text: str) -> str:
    """Escape characters that UTF-8, and so Arrow, cannot encode: JSON may contain half of a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode()


def _conversation_of(row: dict[str, Any]) -> list[Any]:
    """Return a row's turns unchanged, from LLaVA's or OpenAI's keys."""
    found = next((row[name] for name in ("conversations", "messages") if row.get(name) is not None), None)
    if not isinstance(found, list) or not found:
        raise BadSample(Status.NO_CONVERSATION, "no list 'conversations' or 'messages' with at least one turn")
    return found


def _image_of(row: dict[str, Any], conversation: list[Any], notes: list[str]) -> str | Embedded | None:
    """Return a row's image, from one of the keys that are read, or from the parts of its turns; adds to `notes`."""
    given = {name: row[name] for name in IMAGE_COLUMNS if row.get(name) is not None}
    values = {name: _without_nulls(value, name, notes) for name, value in given.items()}
    named = {name: value for name, value in values.items() if value not in (None, "", [])}
    if documented := {name: value for name, value in named.items() if name in DOCUMENTED_COLUMNS}:
        named = documented
    image = next(iter(named.values()), None)
    if any(_single(value) != _single(image) for value in named.values()):
        raise BadSample(
            Status.SEVERAL_IMAGES, f"the keys {', '.join(named)} hold different images; a sample has at most one"
        )
    if image is None:
        image = [path for turn in conversation for path in _paths_in_parts(turn)]
    if isinstance(image, list):
        if len(image) > 1:
            raise BadSample(Status.SEVERAL_IMAGES, f"{len(image)} images; a sample has at most one")
        image = image[0] if image else None
    if isinstance(image, dict) and isinstance(image.get("path"), str):
        image = image["path"]
    if image is not None and not isinstance(image, str | Embedded):
        raise BadSample(Status.IMAGE_MISSING, f"image should be a path, found {type(image).__name__}")
    if isinstance(image, Embedded):
        return Embedded(_writable(image.name))
    if image and image.startswith(DATA_URL):
        bytes_of_data_url(image)  # now, so that a damaged one is a bad row like any other
        return image
    if not image and (other := key_like_an_image(row)):
        raise BadSample(
            Status.IMAGE_MISSING,
            f"key {printable(other, 60)!r} looks like an image, and images are read from {', '.join(IMAGE_COLUMNS)}: rename it",
        )
    return _writable(image) if image else None


def _single(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _without_nulls(value: Any, name: str, notes: list[str]) -> Any:
    if not isinstance(value, list) or None not in value:
        return value
    notes.append(f"{name} {HOLDS_NULL}")
    return [item for item in value if item is not None]


def _paths_in_parts(turn: Any) -> Iterator[str]:
    """Yield the image references in a turn's content parts: {"type": "image", "path": …} and its variants; bytes as a data URL."""
    content = turn.get("content") if isinstance(turn, dict) else None
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and part.get("type") in _IMAGE_PARTS:
            named = next((part[name] for name in ("image", "path", "url", "image_url") if part.get(name)), None)
            if isinstance(named, dict):
                named = named.get("url") or named.get("bytes") or named.get("path")
            if named is None and isinstance(part.get("bytes"), bytes):
                named = part["bytes"]
            if isinstance(named, bytes):
                named = f"data:;base64,{base64.b64encode(named).decode()}"
            if isinstance(named, str):
                yield named


def bytes_of_data_url(url: str) -> bytes:
    """Return the bytes that a data URL holds in base64.

    Raises:
        BadSample: not base64, or damaged.
    """
    start = _BASE64_URL.match(url)
    text = "".join(url[start.end() :].split()) if start else ""
    try:
        data = base64.b64decode(urllib.parse.unquote(text) if "%" in text else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample(Status.IMAGE_UNREADABLE, f"the image is a data URL that is damaged: {error}") from None
    if not data:
        raise BadSample(
            Status.IMAGE_UNREADABLE, "the image is a data URL without base64 data; expected data:image/png;base64,…"
        )
    return data


def _unsupervised(conversation: list[Any]) -> tuple[int, ...]:
    """Return the numbers of the answers that are not to be trained on: `weight` 0 (OpenAI), `loss` (ms-swift) or `train` false.

    Raises:
        BadSample: a weight that is neither 0 nor 1.
    """
    found = []
    for number, turn in enumerate(conversation[1::2]):
        weight = turn.get("weight")
        if weight is not None and weight not in (0, 1):
            raise BadSample(
                Status.BAD_TURN,
                f"turn {2 * number + 1} has weight {printable(repr(weight), 60)}; known: 0, not trained on, and 1",
            )
        if weight == 0 or any(turn.get(name) in (0, False) for name in ("loss", "train") if turn.get(name) is not None):
            found.append(number)
    return tuple(found)


def _turns_of(conversation: list[Any], has_image: bool) -> list[tuple[str, str]]:
    texts: list[str] = []
    markers = 0
    for number, turn in enumerate(conversation):
        speaker, spoken = _words_of(turn, number)
        if _writable(spoken) != spoken:
            raise BadSample(Status.BAD_TURN, f"turn {number} holds half of a surrogate pair")
        role = ROLES.get(str(speaker))
        if role is None:
            raise BadSample(Status.UNKNOWN_ROLE, f"turn {number} is from {speaker!r}; known: {', '.join(ROLES)}")
        if role != ("user", "assistant")[number % 2]:
            raise BadSample(Status.ROLES_OUT_OF_ORDER, f"turn {number} is from {speaker!r}")
        if role == "assistant" and IMAGE_MARKER in spoken:
            raise BadSample(Status.MARKER_WITHOUT_IMAGE, f"turn {number}, an answer, holds {IMAGE_MARKER}")
        text = spoken.replace(IMAGE_MARKER, "").strip()
        markers += spoken.count(IMAGE_MARKER) + text.count(
            IMAGE_MARKER
        )  # removing the marker from "<im<image>age>" leaves another
        texts.append(text)
    if len(texts) % 2:
        raise BadSample(Status.ROLES_OUT_OF_ORDER, "the last turn is a question without an answer")
    if markers > 1:
        raise BadSample(Status.SEVERAL_IMAGES, f"{markers} markers {IMAGE_MARKER}; a sample has at most one image")
    if markers and not has_image:
        raise BadSample(Status.MARKER_WITHOUT_IMAGE, f"{IMAGE_MARKER} in a row that names no image")
    return list(zip(texts[::2], texts[1::2], strict=True))


def _words_of(turn: Any, number: int) -> tuple[Any, str]:
    """Return (role, text) of a turn; for content parts, the texts in order, with a marker for an image."""
    for speaker, spoken in (("from", "value"), ("role", "content")):
        if isinstance(turn, dict) and speaker in turn:
            content = turn.get(spoken)
            if isinstance(content, list):
                content = "".join(_text_of_part(part, number) for part in content)
            if isinstance(content, str):
                return turn[speaker], content
    raise BadSample(Status.BAD_TURN, f"turn {number} needs 'from' and a text 'value', or 'role' and 'content'")


def _text_of_part(part: Any, number: int) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _IMAGE_PARTS:
        return IMAGE_MARKER
    if kind == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    raise BadSample(
        Status.BAD_TURN, f"turn {number} has a part of type {kind!r}; known: text, {', '.join(_IMAGE_PARTS)}"
    )
