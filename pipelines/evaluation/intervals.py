"""95 % intervals of scores and of their differences: Wilson for a share of right units, else a percentile bootstrap over units.

The bootstrap draws units with replacement within each stratum. Units with equal values are interchangeable, so a resample is one
multinomial draw over the distinct values: the same distribution as drawing unit by unit, at a cost that does not grow with
their number.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
SEED = 0
Z = 1.959963984540054  # the normal distribution's 97.5 % point

ALL = "all"  # the stratum of units where there are no strata


class Unit(NamedTuple):
    """One scored unit, such as a question; each score defines the meaning of `values`."""

    id: str
    values: tuple[float, ...]
    stratum: str = ALL
    group: str = ""


# Stratum → mean of the units' values, [values] or [resamples, values]; a score is a function of these means.
Means = Mapping[str, NDArray[np.float64]]
Headline = Callable[[Means], NDArray[np.float64]]
Values = Mapping[str, NDArray[np.float64]]  # stratum → [units, values]


class Difference(NamedTuple):
    """One run's score minus another's, over the units that both have scored."""

    difference: float
    interval: tuple[float, float]
    units: int


def means_of(values: Values) -> Means:
    """Return the mean of each stratum's values."""
    return {stratum: rows.mean(axis=0) for stratum, rows in values.items()}


def by_stratum(units: Sequence[Unit]) -> dict[str, NDArray[np.float64]]:
    """Return the units' values as arrays [units, values] by stratum."""
    rows: dict[str, list[tuple[float, ...]]] = {}
    for unit in units:
        rows.setdefault(unit.stratum, []).append(unit.values)
    return {stratum: np.array(found, np.float64) for stratum, found in rows.items()}


def wilson(right: float, count: int) -> tuple[float, float]:
    """Return the Wilson score interval (percent) of a share `right / count` (Wilson 1927)."""
    share, spread = right / count, Z * Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / count + spread / count / 4) / (1 + spread)
    return 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0)


def bootstrap(units: Sequence[Unit], headline: Headline, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the interval of `headline` over resampled units."""
    return _middle(headline(_resampled(by_stratum(units), resamples)))


def paired_difference(
    ours: Sequence[Unit], theirs: Sequence[Unit], headline: Headline, resamples: int = RESAMPLES
) -> Difference:
    """Return this run's score minus the other's over the shared units; every resample draws the same units for both.

    Raises:
        ValueError: the runs share no unit, or a stratum of one is missing from the shared units.
    """
    other = {unit.id: unit for unit in theirs}
    shared = [unit for unit in ours if unit.id in other]
    if not shared or {u.stratum for u in shared} != {u.stratum for u in (*ours, *theirs)}:
        raise ValueError("the two runs share too few units")
    width = len(shared[0].values)
    both = by_stratum([unit._replace(values=unit.values + other[unit.id].values) for unit in shared])

    def difference(means: Means) -> NDArray[np.float64]:
        left = {stratum: rows[..., :width] for stratum, rows in means.items()}
        right = {stratum: rows[..., width:] for stratum, rows in means.items()}
        return headline(left) - headline(right)

    interval = _middle(difference(_resampled(both, resamples)))
    return Difference(float(difference(means_of(both))), interval, len(shared))


def _resampled(values: Values, resamples: int) -> Means:
    """Return the means of resampled strata, [resamples, values] each."""
    random = np.random.default_rng(SEED)
    means = {}
    for stratum in sorted(values):
        distinct, counts = np.unique(values[stratum], axis=0, return_counts=True)
        total = int(counts.sum())
        means[stratum] = random.multinomial(total, counts / total, size=resamples) @ distinct / total
    return means


def _middle(scores: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(scores, (2.5, 97.5))
    return float(low), float(high)
