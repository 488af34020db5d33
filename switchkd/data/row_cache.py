"""Rows of a data file as Arrow, in the cache of `datasets`: made once, memory-mapped by every process, made again if damaged."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from switchkd.errors import DataError, RunError
from switchkd.printable import printable

TELL_SECONDS = 10.0
log = logging.getLogger(__name__)


def cache_folder(name: str) -> Path:
    """Return a folder below the cache of `datasets` (HF_DATASETS_CACHE); it need not exist."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "switchkd" / name


def from_cache(folder: Path, make: Callable[[], Any]) -> Any:
    """Return a data set of `datasets` that `make` opens in a cache folder, or makes there; a damaged one is removed and made again.

    Raises:
        RunError: it is damaged again. What `make` raises where the cache is not the reason.
    """
    try:
        found = make()
        if _is_whole(found):
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # what cut Arrow and JSON files lead to
        if isinstance(error, DataError) or not any(folder.rglob("*.arrow")):
            raise
    shutil.rmtree(folder, ignore_errors=True)
    found = make()
    if not _is_whole(found):
        raise RunError(
            f"the cache of rows, {printable(folder)}, does not hold what was written; set HF_DATASETS_CACHE to another folder"
        )
    return found


def cached_table(generate: Callable[[], Iterator[dict[str, Any]]], features: Any, key: str) -> Any:
    """Return the rows that `generate` yields as a data set of `datasets`, from the cache if it holds them whole.

    Args:
        generate: called at most twice. key: identifies the rows. Equal keys must mean equal rows.

    Raises:
        DataError: raised by `generate`.
        RunError: the cache cannot be written, or memory ran out.
    """
    import datasets

    folder = cache_folder(key)
    datasets.disable_progress_bars()
    told = partial(_telling, generate)
    make = partial(datasets.Dataset.from_generator, told, features=features, fingerprint=key, cache_dir=str(folder))
    try:
        return from_cache(folder, make)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        if isinstance(cause, DataError | RunError):
            raise cause from None
        if isinstance(cause, MemoryError):
            raise RunError("out of memory while rows were read") from error
        raise RunError(_cannot_use(folder, cause)) from error
    except (OSError, ValueError) as error:
        raise RunError(_cannot_use(folder, error)) from error


def _telling(generate: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield rows, and log how many they are every `TELL_SECONDS`: those of a large file take a minute, once."""
    last = time.monotonic()
    for number, row in enumerate(generate()):
        if time.monotonic() - last > TELL_SECONDS:
            last = time.monotonic()
            log.info("reading the rows of the data file, which are kept for later runs: %s so far", f"{number:,}")
        yield row


def _cannot_use(folder: Path, error: BaseException) -> str:
    return (
        f"the cache of rows, {printable(folder)}, cannot be read or written: {printable(error)}. Make room or mend its "
        "permissions, or set HF_DATASETS_CACHE to another folder"
    )


def _is_whole(rows: Any) -> bool:
    """Whether a data set has all its rows, and every one can be read: an Arrow file that was cut may still open."""
    split = (rows.info.splits or {}).get("train")
    if split is None or len(rows) != split.num_examples:
        return False
    sizes = [Path(file["filename"]).stat().st_size for file in rows.cache_files]
    return bool(sum(sizes) >= split.num_bytes)
