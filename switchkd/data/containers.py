"""Reads rows from data files: LLaVA-style JSON, or a data set of Hugging Face `datasets`, whose rows may contain images.

A container yields rows as plain data, in order; `samples.read_row` converts them to samples, independent of the kind of container.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from switchkd.errors import DataError

ROWS_PER_BATCH = 1000
IMAGE_COLUMNS = ("image", "images")


@dataclass(frozen=True)
class Embedded:
    """Placeholder for an image whose bytes the container holds; they are not read with the row."""

    name: str  # the file's name if the container stores it, else ""


class Container(Protocol):
    """Rows in order, and the images embedded in them."""

    key: str  # changes with the content; 40 hexadecimal digits

    def rows(self) -> Iterator[Any]:
        """Yield the rows: objects with `conversations` or `messages`, `image` or `images`, `id`, `question_type`."""

    def image_bytes(self, index: int) -> bytes:
        """Return the image that row `index` holds."""


def open_container(path: Path) -> Container:
    """Open a data file or folder.

    Args:
        path: JSON or JSON Lines; a .parquet or .arrow file; a folder that `datasets` saved, or one of .parquet or .arrow files.

    Raises:
        DataError: no such file, or no readable data.
    """
    if not path.exists():
        raise DataError(
            f"no data file {path}: --data takes LLaVA-style JSON or JSON Lines, a .parquet or .arrow file, or a folder that "
            "datasets saved"
        )
    return DatasetRows(path) if path.is_dir() or path.suffix in (".parquet", ".arrow") else JsonRows(path)


class JsonRows:
    """A JSON list of rows, or one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.key = self.sha256[:40]

    def rows(self) -> Iterator[Any]:
        """Yield the rows. Raises DataError: not UTF-8, not JSON, not a list, an empty one."""
        where = str(self.path)
        try:
            with self.path.open(encoding="utf-8-sig") as file:
                start = file.read(64).lstrip()[:1]
                file.seek(0)
                if start == "{":
                    for number, line in enumerate(file, 1):
                        where = f"{self.path}, line {number},"
                        if line.strip():
                            yield json.loads(line)
                    return
                rows = json.load(file)
        except UnicodeDecodeError as error:  # raised for a block of the file, so no line number is available
            raise DataError(f"{self.path} is not UTF-8 text: {error}") from error
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where} is not JSON: {error}; expected a list of rows or one JSON object a line"
            ) from error
        if not isinstance(rows, list) or not rows:
            raise DataError(f"{self.path} should hold a list with at least one row, found {type(rows).__name__}")
        yield from rows

    def image_bytes(self, index: int) -> bytes:
        """Never called: JSON rows contain no image bytes."""
        raise AssertionError(f"row {index} of {self.path} holds no image")


class DatasetRows:
    """A data set of `datasets`, memory-mapped. Parquet is turned into Arrow once, in the cache of `datasets`.

    Raises:
        DataError: not readable by datasets, splits instead of rows, or no row.
    """

    def __init__(self, path: Path) -> None:
        import datasets

        datasets.disable_progress_bars()
        self.path = path
        files = _data_files(path)
        try:
            rows = _open_dataset(path, files)
        except (datasets.exceptions.DatasetsError, ValueError, OSError, KeyError) as error:
            raise DataError(f"{path} cannot be read as a data set: {str(error).splitlines()[0]}") from error
        for name in IMAGE_COLUMNS:
            if name in rows.features:
                rows = rows.cast_column(name, _undecoded(rows.features[name]))
        if not len(rows):
            raise DataError(f"{path} holds no row")
        self._rows = rows
        self._images = rows.select_columns([name for name in IMAGE_COLUMNS if name in rows.features])
        stamps = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        self.key = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:40]

    def rows(self) -> Iterator[Any]:
        """Yield the rows; an image whose bytes the data set holds is `Embedded`."""
        for batch in self._rows.with_format("arrow").iter(batch_size=ROWS_PER_BATCH):
            images = {name: _cells(batch.column(name).combine_chunks()) for name in self._images.column_names}
            plain = batch.select([name for name in batch.column_names if name not in images]).to_pylist()
            for number, row in enumerate(plain):
                yield row | {name: cells[number] for name, cells in images.items()}

    def image_bytes(self, index: int) -> bytes:
        """Return the image that row `index` holds."""
        row = self._images[index]
        value = next(row[name] for name in IMAGE_COLUMNS if row.get(name))
        value = value[0] if isinstance(value, list) else value
        data: bytes = value["bytes"] if isinstance(value, dict) else value
        return data


def _data_files(path: Path) -> list[Path]:
    """Return the files of a data set in order. Raises DataError if there are none, or if the folder holds splits."""
    if path.is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if (child / "state.json").is_file())
        raise DataError(f"{path} holds the splits {', '.join(splits)}: pass one of them, as {path / splits[0]}")
    for ending in ("*.arrow", "*.parquet"):
        if found := sorted(path.glob(ending)):
            return found
    raise DataError(f"{path} is no data set: expected a folder that datasets saved, or one of .parquet or .arrow files")


def _open_dataset(path: Path, files: list[Path]) -> Any:
    import datasets

    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    if files[0].suffix == ".parquet":
        return datasets.Dataset.from_parquet([str(file) for file in files])
    return datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in files])


def _undecoded(feature: Any) -> Any:
    """Return the feature with images left as bytes and path."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(feature.feature))
    return feature


def _cells(column: Any) -> list[Any]:
    """Return an image column as plain data, bytes as `Embedded`; a row with a list of images as a list."""
    import pyarrow as pa
    import pyarrow.compute as arrow

    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        flat = iter(_cells(column.flatten()))
        counts = arrow.list_value_length(column).to_pylist()
        return [None if count is None else [next(flat) for _ in range(count)] for count in counts]
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        held = arrow.struct_field(column, "bytes").is_valid().to_pylist()
        paths = (
            arrow.struct_field(column, "path").to_pylist() if kind.get_field_index("path") >= 0 else [None] * len(held)
        )
        return [Embedded(path or "") if here else path for here, path in zip(held, paths, strict=True)]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return [Embedded("") if here else None for here in column.is_valid().to_pylist()]
    cells: list[Any] = column.to_pylist()
    return cells
