"""Capture: run the frozen teacher over a data file, teacher-forced, and store its output at every supervised position."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from switchkd.data.oddities import warnings_about
from switchkd.data.samples import BadSample
from switchkd.pipelines.capture.backends.open import check_available
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.capture.ray_engine import capture_with_ray, require_ray
from switchkd.pipelines.capture.worker import RETRY_ADVICE, CaptureWorker, PartDone
from switchkd.pipelines.preflight.skip_limit import mendable_rows, skips_of_store
from switchkd.pipelines.progress import Progress
from switchkd.pipelines.stored_teacher import topk_caution
from switchkd.settings import StoreLocation
from switchkd.stores import TeacherStore
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
        DataError: more samples are skipped than `max_skipped` allows, those of committed parts included.
        RunError: the teacher gave logits that are not finite, or disk or network failed; committed parts are whole.
        ReadFailure: an image could not be read now, or memory ran out; names the row.
    """
    check_available(options.backend, options.device)
    if options.engine == "ray":
        require_ray()
    return capture(CaptureWorker(options), tell)


def capture(worker: CaptureWorker, tell: Callable[[str], None]) -> CacheSummary:
    """Do the same with a worker; arguments and errors are those of `cache_teacher`."""
    options, manifest = worker.options, worker.manifest
    tell(f"payload: {manifest.describe_all()}")
    if manifest.payload == "topk" and (caution := topk_caution(manifest)):
        tell(f"warning: {caution}; cache --payload both or hidden")
    for line in warnings_about(worker.samples.notes()):
        tell(f"warning: {line}")
    # With Ray, the first actor to start creates the store, since this process may have no device for the teacher.
    new = options.engine == "ray" and not open_storage(options.out).exists()
    missing = list(range(manifest.part_count)) if new else worker.writer.missing_parts(options.shard)
    there = [] if new else sorted(set(range(manifest.part_count)) - set(worker.writer.missing_parts()))
    worker.anew = _parts_to_retry(worker, there) if options.retry_skipped else frozenset()
    if options.retry_skipped:
        tell(f"parts that are captured anew, since an image can now be read: {len(worker.anew)}")
    if kept := [part for part in there if part not in worker.anew]:
        worker.skip_limit.add(skips_of_store(TeacherStore.open(options.out), kept), advice=RETRY_ADVICE)
    parts = sorted({*missing, *worker.anew})
    total = sum(len(manifest.part_samples(part)) for part in parts)
    skipped: Counter[str] = Counter()
    with Progress("caching", total, "samples") as progress:
        if options.engine == "ray" and parts:
            done = list(_with_ray(worker, parts, progress))
        else:
            done = list(worker.write(parts, progress))
    for part in done:
        skipped += Counter(part.skipped)
    return CacheSummary(
        options.out,
        parts_written=sum(part.written for part in done),
        parts_already_there=len(range(options.shard[0], manifest.part_count, options.shard[1])) - len(parts),
        parts_missing=len(worker.writer.missing_parts()),
        samples=sum(part.samples for part in done),
        positions=sum(part.positions for part in done),
        skipped=dict(skipped),
        written_bytes=sum(part.written_bytes for part in done),
    )


def _parts_to_retry(worker: CaptureWorker, committed: Sequence[int]) -> frozenset[int]:
    """Return the committed parts of this worker's shard with a sample whose image was missing or unreadable, and now can be used.

    Where nothing changed, a part is left alone, so running the same command again does no work twice.
    """
    index, count = worker.options.shard
    mine = [part for part in committed if part % count == index]
    rows = mendable_rows(TeacherStore.open(worker.options.out), mine)
    return frozenset(part for part, found in rows.items() if any(_can_be_used(worker, row) for row in found))


def _can_be_used(worker: CaptureWorker, row: int) -> bool:
    try:
        worker.encoder.encode(worker.samples[row])
    except BadSample:
        return False
    return True


def _with_ray(worker: CaptureWorker, parts: list[int], progress: Progress) -> Iterator[PartDone]:
    manifest = worker.manifest
    for done in capture_with_ray(worker.options, manifest, parts, worker.anew):
        progress.written_bytes += done.written_bytes
        progress.advance(len(manifest.part_samples(done.part)), positions=done.positions)
        worker.skip_limit.add(done.skipped, advice=RETRY_ADVICE)
        yield done
