"""Inspection of every sample before capture or training, once: what was found is kept, see `kept.py`."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from switchkd.data.samples import SampleFile, Status
from switchkd.pipelines.preflight.inspector import UNKNOWN, Finding, SampleInspector
from switchkd.pipelines.preflight.kept import KeptFindings, Stamped
from switchkd.pipelines.preflight.processes import in_order
from switchkd.pipelines.preflight.skip_limit import SkipLimit
from switchkd.pipelines.progress import Progress

__all__ = ["Finding", "SampleInspector", "Survey", "probe", "survey"]

ROWS_PER_TASK = 64  # rows that a worker process takes at a time


@dataclass(frozen=True)
class Survey:
    """The result of inspecting all n samples."""

    status: NDArray[np.uint8]  # [n]
    tokens: NDArray[np.int64]  # [n]
    positions: NDArray[np.int64]  # [n]
    details: dict[int, str] = field(default_factory=dict)  # row → why it cannot be used
    notes: dict[str, list[int]] = field(default_factory=dict)  # note → rows
    conversions: dict[str, list[int]] = field(default_factory=dict)  # kind of conversion to RGB → rows

    def skipped(self) -> Counter[str]:
        """Return how many samples cannot be used, by reason."""
        return Counter(Status(int(code)).label for code in self.status[self.status != Status.OK])


@dataclass(frozen=True)
class _Task:
    """Rows of a block that a process inspects together."""

    block: int
    rows: list[int]
    ends_block: bool


class _Inspection:
    """Inspects a task's rows in any process."""

    def __init__(self, kept: KeptFindings) -> None:
        self.kept = kept

    def __call__(self, task: _Task) -> tuple[_Task, dict[int, Stamped]]:
        """Return the task, and its findings by row."""
        found = {}
        for row in task.rows:
            sample = self.kept.samples[row]
            stamp = self.kept.stamp(
                sample
            )  # before the image is read: one that changes meanwhile has another stamp then
            found[row] = Stamped(self.kept.inspector.inspect(sample), stamp)
        return task, found


def survey(samples: SampleFile, inspector: SampleInspector, workers: int = 0, limit: SkipLimit | None = None) -> Survey:
    """Inspect every sample of a data file that was not inspected before, in `workers` processes (0: in this one).

    Args:
        limit: counts the samples that cannot be used, and stops the survey at the first one too many; None inspects all.

    Raises:
        DataError: the data file has images and no folder was given to an encoder, or more samples are skipped than `limit` allows.
        ReadFailure: an image could not be read now, or memory ran out; names the row.
        RunError: a process died.
    """
    status = np.zeros(len(samples), np.uint8)
    tokens = np.full(len(samples), UNKNOWN, np.int64)
    positions = np.full(len(samples), UNKNOWN, np.int64)
    details: dict[int, str] = {}
    notes: dict[str, list[int]] = {}
    conversions: dict[str, list[int]] = {}
    kept = KeptFindings(samples, inspector)
    with Progress("checking samples", len(samples), "samples") as progress:
        every = _inspected(kept, range(kept.blocks), workers, progress, limit)
        for row, found in every:
            status[row], tokens[row], positions[row] = found.status, found.tokens, found.positions
            if found.status is not Status.OK:
                details[row] = found.detail
            for note in found.notes:
                notes.setdefault(note, []).append(row)
            for kind in found.conversions:
                conversions.setdefault(kind, []).append(row)
    details = dict(sorted(details.items()))
    for rows in (*notes.values(), *conversions.values()):
        rows.sort()
    return Survey(status, tokens, positions, details, notes, conversions)


def probe(samples: SampleFile, inspector: SampleInspector, workers: int = 0) -> dict[int, Finding]:
    """Inspect some thousand samples from all over a data file, of which a survey then knows.

    Raises:
        DataError, ReadFailure, RunError: see `survey`.
    """
    kept = KeptFindings(samples, inspector)
    with Progress("checking a part of the samples", len(kept.rows(0)), "samples") as progress:
        return dict(_inspected(kept, range(1), workers, progress, None))


def _inspected(
    kept: KeptFindings, blocks: Iterable[int], workers: int, progress: Progress, limit: SkipLimit | None
) -> Iterator[tuple[int, Finding]]:
    """Yield (row, finding) for the rows of blocks: what is kept, and what is inspected now and kept for the next time."""
    known: dict[int, dict[int, Stamped]] = {}

    def tasks() -> Iterator[_Task]:
        for block in blocks:
            known[block] = kept.read(block)
            rows = [row for row in kept.rows(block) if row not in known[block]]
            starts = range(0, len(rows), ROWS_PER_TASK)
            yield from (_Task(block, rows[start : start + ROWS_PER_TASK], False) for start in starts)
            yield _Task(block, [], True)

    new: dict[int, Stamped] = {}
    for task, results in in_order(_Inspection(kept), tasks(), workers):
        counted = known[task.block] if task.ends_block else results
        new |= results
        for stamped in counted.values():
            if limit is not None and stamped.finding.status is not Status.OK:
                limit.add({stamped.finding.status.label: 1}, seen=stamped.finding.detail)
        progress.advance(len(counted))
        if task.ends_block:
            found = known.pop(task.block) | new
            if new:
                kept.write(task.block, found)
            yield from ((row, stamped.finding) for row, stamped in found.items())
            new = {}
