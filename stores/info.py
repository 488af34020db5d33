"""Gathers the facts that `switchkd store info` reports, from the store alone."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from switchkd.settings import StoreLocation
from switchkd.stores.layout import STAT_COLUMNS
from switchkd.stores.manifest import Manifest
from switchkd.stores.reader import TeacherStore
from switchkd.stores.storage.paths import MARKER, PARTS

QUANTILES = {"min": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "max": 1.0}


@dataclass(frozen=True)
class StoreInfo:
    """Facts about a store, complete or not."""

    path: StoreLocation
    manifest: Manifest
    parts: int
    samples: int  # usable ones in the committed parts
    positions: int
    skipped: dict[str, int]  # by reason
    store_bytes: int  # all files
    bytes_per_position: float  # chunks of the parts' arrays, without metadata files
    knee_quantiles: dict[str, float]

    @property
    def complete(self) -> bool:
        """Whether every part is committed."""
        return self.parts == self.manifest.part_count


def describe(path: StoreLocation) -> StoreInfo:
    """Gather the facts. Raises StoreError: no store at `path`, or a damaged part."""
    store = TeacherStore.open(path)
    parts = store.parts()
    statuses = Counter(code for part in parts for code in store.part_statuses(part).tolist())
    names = store.manifest.statuses
    positions = sum(store.part_positions(part) for part in parts)
    knees = [store.part_stats(part)[:, STAT_COLUMNS.index("knee")] for part in parts]
    knee = np.concatenate(knees) if knees else np.empty(0)
    sizes = store.storage.file_sizes()
    chunk_bytes = sum(
        size for name, size in sizes.items() if name.startswith(f"{PARTS}/") and name.rpartition("/")[2] != MARKER
    )
    return StoreInfo(
        path=store.path,
        manifest=store.manifest,
        parts=len(parts),
        samples=statuses.pop(0, 0),
        positions=positions,
        skipped={names[str(code)]: count for code, count in statuses.items()},
        store_bytes=sum(sizes.values()),
        bytes_per_position=chunk_bytes / positions if positions else 0.0,
        knee_quantiles={name: float(np.quantile(knee, q)) for name, q in QUANTILES.items()} if len(knee) else {},
    )
