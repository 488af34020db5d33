"""`switchkd store plot`: a store in three pictures."""

from pathlib import Path

import numpy as np

from switchkd.errors import ConfigError
from switchkd.stores import TeacherStore
from switchkd.stores.layout import STAT_COLUMNS, part_key
from switchkd.stores.place import Location


def plot_store(path: Location, out: Path) -> Path:
    """Draw the knees, the tail's share of the probability and the bytes per part; returns `out`.

    Raises:
        ConfigError: matplotlib is missing. StoreError: no store, or a damaged one.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("store plot draws with matplotlib: pip install 'switchkd[viz]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    store = TeacherStore.open(path)
    parts = store.parts()
    stats = np.concatenate([store.part_stats(part) for part in parts] or [np.empty((0, len(STAT_COLUMNS)), np.float32)])
    columns = dict(zip(STAT_COLUMNS, stats.T, strict=True))
    figure, (knees, tails, sizes) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    knees.hist(columns["knee"], bins=60, color="#4477aa")
    knees.set(title="Knee of the teacher", xlabel="k", ylabel="positions")
    mass = np.exp(columns["tail_logsumexp"] - columns["logsumexp"])
    tails.hist(np.log10(np.maximum(mass, 1e-8)), bins=60, color="#cc6677")
    tails.set(
        title=f"Probability outside the top {store.manifest.top_k}", xlabel="log10 of the mass", ylabel="positions"
    )
    part_mb = [sum(store.place.sizes(part_key(part)).values()) / 1e6 for part in parts]
    sizes.bar(parts, part_mb, color="#117733")
    sizes.set(title="Size of the parts", xlabel="part", ylabel="MB")
    for axes in (knees, tails, sizes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)
    return out
