"""The payload of consecutive positions in memory: the type that capture, writer and reader exchange."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.stores.layout import STAT_COLUMNS
from switchkd.stores.manifest import Manifest


@dataclass(frozen=True)
class Payload:
    """Data of P positions: statistics always, all else as the store has it."""

    stats: NDArray[np.float32]  # [P, 5], columns of STAT_COLUMNS
    ids: NDArray[np.int32] | None = None  # [P, K], by descending logit
    logits: NDArray[np.float32] | None = None  # [P, K]
    hidden: NDArray[np.float32] | None = None  # [P, d], after the teacher's final norm
    # [P], nats: log p(token | image) − log p(token | blurred image) of the supervised token; 0 in samples without an image
    visual_advantage: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.stats)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that are not None, by field name."""
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: array for name, array in named if array is not None}

    def stat(self, name: str) -> NDArray[np.float32]:
        """Return one statistic, [P]."""
        column: NDArray[np.float32] = self.stats[:, STAT_COLUMNS.index(name)]
        return column

    def slice(self, begin: int, end: int) -> "Payload":
        """Return positions begin … end - 1."""
        return Payload(**{name: array[begin:end] for name, array in self.arrays().items()})

    def split(self, counts: Sequence[int]) -> list["Payload"]:
        """Split into runs of the given lengths."""
        ends = np.cumsum(counts)
        return [self.slice(int(end - count), int(end)) for count, end in zip(counts, ends, strict=True)]

    @staticmethod
    def concatenate(pieces: Sequence["Payload"]) -> "Payload":
        """Join one or more runs that have the same arrays."""
        if len(pieces) == 1:
            return pieces[0]
        names = pieces[0].arrays()
        return Payload(**{name: np.concatenate([getattr(piece, name) for piece in pieces]) for name in names})


def empty_payload(manifest: Manifest, positions: int) -> Payload:
    """Return a payload with the arrays that a store of this manifest has, uninitialised."""
    return Payload(
        stats=np.empty((positions, len(STAT_COLUMNS)), np.float32),
        ids=np.empty((positions, manifest.top_k), np.int32) if manifest.has_topk else None,
        logits=np.empty((positions, manifest.top_k), np.float32) if manifest.has_topk else None,
        hidden=np.empty((positions, manifest.hidden_width), np.float32) if manifest.has_hidden else None,
        visual_advantage=np.empty(positions, np.float32) if manifest.visual_advantage else None,
    )
