"""Reads samples, each a conversation with its images, from a container and keeps them as memory-mapped Arrow.

A file-level mistake (no such file, not JSON, not a list) is an error. A bad row is not: it becomes a sample whose `Status`
gives the reason, so that row numbers never shift and every skipped row is counted.
"""

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.data.containers import ROWS_PER_BATCH, Container, open_container
from switchkd.data.json_rows import JsonRows
from switchkd.data.row_cache import cached_table
from switchkd.data.rows import ROLES, ImageSource, Sample, read_row
from switchkd.data.status import BadSample, Status
from switchkd.errors import DataError
from switchkd.printable import printable

__all__ = ["ROLES", "BadSample", "Sample", "SampleFile", "Status", "read_row"]

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
        RunError: the folder of the cache cannot be written, or memory ran out.
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
                f"{printable(self.path)} has no usable row among {len(self)}; row 0: {first.status.label}, "
                f"{printable(first.detail, 300)}{self._container.advice()}"
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
            notes=tuple(row["notes"]),
            unsupervised=tuple(row["unsupervised"]),
            further=tuple(
                ImageSource(name, partial(self._container.image_bytes, index, number) if held else None)
                for number, (name, held) in enumerate(zip(row["further"], row["further_embedded"], strict=True), 1)
            ),
            system=row["system"],
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def counts_by_status(self) -> dict[Status, int]:
        """Return how many rows have each status, before any image or text length is checked."""
        counts: dict[Status, int] = {}
        for code in self._table.data.column("status").to_pylist():
            counts[Status(code)] = counts.get(Status(code), 0) + 1
        return counts

    def notes(self) -> dict[str, list[int]]:
        """Return what is odd about usable rows: note → row numbers."""
        import pyarrow.compute as arrow

        odd = np.flatnonzero(np.asarray(arrow.list_value_length(self._table.data.column("notes"))))
        found: dict[str, list[int]] = {}
        for row in map(int, odd):
            for note in self._table[row]["notes"]:
                found.setdefault(note, []).append(row)
        return found

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

    def image_counts(self) -> NDArray[np.int64]:
        """Return how many images each row has, [n]."""
        import pyarrow.compute as arrow

        further = np.asarray(arrow.list_value_length(self._table.data.column("further"))).astype(np.int64)
        return self.has_image() + further

    def rows_in_folder(self) -> NDArray[np.int64]:
        """Return the numbers of the rows that name an image in an image folder, in order."""
        embedded = np.asarray(self._table.data.column("embedded"))
        return np.flatnonzero(self.has_image() & ~embedded)

    def needs_folder(self) -> bool:
        """Return whether a row names an image that lies in an image folder."""
        return len(self.rows_in_folder()) > 0


def _hash_table(table: Any) -> str:
    """Hash the rows' columns; the images' bytes enter each sample's digest instead."""
    # Columns that came later are left out: the hash is part of the identity of stores.
    columns = ["texts", *_COLUMNS_OF_TABLE]
    digest = hashlib.sha256()
    for batch in table.data.table.select(columns).to_batches(max_chunksize=ROWS_PER_BATCH):
        digest.update(batch.serialize())
    return digest.hexdigest()


def _arrow_table(container: Container) -> Any:
    import datasets

    features = datasets.Features(
        {"texts": datasets.List(datasets.Value("string"))}
        | {name: datasets.Value(kind) for name, kind in _COLUMNS_OF_TABLE.items()}
        | {"notes": datasets.List(datasets.Value("string")), "unsupervised": datasets.List(datasets.Value("int32"))}
        | {
            "further": datasets.List(datasets.Value("string")),
            "further_embedded": datasets.List(datasets.Value("bool")),
        }
        | {"system": datasets.Value("string")}
    )

    def generate() -> Iterator[dict[str, Any]]:
        for index, row in enumerate(container.rows()):
            sample = read_row(row, index)
            yield {
                "texts": [text for turn in sample.turns for text in turn],
                "embedded": sample.embedded is not None,
                "notes": sample.notes,
                "unsupervised": sample.unsupervised,
                "further": [image.name for image in sample.further],
                "further_embedded": [image.embedded is not None for image in sample.further],
                "system": sample.system,
                **{name: getattr(sample, name) for name in _COLUMNS},
            }

    # Version of the row format above: increase it with any change, so that older Arrow files are not reused.
    row_format = 5
    return cached_table(generate, features, f"switchkd-{row_format}-{container.key}")
