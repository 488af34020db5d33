"""Several data files as the samples of one run: how many of each an epoch has, in which order, and whose store a sample has."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from switchkd.data.encoded import EncodedSample
from switchkd.errors import ReadFailure
from switchkd.pipelines.preflight.left_out import LeftOut, Unusable
from switchkd.pipelines.preflight.skip_limit import SkipLimit
from switchkd.pipelines.training.batches.dataset import OrderedSamples, TrainingSamples
from switchkd.pipelines.training.batches.sampler import EpochOrder
from switchkd.stores import Payload, TeacherStore


@dataclass(frozen=True)
class MixedFile:
    """One data file of a mixture.

    Args:
        name: of the entry. samples: its usable samples, n. drawn: how many an epoch has, at least 1; more than n repeats them.
        teacher: number of the teacher of its store, among those of the run.
    """

    name: str
    samples: TrainingSamples
    drawn: int
    teacher: int = 0


@dataclass(frozen=True)
class MixedOrder:
    """The order of the samples of several data files: a function of the seed, the epoch and the data files only.

    The permutations of a file's samples form one endless sequence, of which epoch e takes the places [e·m, (e + 1)·m), m samples.
    So over epochs each sample of a file is taken equally often, up to one time. An epoch's samples of all files are then ordered
    as those of one file, see `EpochOrder`: with each file taken once, the order is that of one file of all rows.

    Args:
        counts: usable samples of each file. drawn: samples of each that an epoch has.
        grouping, seed, global_batch: see `EpochOrder`. lengths, has_image: of all samples, file by file, [Σ counts].
    """

    counts: tuple[int, ...]
    drawn: tuple[int, ...]
    grouping: str
    seed: int
    lengths: NDArray[np.int64]
    has_image: NDArray[np.bool_]
    global_batch: int

    @property
    def samples(self) -> int:
        """Usable samples of all files."""
        return sum(self.counts)

    def epoch(self, number: int) -> NDArray[np.int64]:
        """Return the samples of epoch `number`, counted from 0, [Σ drawn], as numbers in 0 … Σ counts - 1."""
        firsts = [0, *accumulate(self.counts)]
        items = np.concatenate([firsts[file] + self._of_file(file, number) for file in range(len(self.counts))])
        order = EpochOrder(
            self.grouping, self.seed, len(items), self.lengths[items], self.has_image[items], self.global_batch
        )
        return items[order.epoch(number)]

    def _of_file(self, file: int, epoch: int) -> NDArray[np.int64]:
        """Return the samples of one file in an epoch, in ascending order, [drawn]."""
        count, drawn = self.counts[file], self.drawn[file]
        begin, end = epoch * drawn, (epoch + 1) * drawn
        pieces = []
        for round_ in range(begin // count, -(-end // count)):
            start = round_ * count
            random = np.random.default_rng([self.seed % (1 << 63), file, round_])
            pieces.append(random.permutation(count)[max(begin - start, 0) : end - start])
        return np.sort(np.concatenate(pieces))


class MixedSamples(OrderedSamples):
    """The usable samples of several data files, each with its own encoder and store.

    An item is epoch · Σ n and a number in 0 … Σ n - 1, file by file, as `StepBatches` yields them; the index of a sample counts the
    rows of all files.
    `len` is the number of samples in an epoch.

    Args:
        path: of the mixture, for messages. files: at least one; all with stores, or none.
        max_skipped: without stores, the share of all rows that may turn out to be unusable.

    Raises:
        DataError: more rows are unusable than `max_skipped` allows.
    """

    def __init__(self, path: Path, files: Sequence[MixedFile], max_skipped: float = 1.0) -> None:
        self.files = list(files)
        parts = [file.samples for file in files]
        self.encoder, self.teacher_encoder = parts[0].encoder, parts[0].teacher_encoder
        for number, part in enumerate(parts):
            if part.share is not None:
                part.share = replace(part.share, file=number)
        self._items = list(accumulate((len(part) for part in parts), initial=0))
        self._rows = list(accumulate((part.rows for part in parts), initial=0))
        self.skipped = sum((part.skipped for part in parts), Counter[str]())
        self.surveyed = all(part.surveyed for part in parts)
        self.left_out: LeftOut | None = None
        if not self.stores:
            limit = SkipLimit(path, self.rows, max_skipped)
            limit.add(self.skipped)
            self.left_out = LeftOut(limit)

    def __len__(self) -> int:
        return sum(file.drawn for file in self.files)

    @property
    def rows(self) -> int:
        """Rows of all data files, usable or not."""
        return self._rows[-1]

    @property
    def fingerprint(self) -> str:
        """Hash of the data files' own ones."""
        return hashlib.sha256("".join(file.samples.fingerprint for file in self.files).encode()).hexdigest()

    @property
    def stores(self) -> list[TeacherStore]:
        """The stores, file by file."""
        return [store for file in self.files for store in file.samples.stores]

    @property
    def template(self) -> dict[str, Any]:
        """The template of the data file with the most samples in an epoch, as plain data."""
        return max(self.files, key=lambda file: file.drawn).samples.template

    def warnings(self) -> list[str]:
        """Return lines about usable rows that may lack their image, each with the name of their file."""
        return [f"{file.name}: {line}" for file in self.files for line in file.samples.warnings()]

    def __getitem__(self, item: int) -> tuple[EncodedSample, int] | Unusable:
        epoch, item = divmod(item, self._items[-1])
        number = int(np.searchsorted(self._items, item, side="right")) - 1
        part, first = self.files[number].samples, self._rows[number]
        try:
            found = part[epoch * len(part) + item - self._items[number]]
        except ReadFailure as failure:
            if type(failure) is not ReadFailure:
                raise
            raise ReadFailure(f"{part.samples.path}, {failure}") from failure
        if isinstance(found, Unusable):
            return Unusable(first + found.row, found.status, f"{part.samples.path}, {found.detail}")
        encoded, index = found
        return encoded, first + index

    def file_of(self, index: int) -> int:
        """Return the number of the file that holds a sample, by its index."""
        return int(np.searchsorted(self._rows, index, side="right")) - 1

    def teacher_of(self, index: int) -> int:
        """Return the number of the teacher that a sample's store is of, by the sample's index."""
        return self.files[self.file_of(index)].teacher

    def payload(self, items: Sequence[tuple[EncodedSample, int]]) -> Payload:
        """See `TrainingSamples.payload`; hidden states of narrower teachers are filled up with zeros on the right.

        Raises:
            StoreMismatch: a sample's text, mask or image is not the cached one.
        """
        numbers = [self.file_of(index) for _, index in items]
        pieces: dict[int, Payload] = {}
        for number in sorted(set(numbers)):
            places = [place for place, found in enumerate(numbers) if found == number]
            own = [(items[place][0], items[place][1] - self._rows[number]) for place in places]
            read = self._filled_up(self.files[number].samples.payload(own))
            positions = [(encoded.teacher or encoded).positions for encoded, _ in own]
            pieces |= dict(zip(places, read.split(positions), strict=True))
        if not pieces:
            return self._filled_up(self.files[0].samples.payload([]))
        return Payload.concatenate([pieces[place] for place in range(len(items))])

    @cached_property
    def _width(self) -> int:
        """Of the widest teacher's hidden states; 0 where none are read."""
        return max((store.manifest.hidden_width for store in self.stores), default=0)

    def _filled_up(self, read: Payload) -> Payload:
        if read.hidden is None or read.hidden.shape[1] == self._width:
            return read
        return replace(read, hidden=np.pad(read.hidden, ((0, 0), (0, self._width - read.hidden.shape[1]))))

    def aligned(self, count: int) -> float:
        """See `TrainingSamples.aligned`; the mean over the files, each weighted by its samples in an epoch."""
        shares = [file.samples.aligned(max(1, count // len(self.files))) for file in self.files]
        return float(np.average(shares, weights=[file.drawn for file in self.files]))

    def order(self, grouping: str, seed: int, global_batch: int) -> MixedOrder:
        """See `MixedOrder`."""
        parts = [file.samples for file in self.files]
        return MixedOrder(
            tuple(map(len, parts)),
            tuple(file.drawn for file in self.files),
            grouping,
            seed,
            np.concatenate([part.lengths for part in parts]),
            np.concatenate([part.has_image for part in parts]),
            global_batch,
        )

    def longest(self) -> int:
        """See `TrainingSamples.longest`."""
        return max(file.samples.longest() for file in self.files)

    def order_identity(self) -> str:
        """See `TrainingSamples.order_identity`."""
        return "; ".join(
            f"{file.name}: {file.drawn:,} an epoch of {file.samples.order_identity()}" for file in self.files
        )
