"""Reads rows from a JSON list, or from JSON Lines."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from switchkd.errors import DataError, RunError
from switchkd.printable import printable

# First bytes of a packed file → what unpacks it.
_PACKED = {
    b"\x1f\x8b": "gunzip -k",
    b"BZh": "bunzip2 -k",
    b"\xfd7zXZ": "unxz -k",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"PK\x03\x04": "unzip",
}
_OTHER = {
    b"PAR1": "a parquet file: its name must end in .parquet",
    b"ARROW1": "an Arrow file: its name must end in .arrow",
}


class JsonRows:
    """A JSON list of rows, or one JSON object a line.

    Raises:
        DataError: a packed file, or one of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._refuse_other_formats(file.read(8))
            file.seek(0)
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.key = self.sha256[:40]

    def rows(self) -> Iterator[Any]:
        """Yield the rows.

        Raises:
            DataError: not UTF-8, not JSON, not a list, an empty one, nested too deep, a number that is too long.
            RunError: out of memory.
        """
        where = printable(self.path)
        try:
            with self.path.open(encoding="utf-8-sig") as file:
                start = file.read(64).lstrip()[:1]
                file.seek(0)
                if start == "{":
                    for number, line in enumerate(file, 1):
                        where = f"{printable(self.path)}, line {number},"
                        if line.strip():
                            yield json.loads(line)
                    return
                rows = json.load(file)
        except UnicodeDecodeError as error:  # raised for a block of the file, so no line number is available
            raise DataError(f"{printable(self.path)} is not UTF-8 text: {error}") from error
        except json.JSONDecodeError as error:
            hint = ""
            if where.endswith("line 1,"):
                hint = "; the file begins with an object: one that spans several lines is not read, only a list of rows"
            raise DataError(
                f"{where} is not JSON: {printable(error, 300)}; expected a list of rows or one JSON object a line{hint}"
            ) from error
        except ValueError as error:  # a number of more digits than Python converts
            raise DataError(f"{where} holds a number that cannot be read: {printable(error, 300)}") from error
        except RecursionError as error:
            raise DataError(f"{where} is nested too deep: rows hold conversations, a list of turns") from error
        except MemoryError as error:
            raise RunError(f"{where}: out of memory; JSON Lines are read line by line, a list as a whole") from error
        if not isinstance(rows, list) or not rows:
            raise DataError(f"{where} should hold a list with at least one row, found {type(rows).__name__}")
        yield from rows

    def image_bytes(self, index: int, number: int = 0) -> bytes:
        """Never called: JSON rows contain no image bytes."""
        raise AssertionError(f"row {index} of {self.path} holds no image")

    def advice(self) -> str:
        """Return what to do if no row can be used: for an object that holds the list of rows under a key."""
        with self.path.open(encoding="utf-8-sig") as file:
            for line in file:
                if line.strip():
                    break
        if not line.lstrip().startswith("{"):
            return ""
        found = json.loads(line)
        keys = [key for key, value in found.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
        keys = [key for key in keys if key not in ("conversations", "messages")]
        if len(keys) != 1:
            return ""
        return f". The rows may be the list under its key {printable(keys[0], 60)!r}: write that list alone into a file"

    def _refuse_other_formats(self, start: bytes) -> None:
        for mark, unpack in _PACKED.items():
            if start.startswith(mark):
                raise DataError(
                    f"{printable(self.path)} is packed: unpack it with `{unpack} {printable(self.path)}` first"
                )
        for mark, what in _OTHER.items():
            if start.startswith(mark):
                raise DataError(f"{printable(self.path)} is {what}")
