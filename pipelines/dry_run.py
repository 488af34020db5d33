"""`switchkd cache-teacher --dry-run`: what a capture will take, from a probe of random samples, before it is paid for."""

import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from switchkd.encoding import EncodedSample, SampleEncoder
from switchkd.pipelines.backend import Backend
from switchkd.pipelines.capture_options import CacheOptions, check_options
from switchkd.pipelines.capture_worker import CaptureWorker, assemble
from switchkd.samples import BadSample, SampleFile
from switchkd.stores import Payload, StoreWriter
from switchkd.stores.codec import ranks_by_frequency
from switchkd.stores.info import describe
from switchkd.stores.manifest import Manifest
from switchkd.stores.place import Location

PROBE_SAMPLES = 64


@dataclass(frozen=True)
class Plan:
    """What a capture will take; all but `samples` and `free_bytes` are estimates from the probe."""

    samples: int
    usable_samples: int
    positions: int
    bytes_per_position: float
    store_bytes: int
    free_bytes: int | None  # where the store would lie; None if that is no local folder
    samples_per_second: float
    seconds: float  # one worker
    probed_samples: int


def plan(options: CacheOptions) -> Plan:
    """Run the teacher over a few random samples and scale up; writes nothing that stays.

    Raises:
        InputError: whatever would stop the capture itself.
    """
    check_options(options)
    worker = CaptureWorker(options)
    samples, manifest = worker.samples, worker.manifest
    chosen = np.random.default_rng(0).choice(len(samples), min(PROBE_SAMPLES, len(samples)), replace=False)
    found, seconds = _probe(
        worker.backend, worker.encoder, samples, sorted(chosen.tolist()), manifest, options.batch_size
    )
    payloads = [item[1] for item in found if not isinstance(item, BadSample)]
    positions_per_sample = sum(map(len, payloads)) / len(found)
    bytes_per_position = _measure_bytes(found, manifest)
    positions = round(positions_per_sample * len(samples))
    rate = len(found) / seconds
    return Plan(
        samples=len(samples),
        usable_samples=round(len(payloads) / len(found) * len(samples)),
        positions=positions,
        bytes_per_position=bytes_per_position,
        store_bytes=round(positions * bytes_per_position),
        free_bytes=_free_bytes(options.out),
        samples_per_second=rate,
        seconds=len(samples) / rate,
        probed_samples=len(found),
    )


_Found = list[tuple[EncodedSample, Payload] | BadSample]


def _probe(
    backend: Backend,
    encoder: SampleEncoder,
    samples: SampleFile,
    chosen: list[int],
    manifest: Manifest,
    batch_size: int,
) -> tuple[_Found, float]:
    """Capture the chosen samples in batches of similar length; returns them and the seconds it took, encoding included."""
    start = time.monotonic()
    encoded: list[EncodedSample | BadSample] = []
    for index in chosen:
        try:
            encoded.append(encoder.encode(samples[index]))
        except BadSample as bad:
            encoded.append(bad)
    usable = sorted((item for item in encoded if isinstance(item, EncodedSample)), key=lambda item: len(item.input_ids))
    reading = time.monotonic() - start
    found: _Found = [item for item in encoded if isinstance(item, BadSample)]
    if usable:
        backend.capture(
            usable[:1], manifest
        )  # the first pass allocates and compiles; it is not what the rest will cost
    start = time.monotonic()
    for first in range(0, len(usable), batch_size):
        batch = usable[first : first + batch_size]
        found += list(zip(batch, backend.capture(batch, manifest), strict=True))
    return found, reading + time.monotonic() - start


def _measure_bytes(found: _Found, manifest: Manifest) -> float:
    """Return the bytes a position takes on disk, from a throw-away store of the probe."""
    small = replace(manifest, samples=len(found), part_size=len(found))
    ids = [item[1].ids for item in found if not isinstance(item, BadSample)]
    known = [array.ravel() for array in ids if array is not None]
    table = ranks_by_frequency(np.concatenate([np.empty(0, np.int32), *known]), manifest.vocab_rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.zarr"
        StoreWriter(path, small, lambda: table).write_part(0, assemble(found, small))
        return describe(path).bytes_per_position


def _free_bytes(out: Location) -> int | None:
    """Return the free bytes of the file system that `out` will lie on."""
    if "://" in str(out):
        return None
    there = next(folder for folder in (Path(out), *Path(out).absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free
