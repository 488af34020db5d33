"""The limit on skipped samples: a run over data of which more cannot be used stops, and says how many and why."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from switchkd.counting import counted
from switchkd.data.samples import Status
from switchkd.errors import DataError, StoreError
from switchkd.printable import printable

if TYPE_CHECKING:
    from switchkd.stores import TeacherStore

ALWAYS_ALLOWED = 10  # skipped samples that stop no run, in a file of at least twice as many

# Reasons that another image folder, or a mended image, removes without a change of the data file.
MENDABLE = (Status.IMAGE_MISSING, Status.IMAGE_UNREADABLE, Status.IMAGE_OUTSIDE_FOLDER)


def allowed_skips(samples: int, share: float) -> int:
    """Return how many of a file's samples may be skipped: the share, but at least 10, or half of a file of fewer than 20."""
    return max(int(share * samples), min(ALWAYS_ALLOWED, samples // 2))


class SkipLimit:
    """Counts skipped samples by reason, and stops the run at the first one too many.

    Args:
        data: the data file, for the message. samples: its rows. share: of them that may be skipped; 1 allows any number.
    """

    def __init__(self, data: Path, samples: int, share: float) -> None:
        self.data, self.samples, self.share = data, samples, share
        self.allowed = allowed_skips(samples, share)
        self.skipped: Counter[str] = Counter()

    def add(self, skipped: Mapping[str, int], seen: str = "", advice: str = "") -> None:
        """Count skipped samples.

        Args:
            skipped: reason → count. seen: the last one's detail, for the message. advice: what else to do about it.

        Raises:
            DataError: more are skipped than the limit allows.
        """
        self.skipped.update(skipped)
        total = self.skipped.total()
        if total > self.allowed:
            raise self._too_many(
                f"{counted(total, 'sample')} of {printable(self.data)} so far", self.skipped, seen, advice
            )

    def foresee(self, skipped: Mapping[str, int], of: int, seen: str = "") -> None:
        """Judge all samples by some of them from all over the data file; nothing is counted.

        Args:
            skipped: reason → count among them. of: how many they are. seen: the last one's detail, for the message.

        Raises:
            DataError: so many were skipped that the limit will be passed, but for a chance of one in 700 (three deviations).
        """
        share = sum(skipped.values()) / of
        certain = share - 3 * math.sqrt(share * (1 - share) / of)
        if certain * self.samples > self.allowed:
            what = f"{sum(skipped.values()):,} of {counted(of, 'sample')} from all over {printable(self.data)}"
            raise self._too_many(what, Counter(skipped), seen, "")

    def _too_many(self, what: str, skipped: Counter[str], seen: str, advice: str) -> DataError:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.most_common())
        return DataError(
            f"{what} cannot be used: {reasons}"
            + (f" (the last: {printable(seen, 300)})" if seen else "")
            + f". --max-skipped {self.share:g} allows {self.allowed:,} of {self.samples:,}. `switchkd data check` lists them: mend "
            f"the data or --images and run the same command again{advice}; or accept them with a larger --max-skipped, at most 1"
        )


def skips_of_store(store: "TeacherStore", parts: Iterable[int]) -> Counter[str]:
    """Return the skipped samples of committed parts, by reason."""
    counts: Counter[str] = Counter()
    for _, codes in _statuses(store, parts):
        counts.update(Status(int(code)).label for code in codes[codes != Status.OK])
    return counts


def mendable_rows(store: "TeacherStore", parts: Iterable[int]) -> dict[int, list[int]]:
    """Return part → its rows that were skipped for a reason that may have changed; only parts that have such rows."""
    found = {
        part: (np.flatnonzero(np.isin(codes, MENDABLE)) + store.manifest.part_samples(part)[0]).tolist()
        for part, codes in _statuses(store, parts)
    }
    return {part: rows for part, rows in found.items() if rows}


def _statuses(store: "TeacherStore", parts: Iterable[int]) -> list[tuple[int, NDArray[np.uint8]]]:
    """Return (part, status of its samples); without damaged parts, which `store verify` finds and `store repair` removes."""

    def read(part: int) -> tuple[int, NDArray[np.uint8]]:
        try:
            return part, store.part_statuses(part)
        except StoreError:
            return part, np.empty(0, np.uint8)

    return store.storage.map(read, parts)
