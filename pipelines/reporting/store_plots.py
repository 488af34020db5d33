"""`switchkd store plot`: plots of a store: knees, tail mass and bytes per part."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.errors import ConfigError
from switchkd.pipelines.drawing import color, matplotlib_ready, whole_numbers
from switchkd.pipelines.reporting.figures import bin_edges
from switchkd.settings import StoreLocation
from switchkd.stores import TeacherStore
from switchkd.stores.layout import STAT_COLUMNS
from switchkd.stores.storage.paths import part_key

BINS = 60
LEAST_MASS = 1e-8  # smaller tails are set to this


@dataclass(frozen=True)
class StoreStatistics:
    """The data in the plots of a store."""

    knees: NDArray[Any]  # [P], of the teacher
    tail_masses: NDArray[Any]  # [P], log10 of the probability outside the top k
    parts: list[int]
    part_mb: list[float]  # size of each part, 10^6 bytes


def store_statistics(store: TeacherStore) -> StoreStatistics:
    """Collect them from the existing parts. Raises StoreError: a damaged part."""
    parts = store.parts()
    stats = np.concatenate([store.part_stats(part) for part in parts] or [np.empty((0, len(STAT_COLUMNS)), np.float32)])
    columns = dict(zip(STAT_COLUMNS, stats.T, strict=True))
    mass = np.exp(columns["tail_logsumexp"] - columns["logsumexp"])
    return StoreStatistics(
        columns["knee"],
        np.log10(np.maximum(mass, LEAST_MASS)),
        parts,
        [sum(store.storage.file_sizes(part_key(part)).values()) / 1e6 for part in parts],
    )


def plot_store(path: StoreLocation, out: Path) -> Path:
    """Draw the knees, the tail's share of the probability (where the store cuts one off) and the bytes per part; returns `out`.

    Raises:
        ConfigError: matplotlib is missing, or `out` cannot be a file. StoreError: no store, or a damaged one.
    """
    if not out.parent.is_dir():
        raise ConfigError(
            f"--out {out}: there is no folder {out.parent}; make it, or name a file in a folder that exists"
        )
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file in it, as --out {out / 'store.png'}")
    with matplotlib_ready("store plot") as pyplot:
        store = TeacherStore.open(path)
        found = store_statistics(store)
        has_tail = store.manifest.has_topk and store.manifest.top_k < store.manifest.vocab_rows
        figure, panels = pyplot.subplots(1, 2 + has_tail, figsize=(4.3 * (2 + has_tail), 3.8))
        knees, sizes = panels[0], panels[-1]
        knees.hist(found.knees, bins=bin_edges(found.knees, BINS) if len(found.knees) else 1, color=color(0))
        knees.set(title="Knee of the teacher", xlabel="k", ylabel="positions")
        whole_numbers(knees.xaxis)
        whole_numbers(knees.yaxis)
        if has_tail:
            title = f"Probability outside the top {store.manifest.top_k}"
            panels[1].hist(found.tail_masses, bins=BINS, color=color(1))
            panels[1].set(title=title, xlabel="log10 of the mass", ylabel="positions")
        sizes.bar(found.parts, found.part_mb, color=color(2))
        sizes.set(title="Size of the parts", xlabel="part", ylabel="MB")
        whole_numbers(sizes.xaxis)
        figure.savefig(out, dpi=150)
        pyplot.close(figure)
    return out
