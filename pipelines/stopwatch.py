"""Wall time of the steps of long work, stored in a file, so that the time of earlier, interrupted runs is included."""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from switchkd.pipelines.run_folder import write_atomically


class Stopwatch:
    """Seconds by step, in the JSON file `path`, which several processes may write, each its own steps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = self._read()

    @contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        """Add the wall time of the `with` block to a step, also if the block raises."""
        start = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - start
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self.seconds = self._read()
                self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
                write_atomically(self.path, json.dumps(self.seconds))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from writing between our reading and writing, where the file system has locks."""
        with self.path.with_name(f".{self.path.name}.lock").open("w") as handle:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _read(self) -> dict[str, float]:
        return json.loads(self.path.read_text()) if self.path.is_file() else {}
