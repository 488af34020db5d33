"""Reads rows from data files: LLaVA-style JSON, or a data set of Hugging Face `datasets`, whose rows may contain images.

A container yields rows as plain data, in order; `samples.read_row` converts them to samples, independent of the kind of container.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from switchkd.data.dataset_files import ENDINGS, data_files, identity_of
from switchkd.data.json_rows import JsonRows
from switchkd.data.row_cache import cache_folder, from_cache
from switchkd.errors import DataError, ReadFailure
from switchkd.printable import printable
from switchkd.settings import is_mixture

ROWS_PER_BATCH = 1000
DOCUMENTED_COLUMNS = ("image", "images")
# Other names in use are read as well, where a row has none of the above.
IMAGE_COLUMNS = (*DOCUMENTED_COLUMNS, "img", "imgs", "image_path", "image_paths", "img_path", "image_file", "image_url")


@dataclass(frozen=True)
class Embedded:
    """Placeholder for an image whose bytes the container holds; they are not read with the row."""

    name: str  # the file's name if the container stores it, else ""


class Container(Protocol):
    """Rows in order, and the images embedded in them."""

    key: str  # changes with the content; 40 hexadecimal digits

    def rows(self) -> Iterator[Any]:
        """Yield the rows: objects with `conversations` or `messages`, `image` or `images`, `id`, `question_type`."""

    def image_bytes(self, index: int, number: int = 0) -> bytes:
        """Return an image that row `index` holds, the first by default."""

    def advice(self) -> str:
        """Return what to do if no row can be used, to end a message; "" if nothing is known."""


def open_container(path: Path) -> Container:
    """Open a data file or folder.

    Args:
        path: JSON or JSON Lines; a .parquet or .arrow file; a folder that `datasets` saved, or one of .parquet or .arrow files.

    Raises:
        DataError: no such file, or no readable data.
    """
    if not path.exists():
        raise DataError(
            f"no data file {printable(path)}: --data takes LLaVA-style JSON or JSON Lines, a .parquet or .arrow file, or a "
            "folder that datasets saved"
        )
    if is_mixture(path):
        raise DataError(
            f"{printable(path)} is a mixture of data files, and one data file is needed here: train, cache-teacher and data "
            "take mixtures"
        )
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"{printable(path)} is neither a file nor a folder: --data takes a file that can be read again")
    return DatasetRows(path) if path.is_dir() or path.suffix.lower() in ENDINGS else JsonRows(path)


class DatasetRows:
    """A data set of `datasets`, memory-mapped. Parquet is turned into Arrow once, in the cache of `datasets`.

    Raises:
        DataError: not readable by datasets, splits instead of rows, or no row.
    """

    def __init__(self, path: Path) -> None:
        import datasets

        datasets.disable_progress_bars()
        self.path = path
        files = data_files(path)
        self.key = identity_of(files)
        try:
            rows = _open_dataset(path, files, self.key)
        except (datasets.exceptions.DatasetsError, ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            cause = error.__cause__ or error  # `datasets` wraps what happens while it converts a file
            if isinstance(cause, MemoryError) or (
                isinstance(cause, OSError) and cause.errno not in (None, errno.ENOENT)
            ):
                raise ReadFailure(
                    f"{printable(path)} could not be read or converted: {cause!r}. Mend disk, network or permissions, or set "
                    "HF_DATASETS_CACHE to another folder, and run the same command again"
                ) from error
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"{printable(path)} cannot be read as a data set: {printable(first_line, 300)}") from error
        for name in IMAGE_COLUMNS:
            if name in rows.features:
                rows = rows.cast_column(name, _undecoded(rows.features[name]))
        if not len(rows):
            raise DataError(f"{path} holds no row")
        self._rows = rows
        self._images = rows.select_columns([name for name in IMAGE_COLUMNS if name in rows.features])

    def rows(self) -> Iterator[Any]:
        """Yield the rows; an image whose bytes the data set holds is `Embedded`."""
        for batch in self._rows.with_format("arrow").iter(batch_size=ROWS_PER_BATCH):
            images = {name: _cells(batch.column(name).combine_chunks()) for name in self._images.column_names}
            plain = batch.select([name for name in batch.column_names if name not in images]).to_pylist()
            for number, row in enumerate(plain):
                yield row | {name: cells[number] for name, cells in images.items()}

    def image_bytes(self, index: int, number: int = 0) -> bytes:
        """Return an image that row `index` holds, the first by default."""
        row = self._images[index]
        value = next(row[name] for name in IMAGE_COLUMNS if row.get(name))
        if isinstance(value, list):
            value = [item for item in value if item is not None][number]
        data: bytes = value["bytes"] if isinstance(value, dict) else value
        return data

    def advice(self) -> str:
        """Return nothing."""
        return ""


def _open_dataset(path: Path, files: list[Path], key: str) -> Any:
    import datasets

    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    if files[0].suffix.lower() == ".parquet":
        # `datasets` itself identifies a file by path and time, and would give the rows of another one with both in common.
        cache = cache_folder(f"parquet-{key}")
        names = [str(file) for file in files]
        return from_cache(cache, lambda: datasets.Dataset.from_parquet(names, cache_dir=str(cache)))
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
