"""Checks that what options name exists, before anything heavy is imported: a mistyped path is told at once."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from switchkd.errors import CheckpointError, ConfigError, DataError, StoreError
from switchkd.pipelines.mixture import mixture_at
from switchkd.pipelines.options import Named, fields_of, shown
from switchkd.printable import printable


def require_given(kind: type, values: Mapping[str, Any]) -> None:
    """Check that the paths among the values of options exist, as far as their fields say that they must.

    Args:
        kind: an options class, whose fields say what they name. values: by name of the field; others are ignored.

    Raises:
        CheckpointError, DataError, StoreError: nothing is there, or something else.
    """
    for name, field in fields_of(kind).items():
        named, value = shown(field).names, values.get(name)
        if named is None or value is None:
            continue
        for path in value if isinstance(value, tuple) else (value,):
            if "://" not in str(path):
                _CHECKS[named](Path(path))


def _checkpoint(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise CheckpointError(f"no checkpoint at {printable(path)}: expected a folder with a config.json")


def _model_folder(path: Path) -> None:
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {printable(path)}: expected a folder")


def _data(path: Path) -> None:
    if not path.exists():
        raise DataError(
            f"no data file {printable(path)}: --data takes LLaVA-style JSON or JSON Lines, a .parquet or .arrow file, or a "
            "folder of a data set"
        )
    if (mixture := mixture_at(path)) is not None:
        for entry in mixture.entries:
            with mixture.naming(entry):
                _data(entry.data)
                if entry.images is not None:
                    _images(entry.images)
                if entry.teacher is not None:
                    _checkpoint(entry.teacher)


def _images(path: Path) -> None:
    if not path.is_dir():
        raise DataError(
            f"no image folder {printable(path)}: --images takes the folder that the data file's paths start from"
        )


def _image(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"no image {printable(path)}")


def _folder(path: Path) -> None:
    if not path.is_dir():
        raise ConfigError(f"no folder {printable(path)}")


def _store(path: Path) -> None:
    if not path.exists():
        place = printable(path)
        raise StoreError(f"no teacher store at {place}; `switchkd cache-teacher --out {place}/NAME.zarr` makes one")


_CHECKS: dict[Named, Callable[[Path], None]] = {
    "checkpoint": _checkpoint,
    "model folder": _model_folder,
    "data": _data,
    "images": _images,
    "image": _image,
    "folder": _folder,
    "store": _store,
}
