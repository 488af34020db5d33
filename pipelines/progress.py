"""A progress bar with rate and ETA for long work; plain lines where the output is not a terminal."""

import sys
import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from switchkd.counting import counted
from switchkd.waits import duration

FIRST_SECONDS = 2.0  # until the first line of a log file, also where nothing is done by then
SLOW = 0.1  # per second: slower rates are given as the time that one takes
PLAIN_SECONDS = 10.0  # seconds between two lines of a log file


class Progress:
    """Progress over `total` things named `unit`, of which `done` were done before.

    `advance(n, positions=p)` also counts positions for the rate; a `note` prints a line at once. `bar=False` prints lines on a
    terminal too, for work whose steps have their own bars. Lines without a note are at least `every` seconds apart.
    """

    def __init__(
        self, title: str, total: int, unit: str, done: int = 0, bar: bool = True, every: float = PLAIN_SECONDS
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._before = done
        self.positions = self.written_bytes = self.ahead = 0
        self._start = self._last_line = time.monotonic()
        self._every = every
        self._first: threading.Timer | None = None
        console = Console(file=sys.stderr)
        self._bar = None
        if bar and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
            )
            self._bar = RichProgress(*columns, TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task(title, total=total, rate="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        elif self.total:
            self._first = threading.Timer(FIRST_SECONDS, self._line)
            self._first.daemon = True
            self._first.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first is not None:
            self._first.cancel()
            self._first.join()
        if self._bar is not None:
            self._bar.stop()
        elif self.done and kind is None:
            self._line()

    def advance(self, count: int, positions: int = 0, note: str = "") -> None:
        """Count `count` more things, and their positions; `written_bytes`, and `ahead`, requests begun, may be set at any time."""
        self.done += count
        self.positions += positions
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=self._rate())
        if note or (self._bar is None and time.monotonic() - self._last_line > self._every):
            self._line(note)

    def _rate(self) -> str:
        seconds, done = max(time.monotonic() - self._start, 1e-9), self.done - self._before
        slow = done and done / seconds < SLOW
        rate = f"{duration(seconds / done)} each" if slow else f"{done / seconds:,.1f} {self.unit}/s"
        rate += f", {self.positions / seconds:,.0f} positions/s" if self.positions else ""
        rate += f", {counted(self.ahead, 'request')} ahead" if self.ahead else ""
        return rate + (f", {self.written_bytes / 1e9:,.3f} GB written" if self.written_bytes else "")

    def _line(self, note: str = "") -> None:
        self._last_line = time.monotonic()
        elapsed, done = self._last_line - self._start, self.done - self._before
        counts = f"{self.title}: {self.done:,}/{self.total:,} {self.unit}"
        if done:
            counts += f", {self._rate()}, {duration(elapsed / done * (self.total - self.done))} left"
        print(counts + (f", {note}" if note else ""), file=sys.stderr)
