"""A capture worker: its teacher, loaded on first use, its data and its store writer; it captures whole parts.

A worker may be this process, one of several started by Slurm, Kubernetes or torchrun, or an actor of Ray; all work the same way.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from switchkd.counting import counted
from switchkd.data.encoded import EncodedSample
from switchkd.data.encoding import SampleEncoder
from switchkd.data.files import check_folder
from switchkd.data.load_template import load_template
from switchkd.data.samples import BadSample, Sample, SampleFile, Status
from switchkd.models.checkpoint import open_checkpoint, with_image_mode
from switchkd.pipelines.capture.backends.base import Backend, BackendFailed
from switchkd.pipelines.capture.backends.open import open_backend
from switchkd.pipelines.capture.backends.vllm_parity import (
    LeftOut,
    States,
    check_parity,
    hidden_states,
    states_with_transformers,
)
from switchkd.pipelines.capture.failing_sample import naming_failing_sample
from switchkd.pipelines.capture.manifest import build_manifest, resolve_payload
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.capture.tables import probe_tables
from switchkd.pipelines.cores import local_processes, workers_beside
from switchkd.pipelines.preflight.skip_limit import SkipLimit
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.visual_advantage import SharpAndBlurred
from switchkd.stores import Manifest, PartArrays, Payload, StoreTables, StoreWriter
from switchkd.stores.payload import empty_payload
from switchkd.stores.storage.open import open_storage

log = logging.getLogger(__name__)
Encoded = EncodedSample | BadSample
RETRY_ADVICE = " with --retry-skipped, which captures parts anew where an image was missing or unreadable"


@dataclass(frozen=True)
class PartDone:
    """The result of one part."""

    part: int
    written: bool  # False: another writer committed it first
    samples: int
    positions: int
    skipped: dict[str, int]  # by reason
    written_bytes: int


class CaptureWorker:
    """Everything needed to capture parts. The teacher is loaded on first use, so a complete store loads none.

    Args:
        manifest: of the store, if it is available already; else it is built, which reads the teacher's weights once.
        anew: committed parts that are to be replaced when they have been captured again.
        lender: a worker with the same teacher, and the same options about it and images, whose teacher is used; None opens one.

    Raises:
        InputError: something given cannot be used.
    """

    def __init__(
        self,
        options: CacheOptions,
        manifest: Manifest | None = None,
        anew: frozenset[int] = frozenset(),
        lender: "CaptureWorker | None" = None,
    ) -> None:
        self.anew, self.lender = anew, lender
        self.requests_ahead = 0  # samples that the backend was given beside those it just returned
        self.options = options = resolve_payload(options)
        if lender is None:
            opened = open_checkpoint(options.teacher, options.trust_remote_code)
            self.checkpoint = with_image_mode(opened, options.image_mode, options.max_pixels)
        else:
            self.checkpoint = lender.checkpoint
        if options.backend == "transformers":
            self.checkpoint.require_whole_weights("pass it, or the checkpoint that it was made from")
        self.samples = SampleFile(options.data)
        self.encoder = SampleEncoder(
            self.checkpoint,
            load_template(options.template, self.checkpoint),
            options.images,
            options.max_length,
            options.max_image_pixels,
        )
        if options.max_skipped < 1:
            check_folder(self.samples, options.images)
        # Of the parts that this worker knows of: those committed before it began, and its own.
        self.skip_limit = SkipLimit(options.data, len(self.samples), options.max_skipped)
        self.manifest = manifest or build_manifest(options, self.checkpoint, self.encoder, self.samples)
        looks = self.manifest.visual_advantage
        self.encode: Callable[[Sample], EncodedSample] = SharpAndBlurred(self.encoder) if looks else self.encoder.encode

    @cached_property
    def backend(self) -> Backend:
        """The teacher, compared with transformers' where `--check` asks for it; that of `lender`, if there is one."""
        if self.lender is not None:
            return self.lender.backend
        samples, expected = self._samples_to_check(), list[States]()
        backend = self._open_backend(lambda: expected.extend(self._with_transformers(samples)))
        for states in expected:
            found = hidden_states(backend, samples, self.manifest)
            relative = check_parity(self.checkpoint, self.manifest.teacher["dtype"], found, states)
            log.info("vLLM's final states are transformers' to %.2g of their size", relative)
        return backend

    def _with_transformers(self, samples: Sequence[EncodedSample]) -> Iterator[States]:
        """Yield the states of the samples to check from transformers; nothing without samples, or if it cannot run the teacher."""
        if samples:
            log.info(
                "comparing vLLM with transformers on %s: transformers runs the teacher first",
                counted(len(samples), "sample"),
            )
            try:
                yield states_with_transformers(self.checkpoint, self.manifest.teacher["dtype"], samples, self.manifest)
            except LeftOut as reason:
                log.warning("vLLM's states are not compared with transformers': %s", reason)

    def _samples_to_check(self) -> list[EncodedSample]:
        """Return the first usable samples, as many as `--check` asks for."""
        options = self.options
        if options.backend != "vllm":
            return []
        wanted = options.check
        if wanted is None:
            storage = open_storage(options.out)
            begun = storage.exists() and bool(storage.parts())
            wanted = 0 if begun or options.shard[0] or options.engine == "ray" else 1
        found: list[EncodedSample] = []
        for sample in self.samples:
            if len(found) == wanted:
                break
            with suppress(BadSample):
                found.append(self.encoder.encode(sample))
        return found

    def _open_backend(self, before_engine: Callable[[], None]) -> Backend:
        options = self.options
        return open_backend(
            options.backend,
            self.checkpoint,
            self.manifest.teacher["dtype"],
            device=options.device,
            max_length=options.max_length,
            tensor_parallel=options.tensor_parallel,
            vllm_options=dict(options.vllm_options),
            before_engine=before_engine,
        )

    @cached_property
    def writer(self) -> StoreWriter:
        """The store, created if it does not exist."""
        return StoreWriter(self.options.out, self.manifest, self._tables)

    def open_store(self) -> None:
        """Open the store, or create it. Raises StoreMismatch if it is that of another teacher, data file or payload."""
        self.writer  # noqa: B018 - compares the manifests

    def _tables(self) -> StoreTables:
        return probe_tables(
            self.backend, self.checkpoint, self.encoder, self.samples, self.manifest, self.options.batch_size
        )

    def write(self, parts: Sequence[int], progress: Progress | None = None) -> Iterator[PartDone]:
        """Capture and commit parts, one after the other.

        Raises:
            RunError: the teacher gave logits that are not finite, or disk or network failed; committed parts are whole.
            ReadFailure: an image could not be read now, or memory ran out; names the row.
            BadSample: with `strict`, the first sample that cannot be used.
            DataError: more samples are skipped than `max_skipped` allows.
        """
        for part, arrays in self._captured(parts, progress):
            before = self.writer.written_bytes
            if part in self.anew:
                self.writer.remove_part(part)
            written = self.writer.write_part(part, arrays)
            bad = arrays.status[arrays.status != Status.OK]
            if progress is not None:
                progress.written_bytes = self.writer.written_bytes
            yield PartDone(
                part=part,
                written=written,
                samples=len(arrays.status) - len(bad),
                positions=len(arrays.payload),
                skipped=dict(Counter(Status(code).label for code in bad)),
                written_bytes=self.writer.written_bytes - before,
            )

    def _captured(self, parts: Sequence[int], progress: Progress | None) -> Iterator[tuple[int, PartArrays]]:
        captured: dict[int, tuple[EncodedSample, Payload] | BadSample] = {}
        for part, batch, packed in self._captured_batches(parts):
            pairs = iter(packed)
            captured |= {
                index: found if isinstance(found, BadSample) else (found, next(pairs)) for index, found in batch
            }
            if progress is not None:
                progress.ahead = self.requests_ahead
                progress.advance(len(batch), positions=sum(map(len, packed)))
            if len(captured) == len(self.manifest.part_samples(part)):
                yield part, assemble([captured[index] for index in self.manifest.part_samples(part)], self.manifest)
                captured = {}

    def _captured_batches(self, parts: Sequence[int]) -> Iterator[tuple[int, list[tuple[int, Encoded]], list[Payload]]]:
        """Yield (part, batch, payloads of its usable samples) in order, with up to the backend's `ahead` batches started."""
        batches = _Batches(parts, self.manifest, self.encode, self.samples, self.options.batch_size)
        loader = DataLoader(batches, batch_size=None, num_workers=self._loaders())
        under_way: deque[tuple[int, list[tuple[int, Encoded]], Any]] = deque()
        try:
            yield from self._run_batches(loader, under_way)
        except BackendFailed as failure:
            rows = [index for _, batch, _ in under_way for index, found in batch if isinstance(found, EncodedSample)]
            if not rows:
                raise
            raise BackendFailed(f"{failure}. Under way were rows from {min(rows)} to {max(rows)}") from failure

    def _run_batches(
        self,
        loader: Iterable[tuple[int, list[tuple[int, Encoded]]]],
        under_way: deque[tuple[int, list[tuple[int, Encoded]], Any]],
    ) -> Iterator[tuple[int, list[tuple[int, Encoded]], list[Payload]]]:
        """Run batches; those that are started and not finished are in `under_way`, in order."""
        for part, batch in loader:
            usable = [found for _, found in batch if isinstance(found, EncodedSample)]
            if self.options.strict and len(usable) < len(batch):
                raise next(found for _, found in batch if isinstance(found, BadSample))
            for bad in (found for _, found in batch if isinstance(found, BadSample)):
                self.skip_limit.add({bad.status.label: 1}, seen=bad.detail, advice=RETRY_ADVICE)
            with self._name_failing_sample(batch):
                started = self.backend.start(usable, self.manifest) if usable else None
            under_way.append((part, batch, started))
            if len(under_way) >= self.backend.ahead:
                yield self._oldest(under_way)
        while under_way:
            yield self._oldest(under_way)

    def _oldest(
        self, under_way: deque[tuple[int, list[tuple[int, Encoded]], Any]]
    ) -> tuple[int, list[tuple[int, Encoded]], list[Payload]]:
        found = self._finished(*under_way[0])
        under_way.popleft()
        encoded = (sample for _, batch, _ in under_way for _, sample in batch)
        self.requests_ahead = sum(isinstance(sample, EncodedSample) for sample in encoded)
        return found

    def _loaders(self) -> int:
        """Return how many processes read and decode images; vLLM and Ray share the machine in their own ways."""
        if self.options.workers is not None:
            return self.options.workers
        alone = self.options.backend == "transformers" and self.options.engine == "local"
        return workers_beside(local_processes()) if alone else 0

    def _finished(
        self, part: int, batch: list[tuple[int, Encoded]], started: Any
    ) -> tuple[int, list[tuple[int, Encoded]], list[Payload]]:
        with self._name_failing_sample(batch):
            return part, batch, [] if started is None else self.backend.finish(started)

    def _name_failing_sample(self, batch: list[tuple[int, Encoded]]) -> AbstractContextManager[None]:
        usable = [(index, found) for index, found in batch if isinstance(found, EncodedSample)]
        return naming_failing_sample(self.backend, self.manifest, self.checkpoint.path, usable)


class _Batches(Dataset[Any]):
    """Every batch of some parts, in order, encoded. An item is (part, [(sample index, encoded or BadSample), …]).

    Batches never cross parts and do not depend on earlier work, so a resumed run computes each part exactly as an
    uninterrupted one. Inside a part, samples of similar length share a batch.
    """

    def __init__(
        self,
        parts: Sequence[int],
        manifest: Manifest,
        encode: Callable[[Sample], EncodedSample],
        samples: SampleFile,
        batch_size: int,
    ) -> None:
        self.encode, self.samples, self.manifest, self.batch_size = encode, samples, manifest, batch_size
        per_part = [(part, -(-len(manifest.part_samples(part)) // batch_size)) for part in parts]
        self.items = [(part, batch) for part, batches in per_part for batch in range(batches)]
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int) -> tuple[int, list[tuple[int, Encoded]]]:
        part, batch = self.items[item]
        if self._order[0] != part:
            self._order = (part, sorted(self.manifest.part_samples(part), key=self._size))
        chosen = self._order[1][batch * self.batch_size : (batch + 1) * self.batch_size]
        return part, [(index, self._encode(index)) for index in chosen]

    def _size(self, index: int) -> tuple[bool, int, int]:
        sample = self.samples[index]
        return sample.image is not None, sum(len(q) + len(a) for q, a in sample.turns), index

    def _encode(self, index: int) -> Encoded:
        try:
            return self.encode(self.samples[index])
        except BadSample as bad:
            return bad


def assemble(found: list[tuple[EncodedSample, Payload] | BadSample], manifest: Manifest) -> PartArrays:
    """Concatenate the payloads of a part's samples, in their order."""
    payloads = [item[1] for item in found if not isinstance(item, BadSample)]
    return PartArrays(
        status=np.array([item.status if isinstance(item, BadSample) else Status.OK for item in found], np.uint8),
        digest=np.array([(0, 0, 0) if isinstance(item, BadSample) else item[0].digest for item in found], np.uint64),
        positions=np.array([0 if isinstance(item, BadSample) else item[0].positions for item in found], np.int64),
        tokens=np.array([0 if isinstance(item, BadSample) else len(item[0].input_ids) for item in found], np.uint32),
        payload=Payload.concatenate([empty_payload(manifest, 0), *payloads]),
    )
