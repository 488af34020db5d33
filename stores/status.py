"""Computes the progress of a store (parts, writers, rate, remaining time) from the store alone, also while it is being written."""

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from statistics import median

from switchkd.errors import StoreError
from switchkd.settings import StoreLocation
from switchkd.stores.manifest import Manifest
from switchkd.stores.part import read_record
from switchkd.stores.reader import TeacherStore
from switchkd.stores.record import commit_of
from switchkd.stores.storage import paths
from switchkd.stores.storage.paths import MARKER

PAUSE = 10.0  # a gap of this many times the median time between commits ends a stretch of work
SHORTEST_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class WriterStatus:
    """The commits of one writer."""

    name: str  # HOST-PROCESS
    parts: int
    samples: int
    last: datetime  # its latest commit


@dataclass(frozen=True)
class StoreStatus:
    """Progress of a store; times are by the writers' clocks."""

    path: StoreLocation
    manifest: Manifest
    done: list[int]
    missing: list[int]
    samples: int  # in the committed parts, skipped ones included
    positions: int
    writers: list[WriterStatus]  # by name
    samples_per_second: (
        float | None
    )  # of all writers together, in the latest stretch of work; None before the second commit
    stretch_parts: int  # commits from which the rate is computed
    last: datetime | None

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the store is complete at the rate of the latest stretch."""
        left = self.manifest.samples - self.samples
        return left / self.samples_per_second if self.samples_per_second else None


def status(path: StoreLocation) -> StoreStatus:
    """Read every part's own record, one small file per part.

    Raises:
        StoreError: no store at `path`, or a damaged part.
        StoreUnreadable: a file could not be read now. RunError: an object store cannot be reached.
    """
    store = TeacherStore.open(path)
    done = store.parts()
    there = set(done)
    commits = sorted(store.storage.map(lambda part: _commit(store, part), done), key=lambda commit: commit.at)
    by_writer: dict[str, list[_Commit]] = defaultdict(list)
    for commit in commits:
        by_writer[commit.by].append(commit)
    stretch = _latest_stretch(commits)
    seconds = (stretch[-1].at - stretch[0].at).total_seconds() if stretch else 0.0
    # The first commit of the stretch only marks its start; the samples of that part were computed before.
    rate = sum(commit.samples for commit in stretch[1:]) / seconds if seconds else None
    return StoreStatus(
        path=store.path,
        manifest=store.manifest,
        done=done,
        missing=[part for part in range(store.manifest.part_count) if part not in there],
        samples=sum(commit.samples for commit in commits),
        positions=sum(commit.positions for commit in commits),
        writers=[
            WriterStatus(name, len(own), sum(commit.samples for commit in own), own[-1].at)
            for name, own in sorted(by_writer.items())
        ],
        samples_per_second=rate,
        stretch_parts=len(stretch),
        last=commits[-1].at if commits else None,
    )


@dataclass(frozen=True)
class _Commit:
    by: str
    at: datetime
    samples: int
    positions: int


def _commit(store: TeacherStore, part: int) -> _Commit:
    record = read_record(store.storage, store.manifest, part)
    try:
        by, at = commit_of(record)
    except ValueError as error:
        where = store.storage.uri_of(f"{paths.part_key(part)}/{MARKER}")
        raise StoreError(f"{where} does not say who wrote the part ({error}): run `switchkd store verify`") from error
    return _Commit(by, at, record["samples"], record["positions"])


def _latest_stretch(commits: list[_Commit]) -> list[_Commit]:
    """Return the latest commits, back to the last long pause, so that time between two runs does not lower the rate."""
    gaps = [(after.at - before.at).total_seconds() for before, after in pairwise(commits)]
    if not gaps:
        return commits
    pause = max(PAUSE * median(gaps), SHORTEST_PAUSE_SECONDS)
    first = next((index + 1 for index in range(len(gaps) - 1, -1, -1) if gaps[index] > pause), 0)
    return commits[first:]
