"""A store's record of one sample, as a reader gets it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.counting import counted
from switchkd.errors import StoreError
from switchkd.stores.payload import Payload


@dataclass(frozen=True)
class StoredSample:
    """A store's record of one sample. Its arrays have a row for each of its P positions.

    Raises:
        StoreError: an array is asked for that the store does not keep, or of a sample that was skipped; says which and why.
    """

    index: int
    status: int  # 0: usable
    reason: str  # why it was skipped; "ok" if it was not
    digest: tuple[int, int, int]  # text, supervised mask, image
    payload: Payload

    @property
    def ids(self) -> NDArray[np.int32]:
        """Ids of the K largest logits, [P, K], in descending order of the logits."""
        return self._array("ids", self.payload.ids)

    @property
    def logits(self) -> NDArray[np.float32]:
        """The K largest logits, [P, K]."""
        return self._array("logits", self.payload.logits)

    @property
    def hidden(self) -> NDArray[np.float32]:
        """Final hidden states, [P, d]."""
        return self._array("hidden", self.payload.hidden)

    @property
    def stats(self) -> NDArray[np.float32]:
        """Statistics of all logits, [P, 5], columns `layout.STAT_COLUMNS`."""
        return self._array("stats", self.payload.stats)

    @property
    def visual_advantage(self) -> NDArray[np.float32]:
        """log p(token | image) − log p(token | blurred image) of the supervised tokens, [P], nats; 0 without an image."""
        return self._array("visual_advantage", self.payload.visual_advantage)

    def __repr__(self) -> str:
        if self.status:
            return f"StoredSample({self.index}: skipped, {self.reason})"
        kept = [name for name, array in self.payload.arrays().items() if array is not None]
        return f"StoredSample({self.index}: {counted(len(self.payload), 'position')}, {', '.join(kept)})"

    def _array(self, name: str, array: NDArray[Any] | None) -> NDArray[Any]:
        if self.status:
            raise StoreError(
                f"sample {self.index} was skipped when the teacher was cached ({self.reason}): it has no {name}"
            )
        if array is None:
            raise StoreError(f"this store keeps no {name}, see its payload (`switchkd store info`)")
        return array
