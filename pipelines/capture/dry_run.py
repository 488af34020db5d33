"""`switchkd cache-teacher --dry-run`: estimate the time and disk space of a capture from a probe of random samples."""

import logging
import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from switchkd.counting import counted
from switchkd.data.encoded import EncodedSample
from switchkd.data.samples import BadSample
from switchkd.errors import CheckpointError
from switchkd.library_errors import words_of
from switchkd.pipelines.capture.backends.base import Backend
from switchkd.pipelines.capture.backends.open import check_available
from switchkd.pipelines.capture.backends.transformers_backend import TransformersBackend
from switchkd.pipelines.capture.backends.vllm_parity import LeftOut, seconds_with_transformers
from switchkd.pipelines.capture.failing_sample import capture_rows
from switchkd.pipelines.capture.manifest import resolve_payload, with_payload
from switchkd.pipelines.capture.options import BATCH_SIZES, CacheOptions
from switchkd.pipelines.capture.tables import head_spread, tables_of
from switchkd.pipelines.capture.worker import CaptureWorker, assemble
from switchkd.pipelines.run_folder import free_bytes
from switchkd.stores import Payload, StoreWriter, TeacherStore
from switchkd.stores.info import describe
from switchkd.stores.layout import HIDDEN_DTYPES
from switchkd.stores.manifest import Manifest

log = logging.getLogger(__name__)
HIDDEN_ERRORS = (0.01, 0.02, 0.04)  # the sizes that are told beside the requested one
PROBE_SAMPLES = 64  # minimum number of samples; two batches if that is more


@dataclass(frozen=True)
class Plan:
    """The cost of a capture; all fields except `samples` and `free_bytes` are estimates from the probe."""

    samples: int
    usable_samples: int
    positions: int
    payload: str  # the requested one, a key of `payload_bytes`
    trained_from: str  # the payload of `payload_bytes` that training reads of it
    payload_bytes: dict[str, float]  # bytes per position, of every payload that can be requested
    free_bytes: int | None  # on the store's file system; None if it is not a local folder
    samples_per_second: float
    seconds: float  # one worker
    devices: int  # of one worker
    on_gpu: bool
    probed_samples: int
    # Of all samples, on one device: a live teacher in one pass of training, and reading the store in one pass. A string says
    # why the former is not known.
    live_seconds: float | str
    read_seconds: float
    live_a_token: float | str | None = None  # seconds, where transformers was timed beside another backend

    @property
    def bytes_per_position(self) -> float:
        """Bytes per position of the requested payload."""
        return self.payload_bytes[self.payload]

    def store_bytes(self, payload: str | None = None) -> int:
        """Return the size of the store, with the requested payload or another."""
        return round(self.positions * self.payload_bytes[payload or self.payload])

    @property
    def paying_passes(self) -> float | None:
        """From how many passes on a store is cheaper than a live teacher, see `paying_passes`; None if that is not known."""
        if isinstance(self.live_seconds, str):
            return None
        return paying_passes(self.seconds * self.devices, self.live_seconds, self.read_seconds)

    @property
    def device_hours(self) -> float:
        """Device hours of the capture; independent of the number of workers."""
        return self.seconds * self.devices / 3600


def paying_passes(capture: float, live: float, read: float) -> float:
    """Return the smallest number n of passes, epochs times students, with capture + n·read < n·live; infinity if there is none.

    A pass is one epoch of one student. Only what differs counts: the step of the student, VSD and the LM heads are in both.

    Args:
        capture: device seconds of the capture, once. live, read: seconds of a pass that the live teacher's forward passes take,
            and that reading the store takes, as if nothing else ran beside it.
    """
    return math.inf if live <= read else math.floor(capture / (live - read)) + 1


def plan(options: CacheOptions, lender: CaptureWorker | None = None, live_a_token: float | str | None = None) -> Plan:
    """Run the teacher over a few random samples and extrapolate; leaves nothing on disk.

    The probe captures both payloads, so that each one's size is measured on the same positions.

    Args:
        lender: see `CaptureWorker`. live_a_token: of an earlier plan with the same teacher and backend.

    Raises:
        InputError: as the capture itself would raise.
    """
    check_available(options.backend, options.device)
    options = resolve_payload(options)
    worker = CaptureWorker(replace(options, payload="both"), lender=lender)
    samples, manifest = worker.samples, worker.manifest
    wanted = max(PROBE_SAMPLES, 2 * options.batch_size)
    chosen = np.random.default_rng(0).choice(len(samples), min(wanted, len(samples)), replace=False)
    bad, usable, reading = _encode(worker, sorted(chosen.tolist()))
    # Before vLLM's engine takes the device's memory; a teacher in transformers is loaded once for both.
    if options.backend == "vllm" and usable and live_a_token is None:
        live_a_token = _time_apart(worker, usable)
    payloads, seconds = _capture(worker, usable, options.batch_size)
    captured = list(zip((sample for _, sample in usable), payloads, strict=True))
    found: _Found = [*bad, *captured]
    live: float | str
    if options.backend != "vllm":
        live = _time_live(worker.backend, [sample for _, sample in usable], options.batch_size)
    elif isinstance(live_a_token, str):
        live = live_a_token
    else:
        live = (live_a_token or 0.0) * sum(len(sample.input_ids) for _, sample in usable)
    positions_per_sample = sum(map(len, payloads)) / len(found)
    assert options.payload is not None
    requested = with_payload(manifest, options.payload)
    read = with_payload(manifest, "hidden") if requested.payload == "both" else requested
    kinds = {_payload_name(kind): kind for kind in [*_kinds(manifest), read, requested]}
    spread = head_spread(worker.checkpoint, manifest)
    rate = len(found) / (reading + seconds)
    measured = {name: _measure(found, kind, spread) for name, kind in kinds.items()}
    read_seconds = measured[_payload_name(read)][1]
    return Plan(
        samples=len(samples),
        usable_samples=round(len(usable) / len(found) * len(samples)),
        positions=round(positions_per_sample * len(samples)),
        payload=_payload_name(requested),
        trained_from=_payload_name(read),
        payload_bytes={name: size for name, (size, _) in measured.items()},
        free_bytes=None if "://" in str(options.out) else free_bytes(Path(options.out)),
        samples_per_second=rate,
        seconds=len(samples) / rate,
        devices=options.tensor_parallel,
        on_gpu=options.device != "cpu" or (options.backend == "vllm" and torch.cuda.is_available()),
        probed_samples=len(found),
        live_seconds=live if isinstance(live, str) else live * len(samples) / len(found),
        read_seconds=read_seconds * len(samples) / len(found),
        live_a_token=live_a_token,
    )


def _payload_name(manifest: Manifest) -> str:
    dtype = f"steps {manifest.hidden_error:g}" if manifest.hidden_dtype == "steps" else manifest.hidden_dtype
    return f"{manifest.payload}, {dtype}" if manifest.has_hidden else manifest.payload


def _kinds(both: Manifest) -> list[Manifest]:
    """Return the manifests of the payloads to choose from: topk, and hidden in every form."""
    states = with_payload(both, "hidden")
    return [
        with_payload(both, "topk"),
        *(replace(states, hidden_dtype="steps", hidden_error=error) for error in HIDDEN_ERRORS),
        *(replace(states, hidden_dtype=dtype, hidden_error=0.0) for dtype in HIDDEN_DTYPES if dtype != "steps"),
    ]


_Found = list[tuple[EncodedSample, Payload] | BadSample]


def _encode(worker: CaptureWorker, chosen: list[int]) -> tuple[list[BadSample], list[tuple[int, EncodedSample]], float]:
    """Return (those of the chosen samples that cannot be used; row and encoding of the others, by length; the seconds it took)."""
    start = time.monotonic()
    usable: list[tuple[int, EncodedSample]] = []
    unusable: list[BadSample] = []
    for index in chosen:
        try:
            usable.append((index, worker.encode(worker.samples[index])))
        except BadSample as bad:
            unusable.append(bad)
    usable.sort(key=lambda pair: len(pair[1].input_ids))
    return unusable, usable, time.monotonic() - start


def _capture(
    worker: CaptureWorker, usable: list[tuple[int, EncodedSample]], batch_size: int
) -> tuple[list[Payload], float]:
    """Capture samples in batches of similar length; returns their payloads and the seconds it took."""

    def capture(batch: list[tuple[int, EncodedSample]]) -> list[Payload]:
        return capture_rows(worker.backend, worker.manifest, worker.checkpoint.path, batch)

    if usable:
        capture(usable[:1])  # not timed: the first pass also allocates and compiles
    start = time.monotonic()
    batches = [usable[first : first + batch_size] for first in range(0, len(usable), batch_size)]
    payloads = [payload for batch in batches for payload in capture(batch)]
    return payloads, time.monotonic() - start


def _time_live(backend: Backend, encoded: list[EncodedSample], batch_size: int) -> float:
    """Return the seconds of the teacher's forward passes over the probe in its batches."""
    assert isinstance(backend, TransformersBackend)
    start = time.monotonic()
    for first in range(0, len(encoded), batch_size):
        backend.run_only(encoded[first : first + batch_size])
    return time.monotonic() - start


def _time_apart(worker: CaptureWorker, usable: list[tuple[int, EncodedSample]]) -> float | str:
    """Return the seconds a token with transformers, which runs a live teacher in training, or why that is not known.

    A part of the probe is run, evenly chosen by length, in a process of its own.
    """
    some = [sample for _, sample in usable[:: -(-len(usable) // PROBE_SAMPLES)]]
    dtype = worker.manifest.teacher["dtype"]
    log.info("running %s with transformers, for the time of a live teacher", counted(len(some), "sample"))
    try:
        seconds = seconds_with_transformers(worker.checkpoint, dtype, some, BATCH_SIZES["transformers"])
    except (LeftOut, CheckpointError) as reason:
        return str(reason)
    except (
        RuntimeError,
        MemoryError,
    ) as error:  # what else may go wrong there, as without enough memory, ends no dry run of vLLM
        return words_of(error)
    return seconds / sum(len(sample.input_ids) for sample in some)


def _measure(found: _Found, manifest: Manifest, spread: NDArray[np.float64]) -> tuple[float, float]:
    """Return (bytes per position on disk, seconds of reading the samples one by one), from a temporary store of the probe."""
    small = replace(manifest, samples=len(found), part_size=len(found))
    payloads = [item[1] for item in found if not isinstance(item, BadSample)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.zarr"
        StoreWriter(path, small, lambda: tables_of(payloads, small, spread)).write_part(0, assemble(found, small))
        store, start = TeacherStore.open(path), time.monotonic()
        for index in np.random.default_rng(0).permutation(len(found)).tolist():
            store.payload([index])
        return describe(path).bytes_per_position, time.monotonic() - start
