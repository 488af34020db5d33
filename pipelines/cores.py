"""The cores that this process may use, and how many further processes it should start to prepare samples."""

import math
import os
from pathlib import Path

# Of the cores of one training process: those that its step keeps busy (Python, the launch of kernels, the pinning of batches).
STEP_CORES = 2
MOST_WORKERS = 8  # for each training process; more of them rarely help, and each holds batches in memory
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def measured() -> int:
    """Return how many cores this process may use: its affinity (Slurm, taskset), and the quota of its container."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        here = min(here, max(1, math.floor(int(quota) / int(period))))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return here


cores = measured


def workers_beside(step_processes: int) -> int:
    """Return how many workers prepare samples beside each of `step_processes` processes of this machine that run a model.

    0 where a process has fewer than four cores: there a worker takes from the step what it saves (docs/training.md).
    """
    own = cores() // max(step_processes, 1)
    return 0 if own < 2 * STEP_CORES else min(own - STEP_CORES, MOST_WORKERS)


def workers_alone() -> int:
    """Return how many workers inspect samples where nothing else runs; 0 for a single core."""
    return 0 if cores() == 1 else min(cores(), 2 * MOST_WORKERS)


def local_processes() -> int:
    """Return how many processes of this job torchrun started on this machine; 1 without it."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return int(text) if text.isdecimal() else 1
