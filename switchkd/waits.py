"""Tells what a command is doing wherever nothing else is printed for more than two seconds, such as loading a large checkpoint.

with Waiting("hashing the weights of TEACHER") as wait:
    wait.share = 0.4  # done so far, if that is known
"""

import logging
import threading
import time
from types import TracebackType
from typing import Self

from switchkd.counting import counted

FIRST_SECONDS = 2.0  # a wait that ends earlier is not mentioned
NEXT_SECONDS = 15.0  # seconds between two lines about one wait
log = logging.getLogger(__name__)


class Waiting:
    """Logs what is being done if it takes more than `FIRST_SECONDS`, then every `NEXT_SECONDS`, and how long it took.

    A thread writes the lines, so the work need not report anything.

    Attributes:
        share: how much is done, 0 … 1, set by the work; the lines then say how much time is left. None: not known.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.share: float | None = None
        self._start = time.monotonic()
        self._over = threading.Event()
        self._told = False
        self._thread = threading.Thread(target=self._tell, name="waiting", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if self._told and kind is None:
            log.info("%s: done in %s", self.what, duration(time.monotonic() - self._start))

    def _tell(self) -> None:
        pause = FIRST_SECONDS
        while not self._over.wait(pause):
            pause, self._told = NEXT_SECONDS, True
            log.info("%s%s", self.what, self._progress())

    def _progress(self) -> str:
        elapsed = time.monotonic() - self._start
        if self.share:
            return f": {self.share:.0%}, {duration(elapsed * (1 - self.share) / self.share)} left"
        return " …" if elapsed < NEXT_SECONDS else f" … {duration(elapsed)} so far"


def duration(seconds: float) -> str:
    """Return a time in the most readable unit: "28 seconds", "12 minutes", "3.4 hours"."""
    if seconds < 120:
        return counted(round(seconds), "second")
    return counted(round(seconds / 60), "minute") if seconds < 7200 else f"{seconds / 3600:,.1f} hours"
