"""Reads samples, each a conversation with at most one image, from a container and keeps them as memory-mapped Arrow.

A file-level mistake (no such file, not JSON, not a list) is an error. A bad row is not: it becomes a sample whose `Status`
gives the reason, so that row numbers never shift and every skipped row is counted.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.data.containers import IMAGE_COLUMNS, ROWS_PER_BATCH, Container, Embedded, JsonRows, open_container
from switchkd.data.templates import IMAGE_MARKER
from switchkd.errors import DataError


class Status(IntEnum):
    """Whether a sample can be used, and if not, why; stores keep the number."""

    OK = 0
    NO_CONVERSATION = 1  # no list of turns, or an empty one
    BAD_TURN = 2  # a turn without a role or without text
    UNKNOWN_ROLE = 3
    ROLES_OUT_OF_ORDER = 4  # turns must alternate user, assistant, … and end with the assistant
    SEVERAL_IMAGES = 5
    MARKER_WITHOUT_IMAGE = 6  # <image> in a row that names no image, or in an answer
    IMAGE_OUTSIDE_FOLDER = 7
    IMAGE_MISSING = 8
    IMAGE_UNREADABLE = 9
    IMAGE_TOO_LARGE = 10
    TOO_LONG = 11
    NOTHING_SUPERVISED = 12

    @property
    def label(self) -> str:
        """The name in reports and manifests."""
        return self.name.lower()


class BadSample(DataError):
    """A sample that cannot be used: the reason (`status`), a description (`detail`), and its length in tokens if known."""

    def __init__(self, status: Status, detail: str, tokens: int | None = None) -> None:
        super().__init__(f"{status.label}: {detail}")
        self.status = status
        self.detail = detail
        self.tokens = tokens

    def __reduce__(self) -> tuple[type["BadSample"], tuple[Status, str, int | None]]:
        """Pickle the arguments instead of the message, since worker processes send these errors to their parent."""
        return BadSample, (self.status, self.detail, self.tokens)


@dataclass(frozen=True)
class Sample:
    """One row of a data file."""

    index: int  # row number, from 0
    id: str
    image: str | None  # path below the image folder; a name if the data set contains the image itself
    turns: list[tuple[str, str]]  # (question, answer), image markers removed
    question_type: str
    status: Status
    detail: str
    embedded: Callable[[], bytes] | None = field(default=None, compare=False, repr=False)  # the data set's own image

    def require_ok(self) -> None:
        """Raise BadSample if the row could not be read."""
        if self.status is not Status.OK:
            raise BadSample(self.status, f"row {self.index}: {self.detail}")


_IMAGE_PARTS = ("image", "image_url")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# Arrow column → type; `turns` alternates questions and answers.
_COLUMNS = {"id": "string", "image": "string", "question_type": "string", "status": "int32", "detail": "string"}
_COLUMNS_OF_TABLE = _COLUMNS | {"embedded": "bool"}


class SampleFile:
    """The samples of one data file, memory-mapped: `len`, `[i]`, iteration.

    Rows are read once and kept as Arrow in the `datasets` cache (HF_DATASETS_CACHE), without the images that a data set may hold;
    later runs and DataLoader workers map that file instead of holding rows.

    Args:
        path: see `containers.open_container`. A row holds `conversations` ([{"from": "human"|"gpt", "value": …}, …]) or `messages`
            ([{"role": "user"|"assistant", "content": text or parts}, …]), and may hold `image` (path below the image folder, or the
            image itself), `id`, `question_type`.

    Raises:
        DataError: no such file, not readable, no row, or no usable row.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._container = open_container(self.path)
        self._table = _arrow_table(self._container)
        self.fingerprint = self._container.sha256 if isinstance(self._container, JsonRows) else _hash_table(self._table)
        counts = self.counts_by_status()
        if not counts.get(Status.OK):
            first = self[0]
            raise DataError(
                f"{self.path} has no usable row among {len(self)}; row 0: {first.status.label}, {first.detail}"
            )

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Sample:
        row = self._table[index]
        texts = row["texts"]
        return Sample(
            index=index,
            id=row["id"],
            image=row["image"],
            turns=list(zip(texts[::2], texts[1::2], strict=True)),
            question_type=row["question_type"],
            status=Status(row["status"]),
            detail=row["detail"],
            embedded=partial(self._container.image_bytes, index) if row["embedded"] else None,
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def counts_by_status(self) -> dict[Status, int]:
        """Return how many rows have each status, before any image or text length is checked."""
        counts: dict[Status, int] = {}
        for code in self._table.data.column("status").to_pylist():
            counts[Status(code)] = counts.get(Status(code), 0) + 1
        return counts

    def characters(self) -> NDArray[np.int64]:
        """Return the characters of each row's turns, [n]; from the Arrow column, without building samples."""
        import pyarrow.compute as arrow

        counts = []
        for chunk in self._table.data.column("texts").chunks:
            ends = np.concatenate([[0], np.cumsum(arrow.utf8_length(chunk.flatten()).to_numpy())])
            borders = np.concatenate([[0], np.cumsum(arrow.list_value_length(chunk).to_numpy())])
            counts.append(np.diff(ends[borders]))
        return np.concatenate(counts).astype(np.int64)

    def has_image(self) -> NDArray[np.bool_]:
        """Return which rows name an image, [n]."""
        named: NDArray[np.bool_] = np.asarray(self._table.data.column("image").is_valid())
        return named

    def rows_in_folder(self) -> NDArray[np.int64]:
        """Return the numbers of the rows that name an image in an image folder, in order."""
        embedded = np.asarray(self._table.data.column("embedded"))
        return np.flatnonzero(self.has_image() & ~embedded)

    def needs_folder(self) -> bool:
        """Return whether a row names an image that lies in an image folder."""
        return len(self.rows_in_folder()) > 0


def read_row(row: Any, index: int) -> Sample:
    """Convert one row of a data file to a sample; an error in it becomes the sample's status and detail.

    The image's bytes are not read: if `embedded` is set, `SampleFile` replaces it by a function that reads them.
    """
    image: str | Embedded | None
    try:
        if not isinstance(row, dict):
            raise BadSample(Status.NO_CONVERSATION, f"expected an object, found {type(row).__name__}")
        conversation = _conversation_of(row)
        image = _image_of(row, conversation)
        turns = _turns_of(conversation, image is not None)
        status, detail = Status.OK, ""
    except BadSample as bad:
        image, turns, status, detail = None, [], bad.status, bad.detail
    named = row if isinstance(row, dict) else {}
    name = index if named.get("id") is None else named["id"]
    embedded = None
    if isinstance(image, Embedded):
        image, embedded = image.name or f"image of row {index}", bytes
    question_type = _writable(str(named.get("question_type") or ""))
    return Sample(index, _writable(str(name)), image, turns, question_type, status, detail, embedded)


def _writable(text: str) -> str:
    """Escape characters that UTF-8, and so Arrow, cannot encode: JSON may contain half of a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode()


def _conversation_of(row: dict[str, Any]) -> list[Any]:
    """Return a row's turns unchanged, from LLaVA's or OpenAI's keys."""
    found = next((row[name] for name in ("conversations", "messages") if row.get(name) is not None), None)
    if not isinstance(found, list) or not found:
        raise BadSample(Status.NO_CONVERSATION, "no list 'conversations' or 'messages' with at least one turn")
    return found


def _image_of(row: dict[str, Any], conversation: list[Any]) -> str | Embedded | None:
    image = next((row[name] for name in IMAGE_COLUMNS if row.get(name) is not None), None)
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
    if image and image.startswith("data:"):
        raise BadSample(Status.IMAGE_UNREADABLE, "the image is a data URL; keep it as a file or as bytes")
    return _writable(image) if image else None


def _paths_in_parts(turn: Any) -> Iterator[str]:
    """Yield the image references in a turn's content parts: {"type": "image", "path": …} and its variants."""
    content = turn.get("content") if isinstance(turn, dict) else None
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and part.get("type") in _IMAGE_PARTS:
            named = next((part[name] for name in ("image", "path", "url", "image_url") if part.get(name)), None)
            named = named.get("url") if isinstance(named, dict) else named
            if isinstance(named, str):
                yield named


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


def _hash_table(table: Any) -> str:
    """Hash the rows' columns; the images' bytes enter each sample's digest instead."""
    digest = hashlib.sha256()
    for batch in table.data.table.to_batches(max_chunksize=ROWS_PER_BATCH):
        digest.update(batch.serialize())
    return digest.hexdigest()


def _arrow_table(container: Container) -> Any:
    import datasets

    features = datasets.Features(
        {"texts": datasets.List(datasets.Value("string"))}
        | {name: datasets.Value(kind) for name, kind in _COLUMNS_OF_TABLE.items()}
    )

    def generate() -> Iterator[dict[str, Any]]:
        for index, row in enumerate(container.rows()):
            sample = read_row(row, index)
            yield {
                "texts": [text for turn in sample.turns for text in turn],
                "embedded": sample.embedded is not None,
                **{name: getattr(sample, name) for name in _COLUMNS},
            }

    # Version of the row format above: increase it with any change, so that older Arrow files are not reused.
    row_format = 2
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_generator(
            generate, features=features, fingerprint=f"switchkd-{row_format}-{container.key}"
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise
