"""Capture: run the frozen teacher over a data file, teacher-forced, and store its output at every supervised position."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from switchkd.pipelines.capture.backends.open import check_available
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.capture.ray_engine import capture_with_ray, require_ray
from switchkd.pipelines.capture.worker import CaptureWorker, PartDone
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.stored_teacher import topk_caution
from switchkd.settings import StoreLocation
from switchkd.stores import Manifest
from switchkd.stores.storage.open import open_storage

__all__ = ["CacheOptions", "CacheSummary", "cache_teacher"]


@dataclass(frozen=True)
class CacheSummary:
    """The result of a capture."""

    store: StoreLocation
    parts_written: int
    parts_already_there: int
    parts_missing: int  # left to other workers
    samples: int
    positions: int
    skipped: dict[str, int]  # by reason
    written_bytes: int


def cache_teacher(options: CacheOptions, tell: Callable[[str], None] = lambda line: None) -> CacheSummary:
    """Create or continue a store; returns immediately if it is complete.

    Args:
        tell: called with lines for the user, before the teacher runs: what is stored, and what to know about it.

    Raises:
        InputError: something given cannot be used; nothing expensive has started.
        RunError: the teacher gave logits that are not finite, or disk or network failed; committed parts are whole.
    """
    check_available(options.backend, options.device)
    if options.engine == "ray":
        require_ray()
    worker = CaptureWorker(options)
    manifest = worker.manifest
    tell(f"payload: {manifest.describe_all()}")
    if manifest.payload == "topk" and (caution := topk_caution(manifest)):
        tell(f"warning: {caution}; cache --payload both or hidden")
    # With Ray, the first actor to start creates the store, since this process may have no device for the teacher.
    new = options.engine == "ray" and not open_storage(options.out).exists()
    missing = list(range(manifest.part_count)) if new else worker.writer.missing_parts(options.shard)
    total = sum(len(manifest.part_samples(part)) for part in missing)
    skipped: Counter[str] = Counter()
    with Progress("caching", total, "samples") as progress:
        if options.engine == "ray" and missing:
            done = list(_with_ray(options, manifest, missing, progress))
        else:
            done = list(worker.write(missing, progress))
    for part in done:
        skipped += Counter(part.skipped)
    return CacheSummary(
        options.out,
        parts_written=sum(part.written for part in done),
        parts_already_there=len(range(options.shard[0], manifest.part_count, options.shard[1])) - len(missing),
        parts_missing=len(worker.writer.missing_parts()),
        samples=sum(part.samples for part in done),
        positions=sum(part.positions for part in done),
        skipped=dict(skipped),
        written_bytes=sum(part.written_bytes for part in done),
    )


def _with_ray(options: CacheOptions, manifest: Manifest, parts: list[int], progress: Progress) -> Iterator[PartDone]:
    for done in capture_with_ray(options, manifest, parts):
        progress.written_bytes += done.written_bytes
        progress.advance(len(manifest.part_samples(done.part)), positions=done.positions)
        yield done
