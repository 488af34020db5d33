"""The order of samples in an epoch: a function of seed, epoch and global batch size only.

It does not depend on workers, processes or interruptions. The epochs form one endless sequence, and step s takes its places
[s·G, (s+1)·G), where G is the global batch, however the step is divided: process p of n takes its micro-batches p, p + n, …. So a
run that is resumed with another number of processes repeats no sample and skips none, and a step may contain the end of one epoch
and the beginning of the next.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from switchkd.errors import ConfigError

GROUPINGS = ("none", "length", "modality-length")
POOL_BATCHES = (
    50  # global batches that are sorted by length together: enough for little padding, few enough for a random order
)


class Order(Protocol):
    """The items of a data set in every epoch, in order."""

    @property
    def samples(self) -> int:
        """Items of the data set, n."""
        ...

    @property
    def lengths(self) -> NDArray[np.int64] | None:
        """Tokens of each item of the data set, [n]; None where no grouping needs them."""
        ...

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return the items of epoch `number`, counted from 0."""
        ...


@dataclass(frozen=True)
class EpochOrder:
    """The order of n samples in every epoch.

    "none" shuffles. "length" gives each global batch samples of similar length. "modality-length" does so separately for samples
    with an image and for text-only samples, as LLaVA's `group_by_modality_length` does: a text-only batch then costs no image
    tokens. The remainder of each group that does not fill a global batch comes at the end, so at most two batches are mixed.

    Args:
        grouping: one of `GROUPINGS`.
        seed: of the shuffle.
        samples: n.
        lengths: [n], for the groupings; only their order counts. The batch with the longest sample comes first, so that a
            device's memory runs out in the first step or never.
        has_image: [n] bool, for "modality-length".
        global_batch: samples of one optimizer step, over all processes and accumulated batches.

    Raises:
        ConfigError: an unknown grouping.
    """

    grouping: str
    seed: int
    samples: int
    lengths: NDArray[np.int64] | None = None
    has_image: NDArray[np.bool_] | None = None
    global_batch: int = 1

    def __post_init__(self) -> None:
        if self.grouping not in GROUPINGS:
            raise ConfigError(f"samples are grouped by {', '.join(GROUPINGS)}, got {self.grouping!r}")

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return the order of epoch `number`, counted from 0: a permutation of [n]."""
        if self.grouping == "none":  # the default order of transformers' Trainer
            generator = torch.Generator().manual_seed(self.seed + number)
            return torch.randperm(self.samples, generator=generator).numpy()
        assert self.lengths is not None
        random = np.random.default_rng([self.seed, number])
        groups = [np.arange(self.samples)]
        if self.grouping == "modality-length":
            assert self.has_image is not None
            groups = [np.flatnonzero(self.has_image), np.flatnonzero(~self.has_image)]
        batches: list[NDArray[np.int64]] = []
        rest: list[NDArray[np.int64]] = []
        for group in groups:
            full = len(group) // self.global_batch * self.global_batch
            shuffled = random.permutation(group)
            rest.append(shuffled[full:])
            pool = POOL_BATCHES * self.global_batch
            for start in range(0, full, pool):
                ordered = self._by_length(shuffled[start : min(start + pool, full)])
                batches += list(ordered.reshape(-1, self.global_batch))
        batches = [batches[place] for place in random.permutation(len(batches))]
        if batches:
            longest = int(np.argmax([self.lengths[batch].max() for batch in batches]))
            batches[0], batches[longest] = batches[longest], batches[0]
        return np.concatenate([*batches, self._by_length(np.concatenate(rest))])

    def _by_length(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        assert self.lengths is not None
        return indices[np.argsort(self.lengths[indices], kind="stable")]


class StepBatches(Sampler[list[int]]):
    """The micro-batches of one process, for every step of a run: lists of epoch · n + sample, for sample 0 ≤ … < n.

    Args:
        order: of each epoch.
        steps: optimizer steps of the run.
        batch_size: samples per micro-batch. accumulation: micro-batches per step and process.
        process, processes: rank of this process, and their number.
    """

    def __init__(
        self, order: Order, steps: int, batch_size: int, accumulation: int, process: int = 0, processes: int = 1
    ) -> None:
        self.order, self.steps = order, steps
        self.batch_size, self.accumulation = batch_size, accumulation
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        stream = self._stream()
        for _ in range(self.steps):
            for batch in range(self.accumulation * self.processes):
                samples = list(islice(stream, self.batch_size))
                if batch % self.processes == self.process:
                    yield samples

    def _stream(self) -> Iterator[int]:
        for epoch in count():
            yield from (self.order.epoch(epoch) + epoch * self.order.samples).tolist()


def padding_share(order: NDArray[np.int64], lengths: NDArray[np.int64], batch: int) -> float:
    """Return the share of padding among the tokens of an epoch, 0 … 1.

    Args:
        order: [m], an epoch's items, of n. lengths: [n], in tokens.
        batch: samples that are padded together, those of one device and forward pass.
    """
    batches = [lengths[order[start : start + batch]] for start in range(0, len(order), batch)]
    padded = sum(len(of_batch) * int(of_batch.max()) for of_batch in batches)
    return 1 - int(lengths[order].sum()) / padded
