"""Samples: one conversation with zero or one image, read from LLaVA-style JSON and kept in memory-mapped Arrow.

A file-level mistake (no such file, not JSON, not a list) is an error. A bad row is not: it becomes a sample with a `Status`
that says why it cannot be used, so that row numbers never shift and every skip is counted.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.errors import DataError
from switchkd.templates import IMAGE_MARKER


class Status(IntEnum):
    """Why a sample can or cannot be used; stores keep the number."""

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
        """The name as people and manifests read it."""
        return self.name.lower()


class BadSample(DataError):
    """A sample that cannot be used; says why (`status`) and which (`detail`), and how long it is where that is known."""

    def __init__(self, status: Status, detail: str, tokens: int | None = None) -> None:
        super().__init__(f"{status.label}: {detail}")
        self.status = status
        self.detail = detail
        self.tokens = tokens

    def __reduce__(self) -> tuple[type["BadSample"], tuple[Status, str, int | None]]:
        """Pickle the arguments and not the message; worker processes hand these errors over."""
        return BadSample, (self.status, self.detail, self.tokens)


@dataclass(frozen=True)
class Sample:
    """One row of a data file."""

    index: int  # row number, from 0
    id: str
    image: str | None  # path below the image folder
    turns: list[tuple[str, str]]  # (question, answer), image markers removed
    question_type: str
    status: Status
    detail: str

    def require_ok(self) -> None:
        """Raise BadSample if the row could not be read."""
        if self.status is not Status.OK:
            raise BadSample(self.status, f"row {self.index}: {self.detail}")


ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
# Arrow column → type; `turns` alternates questions and answers.
_COLUMNS = {"id": "string", "image": "string", "question_type": "string", "status": "int32", "detail": "string"}


class SampleFile:
    """The samples of one data file, memory-mapped: `len`, `[i]`, iteration.

    The JSON is read once and kept as Arrow in the `datasets` cache (HF_DATASETS_CACHE); later runs and DataLoader workers
    map that file instead of holding rows.

    Args:
        path: a JSON list of rows, or JSON Lines. A row holds `conversations` ([{"from": "human"|"gpt", "value": …}, …]), and
            may hold `image` (path below the image folder), `id`, `question_type`.

    Raises:
        DataError: no such file, not JSON, not a list of rows, no row, or no usable row.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"no data file {self.path}: --data takes a LLaVA-style JSON or JSON Lines file")
        self.fingerprint = _hash_file(self.path)
        self._table = _arrow_table(self.path, self.fingerprint)
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
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def counts_by_status(self) -> dict[Status, int]:
        """Return how many rows have each status, before any image or text length is looked at."""
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


def read_row(row: Any, index: int) -> Sample:
    """Read one row of a data file; whatever is wrong with it becomes its status and detail."""
    try:
        if not isinstance(row, dict):
            raise BadSample(Status.NO_CONVERSATION, f"expected an object, found {type(row).__name__}")
        image = _image_of(row)
        turns = _turns_of(row, image)
        status, detail = Status.OK, ""
    except BadSample as bad:
        image, turns, status, detail = None, [], bad.status, bad.detail
    named = row if isinstance(row, dict) else {}
    name = index if named.get("id") is None else named["id"]
    return Sample(
        index, _writable(str(name)), image, turns, _writable(str(named.get("question_type") or "")), status, detail
    )


def _writable(text: str) -> str:
    """Escape what UTF-8, and so Arrow, cannot hold: JSON may spell half of a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode()


def _image_of(row: dict[str, Any]) -> str | None:
    image = row.get("image")
    if isinstance(image, list):
        if len(image) > 1:
            raise BadSample(Status.SEVERAL_IMAGES, f"{len(image)} images; a sample has at most one")
        image = image[0] if image else None
    if image is not None and not isinstance(image, str):
        raise BadSample(Status.IMAGE_MISSING, f"image should be a path, found {type(image).__name__}")
    return _writable(image) if image else None


def _turns_of(row: dict[str, Any], image: str | None) -> list[tuple[str, str]]:
    conversation = row.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise BadSample(Status.NO_CONVERSATION, "no list 'conversations' with at least one turn")
    texts: list[str] = []
    markers = 0
    for number, turn in enumerate(conversation):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or "from" not in turn:
            raise BadSample(Status.BAD_TURN, f"turn {number} needs 'from' and a text 'value'")
        if _writable(turn["value"]) != turn["value"]:
            raise BadSample(Status.BAD_TURN, f"turn {number} holds half of a surrogate pair")
        role = ROLES.get(str(turn["from"]))
        if role is None:
            raise BadSample(Status.UNKNOWN_ROLE, f"turn {number} is from {turn['from']!r}; known: {', '.join(ROLES)}")
        if role != ("user", "assistant")[number % 2]:
            raise BadSample(Status.ROLES_OUT_OF_ORDER, f"turn {number} is from {turn['from']!r}")
        if role == "assistant" and IMAGE_MARKER in turn["value"]:
            raise BadSample(Status.MARKER_WITHOUT_IMAGE, f"turn {number}, an answer, holds {IMAGE_MARKER}")
        text = turn["value"].replace(IMAGE_MARKER, "").strip()
        markers += turn["value"].count(IMAGE_MARKER) + text.count(IMAGE_MARKER)  # "<im<image>age>" leaves another
        texts.append(text)
    if len(texts) % 2:
        raise BadSample(Status.ROLES_OUT_OF_ORDER, "the last turn is a question without an answer")
    if markers > 1:
        raise BadSample(Status.SEVERAL_IMAGES, f"{markers} markers {IMAGE_MARKER}; a sample has at most one image")
    if markers and image is None:
        raise BadSample(Status.MARKER_WITHOUT_IMAGE, f"{IMAGE_MARKER} in a row that names no image")
    return list(zip(texts[::2], texts[1::2], strict=True))


def _rows_of(path: Path) -> Iterator[Any]:
    """Yield a data file's rows: one JSON list, or one object a line."""
    where = str(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            start = file.read(64).lstrip()[:1]
            file.seek(0)
            if start == "{":
                for number, line in enumerate(file, 1):
                    where = f"{path}, line {number},"
                    if line.strip():
                        yield json.loads(line)
                return
            rows = json.load(file)
    except UnicodeDecodeError as error:  # raised for a block of the file, so no line is known
        raise DataError(f"{path} is not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}; expected a list of rows or one JSON object a line") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path} should hold a list with at least one row, found {type(rows).__name__}")
    yield from rows


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _arrow_table(path: Path, fingerprint: str) -> Any:
    import datasets

    features = datasets.Features(
        {"texts": datasets.List(datasets.Value("string"))}
        | {name: datasets.Value(kind) for name, kind in _COLUMNS.items()}
    )

    def generate() -> Iterator[dict[str, Any]]:
        for index, row in enumerate(_rows_of(path)):
            sample = read_row(row, index)
            yield {
                "texts": [text for turn in sample.turns for text in turn],
                **{name: getattr(sample, name) for name in _COLUMNS},
            }

    # Version of the row format above: raise it with any change, so that older Arrow files are not taken for current ones.
    row_format = 1
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_generator(
            generate, features=features, fingerprint=f"switchkd-{row_format}-{fingerprint[:40]}"
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise
