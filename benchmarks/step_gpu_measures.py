"""What `step_gpu.py` measures in one cell: a step, its parts, the rate of products, the checks of kernels."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from step_gpu_cells import KERNELS, SCALES, Bench, Cell

from switchkd.losses import fused
from switchkd.losses.lm_head import LMHead
from switchkd.losses.objective import Objective
from switchkd.models.components import language_model_of, tower_of
from switchkd.models.varlen_attention import check_kernel
from switchkd.pipelines.training.step_ways import experimental
from switchkd.pipelines.training.step_ways.fp8_teacher import FP8, check_fp8
from switchkd.pipelines.training.step_ways.transfers import on_device
from switchkd.pipelines.training.trainer import SwitchTrainer


def wait(device: str) -> None:
    """Wait until the device's work is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure_peak(device: str, size: int) -> dict[str, Any]:
    """Return the rate of a product of two square matrices in bfloat16 and in float8 by rows, TFLOP/s: the best of 20.

    A device without float8 products gives the error instead of their rate.
    """
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    ones = torch.ones(size, 1, device=device)
    found: dict[str, Any] = {"tflops": 2 * size**3 / best_seconds(lambda: torch.mm(a, b), device) / 1e12}
    try:
        eighth = a.to(FP8), b.to(FP8)
        product = partial(torch._scaled_mm, scale_a=ones, scale_b=ones.t(), out_dtype=torch.bfloat16)
        seconds = best_seconds(lambda: product(eighth[0], eighth[1].t()), device)
        found["fp8_tflops"] = 2 * size**3 / seconds / 1e12
    except RuntimeError as error:
        found["fp8_failed"] = str(error)[:160]
    return found


def best_seconds(call: Callable[[], Any], device: str) -> float:
    """Return the shortest of 20 times of a call with the device's work done."""
    best = float("inf")
    for _ in range(20):
        wait(device)
        start = time.perf_counter()
        call()
        wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def measure_transfer(batch: dict[str, torch.Tensor], device: str) -> dict[str, Any]:
    """Return the bytes of a batch's columns, and seconds of their copy from pinned memory; without a GPU there is no such copy."""
    found: dict[str, Any] = {"batch_bytes": sum(column.nbytes for column in batch.values())}
    if device == "cuda":
        columns = {name: column.cpu().pin_memory() for name, column in batch.items()}
        found["transfer_seconds"] = best_seconds(lambda: on_device(columns, torch.device(device)), device)
    return found


def check_kernels(device: str) -> dict[str, Any]:
    """Return what the checks before a run say of each kernel on this device."""
    found: dict[str, Any] = {}
    checks = (check_kernel, experimental.check_selection, check_fp8)
    for name, check in zip(KERNELS, checks, strict=True):
        try:
            check(torch.device(device))
            found[name] = "equals its reference"
        except Exception as error:  # whatever it is: it is the result
            found[name] = f"{type(error).__name__}: {error}"[:200]
    return found


def measure_step(bench: Bench, steps: int) -> dict[str, Any]:
    """Return median seconds of a step, peak bytes above what is held between steps, FLOP, and what was compiled."""
    bench.step()  # the optimizer's state is made, kernels are chosen, layers are compiled
    bench.step()
    times = []
    held = peak = 0
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    for _ in range(steps):
        wait(bench.device)
        start = time.perf_counter()
        bench.step()
        wait(bench.device)
        times.append(time.perf_counter() - start)
    if bench.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    found = {"seconds": statistics.median(times), "flops": bench.flops(), "held": held, "peak": peak}
    found |= measure_transfer(bench.batch, bench.device)
    return found | (experimental.compilations() if bench.cell.way.compiled else {})


class Parts:
    """Time of each part of steps: CUDA events on a GPU, else the clock."""

    def __init__(self, device: str) -> None:
        self.device, self.spans = device, list[tuple[str, Any, Any]]()

    def _now(self) -> Any:
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Time what runs inside the block."""
        start = self._now()
        yield
        self.spans.append((part, start, self._now()))

    def wrap(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that times each call."""

        def timed(*given: Any, **named: Any) -> Any:
            with self.timed(part):
                return call(*given, **named)

        return timed

    def seconds(self) -> dict[str, float]:
        """Return the sum of each part's spans."""
        wait(self.device)
        found: dict[str, float] = {}
        for part, start, end in self.spans:
            took = end - start if self.device != "cuda" else start.elapsed_time(end) / 1e3
            found[part] = found.get(part, 0.0) + took
        return found


def measure_profile(bench: Bench, steps: int) -> dict[str, Any]:
    """Return seconds a step of each part. What is inside another part is subtracted from it, so that parts add up to the step."""
    bench.step()
    bench.step()
    parts, student = Parts(bench.device), bench.student
    with ExitStack() as stack:
        for part, module in (
            ("vision tower", tower_of(student)),
            ("student's language model", language_model_of(student)),
        ):
            stack.enter_context(patch.object(module, "forward", parts.wrap(part, module.forward)))
        for part, owner, name in (
            ("switch pathway", SwitchTrainer, "_switch_states"),
            ("loss", Objective, "fused"),
            ("products of the LM heads", LMHead, "product"),
            ("products of the LM heads", fused._Gradients, "add"),
            ("products of the LM heads", fused._Gradients, "add_switch"),
        ):
            stack.enter_context(patch.object(owner, name, parts.wrap(part, getattr(owner, name))))
        for _ in range(steps):
            with parts.timed("step"):
                bench.step(parts.timed)
    found = {part: took / steps for part, took in parts.seconds().items()}
    inside = ("vision tower", "student's language model", "switch pathway", "loss")
    found["rest of the forward pass"] = found.pop("forward") - sum(found.get(part, 0.0) for part in inside)
    found["loss beside the products"] = found.pop("loss") - found["products of the LM heads"]
    found["rest of the step"] = found["step"] - sum(took for part, took in found.items() if part != "step")
    return {"parts": found, "seconds": found["step"]}


def run_cell(cell: Cell, scale: str, device: str) -> dict[str, Any]:
    """Measure one cell in this process."""
    steps = 5 if scale == "real" else 1
    if cell.kind == "peak":
        return measure_peak(device, 8192 if scale == "real" else 64)
    if cell.kind == "kernels":
        return check_kernels(device)
    bench = Bench(cell, SCALES[scale], device)
    return (measure_profile if cell.kind == "profile" else measure_step)(bench, steps)
