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
class ImageSource:
    """Where an image comes from: a path below the image folder, a data URL, or the data set itself, which may name it."""

    name: str
    embedded: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)  # the data set's own image

    def __post_init__(self) -> None:
        if self.name.startswith(DATA_URL):
            object.__setattr__(self, "embedded", partial(bytes_of_data_url, self.name))


@dataclass(frozen=True)
class Sample:
    """One row of a data file."""

    index: int  # row number, from 0
    id: str
    image: str | None  # path below the image folder; a name if the data set contains the image itself; or a data URL
    turns: list[tuple[str, str]]  # (question, answer); image markers are removed unless they are `placed`
    question_type: str
    status: Status
    detail: str
    embedded: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)  # the data set's own image
    notes: tuple[str, ...] = ()  # what is odd about the row, though it is used
    unsupervised: tuple[int, ...] = ()  # numbers of the answers that the row says are not to be trained on
    further: tuple[ImageSource, ...] = ()  # images after the first
    system: str = ""  # the row's system prompt

    def __post_init__(self) -> None:
        if self.image is not None:
            object.__setattr__(self, "embedded", ImageSource(self.image, self.embedded).embedded)

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """All images, in the order of the conversation."""
        return () if self.image is None else (ImageSource(self.image, self.embedded), *self.further)

    @property
    def placed(self) -> bool:
        """Whether the questions hold a marker for every image; otherwise the template places the images before the first one."""
        return any(IMAGE_MARKER in question for question, _ in self.turns)

    def images_before(self, turn: int) -> int:
        """Return how many of the images stand in the first `turn` turns."""
        if not self.placed:
            return len(self.images) if turn else 0
        return sum(question.count(IMAGE_MARKER) for question, _ in self.turns[:turn])

    def require_ok(self) -> None:
        """Raise BadSample if the row could not be read."""
        if self.status is not Status.OK:
            raise BadSample(self.status, f"row {self.index}: {self.detail}")


DATA_URL = "data:"
_BASE64_URL = re.compile(r"data:[^,;]{0,100}(?:;[^,;]{0,100})*;base64,", re.IGNORECASE)
_IMAGE_PARTS = ("image", "image_url")
SYSTEM = "system"
VIDEO_COLUMNS = ("video", "videos")
MAX_IMAGES = 256
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read_row(row: Any, index: int) -> Sample:
    """Convert one row of a data file to a sample; an error in it becomes the sample's status and detail.

    The image's bytes are not read: if `embedded` is set, `SampleFile` replaces it by a function that reads them.
    """
    images: list[str | Embedded] = []
    notes: list[str] = []
    unsupervised: tuple[int, ...] = ()
    system = ""
    try:
        if not isinstance(row, dict):
            raise BadSample(Status.NO_CONVERSATION, f"expected an object, found {type(row).__name__}")
        conversation = _conversation_of(row)
        if video := next((name for name in VIDEO_COLUMNS if row.get(name)), None):
            raise BadSample(
                Status.BAD_TURN, f"key {video!r} names a video, which is not read: give its frames as images"
            )
        images = _images_of(row, conversation, notes)
        system, conversation = _system_of(conversation)
        turns = _turns_of(conversation, len(images))
        unsupervised = _unsupervised(conversation)
        notes += notes_on(turns, bool(images))
        status, detail = Status.OK, ""
    except BadSample as bad:
        images, turns, status, detail, notes, system = [], [], bad.status, bad.detail, [], ""
    named = row if isinstance(row, dict) else {}
    name = index if named.get("id") is None else named["id"]
    sources = [
        ImageSource(image.name or f"image of row {index}", bytes) if isinstance(image, Embedded) else ImageSource(image)
        for image in images
    ]
    question_type = _writable(_text_of_id(named.get("question_type") or ""))
    return Sample(
        index,
        _writable(_text_of_id(name)),
        sources[0].name if sources else None,
        turns,
        question_type,
        status,
        detail,
        sources[0].embedded if sources else None,
        tuple(notes),
        unsupervised,
        tuple(sources[1:]),
        system,
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


def _images_of(row: dict[str, Any], conversation: list[Any], notes: list[str]) -> list[str | Embedded]:
    """Return a row's images, from one of the keys that are read, or from the parts of its turns; adds to `notes`."""
    given = {name: row[name] for name in IMAGE_COLUMNS if row.get(name) is not None}
    values = {name: _without_nulls(value, name, notes) for name, value in given.items()}
    named = {name: value for name, value in values.items() if value not in (None, "", [])}
    if documented := {name: value for name, value in named.items() if name in DOCUMENTED_COLUMNS}:
        named = documented
    found: Any = next(iter(named.values()), None)
    if any(_single(value) != _single(found) for value in named.values()):
        raise BadSample(Status.SEVERAL_IMAGES, f"the keys {', '.join(named)} hold different images; use one of them")
    if found is None:
        found = [path for turn in conversation for path in _paths_in_parts(turn)]
    images = [image for image in map(_image_of, found if isinstance(found, list) else [found]) if image]
    if len(images) > MAX_IMAGES:
        raise BadSample(Status.SEVERAL_IMAGES, f"{len(images)} images; a sample has at most {MAX_IMAGES}")
    if not images and (other := key_like_an_image(row)):
        raise BadSample(
            Status.IMAGE_MISSING,
            f"key {printable(other, 60)!r} looks like an image, and images are read from {', '.join(IMAGE_COLUMNS)}: rename it",
        )
    return images


def _image_of(image: Any) -> str | Embedded | None:
    if isinstance(image, dict) and isinstance(image.get("path"), str):
        image = image["path"]
    if image is not None and not isinstance(image, str | Embedded):
        raise BadSample(Status.IMAGE_MISSING, f"image should be a path, found {type(image).__name__}")
    if isinstance(image, Embedded):
        return Embedded(_writable(image.name))
    if image and image.startswith(DATA_URL):
        bytes_of_data_url(image)  # now, so that a damaged one is a bad row like any other
        return image
    return _writable(image) if image else None


def _system_of(conversation: list[Any]) -> tuple[str, list[Any]]:
    """Return a conversation's system prompt, "" without one, and its other turns."""
    first = conversation[0]
    if not isinstance(first, dict) or SYSTEM not in (first.get("from"), first.get("role")):
        return "", conversation
    _, text = _words_of(first, 0)
    if IMAGE_MARKER in text:
        raise BadSample(Status.MARKER_WITHOUT_IMAGE, f"turn 0, the system prompt, holds {IMAGE_MARKER}")
    if len(conversation) == 1:
        raise BadSample(Status.NO_CONVERSATION, "a system prompt, and no turn after it")
    return text.strip(), conversation[1:]


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


def _turns_of(conversation: list[Any], images: int) -> list[tuple[str, str]]:
    """Return the turns.

    A row of one image with its marker in the first question, as LLaVA's, has no marker afterwards: the template places the image.
    Otherwise the markers stay where they are, one for each image.
    """
    texts: list[str] = []
    for number, turn in enumerate(conversation):
        speaker, spoken = _words_of(turn, number)
        if _writable(spoken) != spoken:
            raise BadSample(Status.BAD_TURN, f"turn {number} holds half of a surrogate pair")
        role = ROLES.get(str(speaker))
        if role is None:
            known = ", ".join((*ROLES, SYSTEM + " (first)"))
            raise BadSample(Status.UNKNOWN_ROLE, f"turn {number} is from {speaker!r}; known: {known}")
        if role != ("user", "assistant")[number % 2]:
            raise BadSample(Status.ROLES_OUT_OF_ORDER, f"turn {number} is from {speaker!r}")
        if role == "assistant" and IMAGE_MARKER in spoken:
            raise BadSample(Status.MARKER_WITHOUT_IMAGE, f"turn {number}, an answer, holds {IMAGE_MARKER}")
        texts.append(spoken.strip())
    if len(texts) % 2:
        raise BadSample(Status.ROLES_OUT_OF_ORDER, "the last turn is a question without an answer")
    markers = sum(text.count(IMAGE_MARKER) for text in texts)
    if markers and not images:
        raise BadSample(Status.MARKER_WITHOUT_IMAGE, f"{IMAGE_MARKER} in a row that names no image")
    if markers not in (0, images):
        raise BadSample(Status.SEVERAL_IMAGES, f"markers {IMAGE_MARKER}: {markers}, images: {images}")
    if texts and images == 1 and IMAGE_MARKER in texts[0]:
        texts[0] = texts[0].replace(IMAGE_MARKER, "").strip()
        if IMAGE_MARKER in texts[0]:  # removing the marker from "<im<image>age>" leaves another
            raise BadSample(Status.SEVERAL_IMAGES, f"markers {IMAGE_MARKER}: 2, images: 1")
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
