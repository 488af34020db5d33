"""`switchkd cache-teacher --dry-run`: estimate the time and disk space of a capture from a probe of random samples."""

import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from switchkd.data.encoding import EncodedSample, SampleEncoder
from switchkd.data.samples import BadSample, SampleFile
from switchkd.pipelines.capture.backends.base import Backend
from switchkd.pipelines.capture.backends.open import check_available
from switchkd.pipelines.capture.options import CacheOptions
from switchkd.pipelines.capture.worker import CaptureWorker, assemble
from switchkd.settings import StoreLocation
from switchkd.stores import Payload, StoreWriter
from switchkd.stores.codec import ranks_by_frequency
from switchkd.stores.info import describe
from switchkd.stores.layout import HIDDEN_DTYPES
from switchkd.stores.manifest import Manifest

PROBE_SAMPLES = 64  # minimum number of samples; two batches if that is more


@dataclass(frozen=True)
class Plan:
    """The cost of a capture; all fields except `samples` and `free_bytes` are estimates from the probe."""

    samples: int
    usable_samples: int
    positions: int
    payload: str  # the requested one, a key of `payload_bytes`
    payload_bytes: dict[str, float]  # bytes per position, of every payload that can be requested
    free_bytes: int | None  # on the store's file system; None if it is not a local folder
    samples_per_second: float
    seconds: float  # one worker
    devices: int  # of one worker
    on_gpu: bool
    probed_samples: int

    @property
    def bytes_per_position(self) -> float:
        """Bytes per position of the requested payload."""
        return self.payload_bytes[self.payload]

    def store_bytes(self, payload: str | None = None) -> int:
        """Return the size of the store, with the requested payload or another."""
        return round(self.positions * self.payload_bytes[payload or self.payload])

    @property
    def device_hours(self) -> float:
        """Device hours of the capture; independent of the number of workers."""
        return self.seconds * self.devices / 3600


def plan(options: CacheOptions) -> Plan:
    """Run the teacher over a few random samples and extrapolate; leaves nothing on disk.

    The probe captures both payloads, so that each one's size is measured on the same positions.

    Raises:
        InputError: as the capture itself would raise.
    """
    check_available(options.backend, options.device)
    worker = CaptureWorker(replace(options, payload="both"))
    samples, manifest = worker.samples, worker.manifest
    wanted = max(PROBE_SAMPLES, 2 * options.batch_size)
    chosen = np.random.default_rng(0).choice(len(samples), min(wanted, len(samples)), replace=False)
    found, seconds = _probe(
        worker.backend, worker.encoder, samples, sorted(chosen.tolist()), manifest, options.batch_size
    )
    payloads = [item[1] for item in found if not isinstance(item, BadSample)]
    positions_per_sample = sum(map(len, payloads)) / len(found)
    rate = len(found) / seconds
    return Plan(
        samples=len(samples),
        usable_samples=round(len(payloads) / len(found) * len(samples)),
        positions=round(positions_per_sample * len(samples)),
        payload=_payload_name(options.payload, options.hidden_dtype),
        payload_bytes={name: _measure_bytes(found, kind) for name, kind in _kinds(manifest, options).items()},
        free_bytes=_free_bytes(options.out),
        samples_per_second=rate,
        seconds=len(samples) / rate,
        devices=options.tensor_parallel,
        on_gpu=options.device != "cpu" or (options.backend == "vllm" and torch.cuda.is_available()),
        probed_samples=len(found),
    )


def _payload_name(payload: str, hidden_dtype: str) -> str:
    return payload if payload == "topk" else f"{payload}, {hidden_dtype}"


def _kinds(both: Manifest, options: CacheOptions) -> dict[str, Manifest]:
    """Return the manifests of the payloads to choose from: topk, hidden in every dtype, and the requested one."""
    kinds = {"topk": replace(both, payload="topk", hidden_dtype="", hidden_width=0)}
    for dtype in HIDDEN_DTYPES:
        kinds[_payload_name("hidden", dtype)] = replace(
            both, payload="hidden", top_k=0, fine=0.0, coarse=0.0, hidden_dtype=dtype
        )
    if options.payload == "both":
        kinds[_payload_name("both", options.hidden_dtype)] = both
    return kinds


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
        backend.capture(usable[:1], manifest)  # not timed: the first pass also allocates and compiles
    start = time.monotonic()
    for first in range(0, len(usable), batch_size):
        batch = usable[first : first + batch_size]
        found += list(zip(batch, backend.capture(batch, manifest), strict=True))
    return found, reading + time.monotonic() - start


def _measure_bytes(found: _Found, manifest: Manifest) -> float:
    """Return the bytes per position on disk, from a temporary store of the probe."""
    small = replace(manifest, samples=len(found), part_size=len(found))
    ids = [item[1].ids for item in found if not isinstance(item, BadSample)]
    known = [array.ravel() for array in ids if array is not None]
    table = ranks_by_frequency(np.concatenate([np.empty(0, np.int32), *known]), manifest.vocab_rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.zarr"
        StoreWriter(path, small, lambda: table).write_part(0, assemble(found, small))
        return describe(path).bytes_per_position


def _free_bytes(out: StoreLocation) -> int | None:
    """Return the free bytes of the file system of `out`."""
    if "://" in str(out):
        return None
    there = next(folder for folder in (Path(out), *Path(out).absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free
