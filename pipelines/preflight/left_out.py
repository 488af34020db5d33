"""Samples that a run without a teacher store leaves out of its steps, since they turned out to be unusable when they were read."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from switchkd.data.samples import Status
from switchkd.pipelines.preflight.skip_limit import SkipLimit


class Unusable(NamedTuple):
    """What is read in place of a sample that cannot be used."""

    row: int  # of the data file
    status: int  # a `Status`
    detail: str


class LeftOut:
    """The rows that were left out so far, each counted once, however many epochs meet it.

    Every process meets its own; `merge` brings those of the others. A checkpoint holds what is known, in a file for each process.

    Args:
        limit: stops the run at the first row too many.
    """

    def __init__(self, limit: SkipLimit) -> None:
        self.limit = limit
        self.rows: dict[int, Unusable] = {}
        self._met: list[Unusable] = []  # by this process, since the last `merge`

    def meet(self, found: Iterable[Unusable]) -> None:
        """Note rows that this process met."""
        self._met += [Unusable(*one) for one in found if one[0] not in self.rows]

    def take(self) -> list[Unusable]:
        """Return what this process met since the last call."""
        met, self._met = self._met, []
        return met

    def merge(self, found: Iterable[Unusable]) -> None:
        """Count rows that processes met, in every process the same ones. Raises DataError if the limit does not allow as many."""
        for one in sorted(found):
            if one.row not in self.rows:
                self.rows[one.row] = one
                self.limit.add({Status(one.status).label: 1}, seen=one.detail)

    def counts(self) -> Counter[str]:
        """Return how many rows were left out, by reason."""
        return Counter(Status(one.status).label for one in self.rows.values())

    def save(self, folder: Path, process: int) -> None:
        """Write what this process knows into a checkpoint that is being written."""
        known = [*self.rows.values(), *self._met]
        if known:
            (folder / f"left_out_{process}.json").write_text(json.dumps(known))

    def load(self, folder: Path) -> None:
        """Read what all processes knew at a checkpoint. Raises DataError if the limit does not allow as many."""
        files = sorted(folder.glob("left_out_*.json"))
        self.merge(Unusable(*one) for file in files for one in json.loads(file.read_text()))
