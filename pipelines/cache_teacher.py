"""Stage one: run the frozen teacher over a data file, teacher-forced, and store what it says at every position."""

import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from switchkd.encoding import EncodedSample, SampleEncoder
from switchkd.errors import ConfigError, RunError
from switchkd.fingerprints import hash_image_processor, hash_tokenizer
from switchkd.images import MAX_IMAGE_PIXELS
from switchkd.pipelines.backend_transformers import TransformersBackend
from switchkd.pipelines.progress import Progress
from switchkd.samples import BadSample, SampleFile, Status
from switchkd.stores import Manifest, PartArrays, Payload, StoreWriter
from switchkd.stores.codec import ranks_by_frequency
from switchkd.stores.layout import HIDDEN_DTYPES, PAYLOADS
from switchkd.stores.payload import no_position
from switchkd.stores.place import Location
from switchkd.templates import load_template
from switchkd.vlm import Checkpoint, open_checkpoint, teacher_identity

PROBE_SAMPLES = 64  # the first usable samples; their top-k ids give the rank table


@dataclass(frozen=True)
class CacheOptions:
    """What `switchkd cache-teacher` was asked for; fields are its options."""

    teacher: Path
    data: Path
    out: Location
    images: Path | None = None
    template: str = "qwen2_base"
    payload: str = "topk"  # or "hidden", "both"
    k: int = 128
    fine: float = 0.004  # steps of the stored logits, see stores/codec.py
    coarse: float = 0.125
    hidden_dtype: str = "float16"  # or "bfloat16", "int8"
    part_size: int = 512
    batch_size: int = 16
    max_length: int = 2048
    max_image_pixels: int = MAX_IMAGE_PIXELS
    device: str = "cpu"
    dtype: str = "auto"
    workers: int = 0
    shard: tuple[int, int] = (0, 1)
    strict: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class CacheSummary:
    """What a run did."""

    store: Location
    parts_written: int
    parts_already_there: int
    parts_missing: int  # left to other workers
    samples: int
    positions: int
    skipped: dict[str, int]  # by reason
    written_bytes: int


def cache_teacher(options: CacheOptions) -> CacheSummary:
    """Create or continue a store; returns at once if it is whole.

    Raises:
        InputError: something given cannot be used; nothing expensive has started.
        RunError: the teacher gave logits that are not finite, or disk or network failed; committed parts are whole.
    """
    check_options(options)
    checkpoint = open_checkpoint(options.teacher, options.trust_remote_code)
    samples = SampleFile(options.data)
    encoder = SampleEncoder(
        checkpoint, load_template(options.template), options.images, options.max_length, options.max_image_pixels
    )
    manifest = build_manifest(options, checkpoint, encoder, samples)
    # Loaded on first use: a store that is whole, or does not fit, costs no teacher.
    backend = cache(lambda: TransformersBackend(checkpoint, options.device, manifest.teacher["dtype"]))
    writer = StoreWriter(
        options.out, manifest, lambda: _id_of_rank(backend, encoder, samples, manifest, options.batch_size)
    )
    missing = writer.missing_parts(options.shard)
    already = len(range(options.shard[0], manifest.part_count, options.shard[1])) - len(missing)
    skipped: Counter[str] = Counter()
    written = usable = positions = 0
    total = sum(len(manifest.part_samples(part)) for part in missing)
    with Progress("caching", total, "samples") as progress:
        for part, arrays in _captured_parts(missing, manifest, encoder, samples, backend, options, progress):
            written += writer.write_part(part, arrays)
            progress.written_bytes = writer.written_bytes
            positions += len(arrays.payload)
            usable += int((arrays.status == Status.OK).sum())
            skipped += Counter(Status(code).label for code in arrays.status[arrays.status != Status.OK])
    return CacheSummary(
        options.out,
        written,
        already,
        len(writer.missing_parts()),
        usable,
        positions,
        dict(skipped),
        writer.written_bytes,
    )


def check_options(options: CacheOptions) -> None:
    """Refuse options that cannot work, before anything is opened. Raises ConfigError."""
    index, count = options.shard
    if not 0 <= index < count:
        raise ConfigError(f"shard {index}/{count}: the first number runs from 0 to {count - 1}")
    if PurePosixPath(str(options.out)).suffix != ".zarr":
        raise ConfigError(f"a store's name ends in .zarr, got {options.out}")
    for name in ("k", "part_size", "batch_size", "max_length"):
        if getattr(options, name) < 2 - (name != "k"):
            raise ConfigError(f"{name} is too small: {getattr(options, name)}")
    if not 0 < options.fine <= options.coarse:
        raise ConfigError(f"0 < fine <= coarse is needed, got fine = {options.fine:g}, coarse = {options.coarse:g}")
    for name, words in (("payload", PAYLOADS), ("hidden_dtype", HIDDEN_DTYPES)):
        if getattr(options, name) not in words:
            raise ConfigError(f"{name} is one of {', '.join(words)}, got {getattr(options, name)!r}")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {options.device!r} cannot be used: {str(error).splitlines()[0]}") from None


def build_manifest(
    options: CacheOptions, checkpoint: Checkpoint, encoder: SampleEncoder, samples: SampleFile
) -> Manifest:
    """Describe the store that a run with these options writes."""
    topk, hidden = options.payload in ("topk", "both"), options.payload in ("hidden", "both")
    return Manifest(
        payload=options.payload,
        top_k=min(options.k, checkpoint.vocab_rows) if topk else 0,
        fine=options.fine if topk else 0.0,
        coarse=options.coarse if topk else 0.0,
        hidden_dtype=options.hidden_dtype if hidden else "",
        hidden_width=checkpoint.config.text_config.hidden_size if hidden else 0,
        vocab_rows=checkpoint.vocab_rows,
        samples=len(samples),
        part_size=options.part_size,
        teacher=teacher_identity(checkpoint) | {"dtype": checkpoint.resolve_dtype(options.dtype)},
        tokenizer=hash_tokenizer(checkpoint.tokenizer),
        template=encoder.template.as_dict(),
        image_processor=hash_image_processor(checkpoint.image_processor),
        image_tokens=checkpoint.image_tokens,
        max_length=options.max_length,
        max_image_pixels=options.max_image_pixels,
        data=samples.fingerprint,
        statuses={str(int(status)): status.label for status in Status},
        written_by={"backend": TransformersBackend.name}
        | {
            name: importlib.metadata.version(name)
            for name in ("switchkd", "torch", "transformers", "zarr", "numcodecs")
        },
    )


class _Batches(Dataset[Any]):
    """Every batch of some parts, in order, encoded. An item is (part, [(sample index, encoded or BadSample), …]).

    Batches never cross parts and do not depend on what was done before, so a resumed run computes each part exactly as an
    undisturbed one. Inside a part, samples of similar length share a batch.
    """

    def __init__(
        self, parts: list[int], manifest: Manifest, encoder: SampleEncoder, samples: SampleFile, batch_size: int
    ) -> None:
        self.encoder, self.samples, self.manifest, self.batch_size = encoder, samples, manifest, batch_size
        per_part = [(part, -(-len(manifest.part_samples(part)) // batch_size)) for part in parts]
        self.items = [(part, batch) for part, batches in per_part for batch in range(batches)]
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, item: int) -> tuple[int, list[tuple[int, EncodedSample | BadSample]]]:
        part, batch = self.items[item]
        if self._order[0] != part:
            self._order = (part, sorted(self.manifest.part_samples(part), key=self._size))
        chosen = self._order[1][batch * self.batch_size : (batch + 1) * self.batch_size]
        return part, [(index, self._encode(index)) for index in chosen]

    def _size(self, index: int) -> tuple[bool, int, int]:
        sample = self.samples[index]
        return sample.image is not None, sum(len(q) + len(a) for q, a in sample.turns), index

    def _encode(self, index: int) -> EncodedSample | BadSample:
        try:
            return self.encoder.encode(self.samples[index])
        except BadSample as bad:
            return bad


def _captured_parts(
    parts: list[int],
    manifest: Manifest,
    encoder: SampleEncoder,
    samples: SampleFile,
    backend: Callable[[], TransformersBackend],
    options: CacheOptions,
    progress: Progress,
) -> Iterator[tuple[int, PartArrays]]:
    batches = _Batches(parts, manifest, encoder, samples, options.batch_size)
    loader = DataLoader(batches, batch_size=None, num_workers=options.workers)
    captured: dict[int, tuple[EncodedSample, Payload] | BadSample] = {}
    for part, batch in loader:
        bad = {index: found for index, found in batch if isinstance(found, BadSample)}
        if bad and options.strict:
            raise next(iter(bad.values()))
        usable = [(index, found) for index, found in batch if isinstance(found, EncodedSample)]
        captured |= bad
        packed = _capture(backend(), usable, manifest) if usable else []
        captured |= {index: (found, pack) for (index, found), pack in zip(usable, packed, strict=True)}
        progress.advance(len(batch), positions=sum(found.positions for _, found in usable))
        if len(captured) == len(manifest.part_samples(part)):
            yield part, assemble([captured[index] for index in manifest.part_samples(part)], manifest)
            captured = {}


def _capture(
    backend: TransformersBackend, usable: list[tuple[int, EncodedSample]], manifest: Manifest
) -> list[Payload]:
    """Capture a batch; on failure find out which sample it was."""
    encoded = [found for _, found in usable]
    try:
        return backend.capture(encoded, manifest)
    except RunError as error:
        for (index, _), found in zip(usable, backend.capture_each(encoded, manifest), strict=True):
            if isinstance(found, RunError):
                raise RunError(f"row {index}: {found}; nothing of its part was stored") from error
        raise


def assemble(found: list[tuple[EncodedSample, Payload] | BadSample], manifest: Manifest) -> PartArrays:
    """Join what was captured of a part's samples, in their order."""
    payloads = [item[1] for item in found if not isinstance(item, BadSample)]
    return PartArrays(
        status=np.array([item.status if isinstance(item, BadSample) else Status.OK for item in found], np.uint8),
        digest=np.array([(0, 0, 0) if isinstance(item, BadSample) else item[0].digest for item in found], np.uint64),
        positions=np.array([0 if isinstance(item, BadSample) else item[0].positions for item in found], np.int64),
        payload=Payload.concatenate([no_position(manifest), *payloads]),
    )


def _id_of_rank(
    backend: Callable[[], TransformersBackend],
    encoder: SampleEncoder,
    samples: SampleFile,
    manifest: Manifest,
    batch_size: int,
) -> NDArray[np.uint32]:
    """Order the vocabulary by how often each id is among the top k of the first usable samples."""
    encoded: list[EncodedSample] = []
    for sample in samples if manifest.has_topk else ():
        try:
            encoded.append(encoder.encode(sample))
        except BadSample:
            continue
        if len(encoded) == PROBE_SAMPLES:
            break
    ids = [np.empty(0, np.int32)]
    for start in range(0, len(encoded), batch_size):
        payloads = backend().capture(encoded[start : start + batch_size], manifest)
        ids += [payload.ids.ravel() for payload in payloads if payload.ids is not None]
    return ranks_by_frequency(np.concatenate(ids), manifest.vocab_rows)
