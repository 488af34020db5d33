"""What the benchmarks of losses and steps share: how a run is measured, and DBiLD as its equations are written.

A run on a CPU is a forked process, so that nothing is left over from the one before. Time is the process's CPU time, which other
load on the machine disturbs least; memory is the peak of what torch allocated above what was there at the start.
"""

import json
import os
import statistics
from collections.abc import Callable
from time import process_time

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from switchkd.losses.selection import leading_entries


def measure(work: Callable[[], object], warm_ups: int = 0, repeats: int = 1) -> float:
    """Run `work` in a forked process, one thread: median CPU seconds."""

    def times() -> float:
        found = []
        for number in range(warm_ups + repeats):
            start = process_time()
            work()
            if number >= warm_ups:
                found.append(process_time() - start)
        return statistics.median(found)

    return _forked(times)


def peak_bytes(work: Callable[[], object]) -> float:
    """Run `work` in a forked process: most bytes that torch held above what it held before."""
    return _forked(lambda: peak_here(work))


def peak_here(work: Callable[[], object]) -> int:
    """`peak_bytes` in this process; what `work` returns is still held at the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]).cumsum(0)
    del kept
    return int(held.max())


def _forked(work: Callable[[], float]) -> float:
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            os.write(write, json.dumps(work()).encode())
        finally:
            os._exit(0)  # whatever happened: this is not the process that was started
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    found: float = json.loads(text)
    return found


def dbild_of_pairs(student: Tensor, teacher: Tensor, temperature: float = 3.0) -> Tensor:
    """DBiLD, reverse KL, summed over positions, from all pairs of differences (eqs. 12-15); [T, N] each."""
    total = student.new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        for leader in (t, s.detach()):
            ids, k = leading_entries(leader.unsqueeze(0))
            first, second = torch.triu_indices(int(k), int(k), offset=1)
            p, q = (((z[ids[0]][first] - z[ids[0]][second]) / temperature).log_softmax(0) for z in (s, t))
            total = total + (p.exp() * (p - q)).sum()
    return total
