"""Finds the files of a data set, and identifies their content without reading all of it."""

import hashlib
import json
import re
from pathlib import Path

from switchkd.errors import DataError
from switchkd.printable import printable

ENDINGS = (".arrow", ".parquet")
BLOCKS = 16  # of every file that enter its identity, spread over it, the first and the last bytes among them
BLOCK_BYTES = 1 << 16

# Names that the libraries of Hugging Face give to the files of splits: train-00000-of-00002.parquet, test.parquet.
_SPLIT = re.compile(r"^(train|training|test|validation|valid|val|dev)(?:[-_.].*)?$", re.IGNORECASE)


def data_files(path: Path) -> list[Path]:
    """Return the files of a data set in order: the file, or those of a folder or of its folder `data`, as hubs lay it out.

    Raises:
        DataError: there are none, or they belong to several splits.
    """
    if path.is_file():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if (child / "state.json").is_file())
        example = f", as {printable(path / splits[0])}" if splits else ""
        raise DataError(f"{printable(path)} holds the splits {', '.join(splits) or 'none'}: pass one of them{example}")
    for folder in (path, path / "data"):
        for ending in ENDINGS:
            if found := _files_in(folder, ending):
                _require_one_split(folder, found)
                return found
    below = sorted({str(file.parent) for ending in ENDINGS for file in path.glob(f"*/*{ending}")})
    hint = f"; below it are {', '.join(map(printable, below[:3]))}: pass one of them" if below else ""
    raise DataError(
        f"{printable(path)} is no data set: expected a folder that datasets saved, or one of .parquet or .arrow files{hint}"
    )


def _files_in(folder: Path, ending: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.suffix.lower() == ending and file.is_file())


def _require_one_split(folder: Path, files: list[Path]) -> None:
    splits: dict[str, list[str]] = {}
    for file in files:
        if found := _SPLIT.match(file.stem):
            splits.setdefault(found[1].lower(), []).append(file.name)
    if len(splits) > 1:
        raise DataError(
            f"{printable(folder)} holds the splits {', '.join(sorted(splits))}: pass one file of it, as "
            f"{printable(folder / next(iter(splits.values()))[0])}, or a folder with the files of one split"
        )


def identity_of(files: list[Path]) -> str:
    """Return a key that differs for different content, 40 hexadecimal digits, in time that does not depend on the files' sizes.

    It covers of every file: name, size, device, inode, time of the last change of content (mtime) and of anything (ctime, which no
    program can set), and blocks from all over the file. A copy of a file has another key.
    """
    digest = hashlib.sha256()
    for file in files:
        about = file.stat()
        stamp = [file.name, about.st_size, about.st_dev, about.st_ino, about.st_mtime_ns, about.st_ctime_ns]
        digest.update(json.dumps(stamp).encode())
        last = max(0, about.st_size - BLOCK_BYTES)
        with file.open("rb") as opened:
            for number in range(BLOCKS):
                opened.seek(last * number // (BLOCKS - 1))
                digest.update(opened.read(BLOCK_BYTES))
    return digest.hexdigest()[:40]
