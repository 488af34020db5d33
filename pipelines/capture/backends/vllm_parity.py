"""Transformers beside vLLM: comparison of final states before a store has a part, and the time of a live teacher for a dry run.

The teacher runs with transformers in a process of its own, which ends before vLLM's engine starts: so its memory is free again, and
this process has not touched a device, which would keep vLLM from forking.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from switchkd.data.encoded import EncodedSample
from switchkd.errors import CheckpointError
from switchkd.fingerprints import weight_files
from switchkd.models.checkpoint import Checkpoint
from switchkd.pipelines.capture.backends.base import Backend
from switchkd.pipelines.capture.backends.transformers_backend import TransformersBackend
from switchkd.stores import Manifest

# The largest median over the positions of |states of vLLM - states of transformers| / |states of transformers|. Float32 was
# measured below 1e-4 in every family; the others are rounding through a deep model, below what another mask, other positions or
# pixels that are normalised twice do (0.3 and more). The median, since an expert of a mixture may be chosen otherwise at a tie.
TOLERANCES = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.15}
ROOM = 1.25  # times the weights: activations of a few samples
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

Found = TypeVar("Found")
States = list[NDArray[np.float32]]  # of each sample, [positions, d]


class LeftOut(Exception):
    """Transformers cannot run the teacher here; says why."""


def states_with_transformers(
    checkpoint: Checkpoint, dtype: str, samples: Sequence[EncodedSample], manifest: Manifest
) -> States:
    """Return the final states of samples from transformers, in a process of its own.

    Args:
        dtype: "float32", "bfloat16" or "float16", of the teacher as vLLM will run it. manifest: of the store.

    Raises:
        LeftOut: the weights are quantised, or do not fit into the memory of one device (without a GPU, of this machine).
        CheckpointError: the weights cannot be loaded.
    """
    return _apart(_states, checkpoint, dtype, list(samples), manifest)


def seconds_with_transformers(
    checkpoint: Checkpoint, dtype: str, samples: Sequence[EncodedSample], batch_size: int
) -> float:
    """Return the seconds that transformers' forward passes over samples take in batches, in a process of its own.

    Args:
        dtype: as above. samples: at least one.

    Raises:
        LeftOut, CheckpointError: as above.
    """
    return _apart(_seconds, checkpoint, dtype, list(samples), batch_size)


def _apart(work: Callable[..., Found], checkpoint: Checkpoint, *arguments: object) -> Found:
    """Call `work` in a process of its own. Raises LeftOut."""
    if getattr(checkpoint.config, "quantization_config", None) is not None:
        raise LeftOut("its weights are quantised, and transformers would run others")
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        try:
            return process.submit(work, checkpoint, *arguments).result()
        except BrokenProcessPool:
            raise LeftOut("the process that ran it with transformers was killed, as where memory runs out") from None


def _states(checkpoint: Checkpoint, dtype: str, samples: list[EncodedSample], manifest: Manifest) -> States:
    return hidden_states(_teacher(checkpoint, dtype), samples, manifest)


def _seconds(checkpoint: Checkpoint, dtype: str, samples: list[EncodedSample], batch_size: int) -> float:
    backend = _teacher(checkpoint, dtype)
    backend.run_only(samples[:1])  # not timed: the first pass also allocates and compiles
    start = time.monotonic()
    for first in range(0, len(samples), batch_size):
        backend.run_only(samples[first : first + batch_size])
    return time.monotonic() - start


def _teacher(checkpoint: Checkpoint, dtype: str) -> TransformersBackend:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    needed, free = ROOM * _weight_bytes(checkpoint, dtype), _free_bytes(device)
    if needed > free:
        raise LeftOut(f"it takes {needed / 1e9:.1f} GB with transformers, and {free / 1e9:.1f} GB are free on {device}")
    return TransformersBackend(checkpoint, device, dtype)


def hidden_states(backend: Backend, samples: Sequence[EncodedSample], manifest: Manifest) -> States:
    """Return the final states of samples from a backend, whatever payload the manifest names."""
    wanted = replace(manifest, payload="hidden", top_k=0)
    found: States = []
    for sample in samples:
        (payload,) = backend.capture([sample], wanted)
        assert payload.hidden is not None
        found.append(np.asarray(payload.hidden, np.float32))
    return found


def check_parity(checkpoint: Checkpoint, dtype: str, states: States, expected: States) -> float:
    """Compare the final states of a few samples; returns the median relative difference.

    Raises:
        CheckpointError: it is above the dtype's tolerance; names both.
    """
    distances = [np.linalg.norm(one - other, axis=-1) for one, other in zip(states, expected, strict=True)]
    sizes = [np.linalg.norm(other, axis=-1) for other in expected]
    relative = float(np.median(np.concatenate(distances) / np.concatenate(sizes)))
    if not relative <= TOLERANCES[dtype]:
        raise CheckpointError(
            f"{checkpoint.path}: vLLM's final states differ from transformers' by {relative:.2g} of their size (median over "
            f"{sum(map(len, sizes))} positions), expected at most {TOLERANCES[dtype]:g} in {dtype}: vLLM would be another "
            "teacher. Use --backend transformers; --check 0 leaves this comparison out"
        )
    return relative


def _weight_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    on_disk = sum(path.stat().st_size for path in weight_files(checkpoint.path))
    return on_disk * BYTES[dtype] // BYTES.get(checkpoint.resolve_dtype("auto"), 4)


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    with open("/proc/meminfo", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
