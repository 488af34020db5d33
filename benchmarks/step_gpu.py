"""Training steps on a GPU, cell by cell: every way of running one, its parts, and its share of the device's peak.

    make bench-gpu     # python benchmarks/step_gpu.py: measures for up to nine minutes, then writes docs/step-gpu-table.md; run it
                       # again to go on. What was measured is kept in build/bench-gpu.json

Models have the sizes of Qwen2.5-3B, Qwen2.5-0.5B and SigLIP-SO400M, random weights, 729 image tokens; a batch has answers of 16
to 192 tokens and one text-only sample. A step is forward, backward and fused AdamW. Each cell runs in a process of its own: one
that runs out of memory, or fails, is recorded as such. Times are medians of wall time with the device's work done.

Ways: *as before* (padded, autocast, torch's selection), and what `--packing` with `--experimental` and `--precision
bfloat16-copies` adds to it. *Live*: the whole teacher in every step, in the same engine. *LLaVA-KD's manner*: the whole teacher,
padded, under autocast, whole logits of all rows of both models; with our linear-time DBiLD, since all pairs of a real vocabulary
take minutes.

MFU counts the FLOP of tokens and patches that are not padding, each part by itself (`cost_model.py`), over the rate of a product
of two bfloat16 matrices measured by the same command. Attention counts all pairs of a sample's tokens, not half of them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import step
import torch
from torch import Tensor
from transformers import TrainingArguments

from switchkd.losses import dbild_loss, fused
from switchkd.losses.lm_head import LMHead
from switchkd.losses.objective import Objective
from switchkd.losses.selection import use_kernels
from switchkd.models.components import language_model_of, tower_of
from switchkd.models.packing import layout, pack_rows
from switchkd.models.packing_probe import enable_packing_in
from switchkd.models.varlen_attention import check_kernel
from switchkd.pipelines.stored_teacher import StoredHidden
from switchkd.pipelines.training.cost_model import CostModel, Work
from switchkd.pipelines.training.live.teacher_source import LiveTeacher
from switchkd.pipelines.training.step_ways import experimental
from switchkd.pipelines.training.step_ways.half_copies import HalfCopies
from switchkd.pipelines.training.trainer import SwitchTrainer

ROOT = Path(__file__).parent.parent
MINUTES = 9
TINY = step.Scale(step.small_text(64, 2), step.small_text(64, 2), step.vision_config(32, 2, 2, 64, 32, 8), 4, 8, (2, 6))
SCALES = {"real": step.SCALES["cuda"], "tiny": TINY}
ROW_TOKENS = 1 << 20  # one row holds a batch
LIVE, LLAVA_KD = "live teacher", "LLaVA-KD's manner"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Way:
    """How a step runs; the words are those of `switchkd train`'s options."""

    name: str
    packed: bool = False
    varlen: bool = False
    copies: bool = False
    triton: bool = False
    compiled: bool = False


BEFORE = Way("as before")
BEST = Way("packed, varlen, copies, triton", True, True, True, True)
WAYS = (
    BEFORE,
    Way("packed, loop", True),
    Way("packed, varlen", True, True),
    Way("packed, varlen, copies", True, True, True),
    BEST,
    Way("packed, varlen, copies, triton, compiled", True, True, True, True, True),
)
OBJECTIVES = ("with", "without", "SFT")  # the switch pathway


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    kind: str  # "peak", "kernels", "step", "profile", "live teacher", "LLaVA-KD's manner"
    way: Way = BEFORE
    objective: str = "with"
    batch: int = 16

    @property
    def key(self) -> str:
        """Name in the file of results."""
        return f"{self.kind}; {self.way.name}; {self.objective}; {self.batch}"


def cells(batches: tuple[int, ...]) -> list[Cell]:
    """Return all cells, the most telling first."""
    first, *others = batches
    found = [Cell("peak"), Cell("kernels")]
    found += [Cell("step", way, objective, first) for way in (BEFORE, BEST) for objective in OBJECTIVES]
    found += [Cell("profile", way, "with", first) for way in (BEFORE, BEST)]
    found += [
        Cell(kind, BEST if kind == LIVE else BEFORE, o, b)
        for kind in (LLAVA_KD, LIVE)
        for b in batches
        for o in OBJECTIVES[:2]
    ]
    found += [Cell("step", BEST, objective, batch) for batch in others for objective in OBJECTIVES]
    found += [Cell("step", way, o, first) for way in WAYS if way not in (BEFORE, BEST) for o in OBJECTIVES]
    found += [Cell("step", BEFORE, objective, batch) for batch in others for objective in OBJECTIVES]
    return found


class Bench:
    """Models and a batch of one cell, on their device.

    Args:
        scale: sizes. device: "cuda" or "cpu".
    """

    def __init__(self, cell: Cell, scale: step.Scale, device: str) -> None:
        torch.manual_seed(0)
        self.cell, self.device = cell, device
        self.scale = scale = replace(scale, samples=cell.batch)
        live = cell.kind in (LIVE, LLAVA_KD)
        kind = step.LlavaForConditionalGeneration if live else step.LlavaWithoutVision
        with torch.device(device):
            self.student = step.make_llava(scale.vision, scale.student, step.LlavaForConditionalGeneration).train()
            self.teacher = step.freeze(step.make_llava(scale.vision, scale.teacher, kind).bfloat16())
        self.teacher.lm_head.weight.data.mul_(8)  # random weights of the usual size say nothing
        self.batch = {name: column.to(device) for name, column in self._batch().items()}
        way = cell.way
        use_kernels("triton" if way.triton and device == "cuda" else "torch")
        if way.packed:
            for model in (self.student, self.teacher):
                enable_packing_in(model, "the benchmark's", varlen=way.varlen)
        if way.compiled:
            experimental.compile_layers(self.student, self.teacher)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-6, fused=True)
        self.copies = HalfCopies(self.student, self.optimizer) if way.copies else None
        self.objective = (
            Objective(switch=cell.objective == "with") if cell.objective != "SFT" else Objective("sft", switch=False)
        )
        self.trainer = self._trainer(live)

    def _batch(self) -> dict[str, Tensor]:
        """Make the collator's columns: `step.make_batch`, stored states, and layouts of rows."""
        batch = step.make_batch(self.scale)
        shown, text = batch["has_image"], batch["attention_mask"].sum(-1)
        positions = int((batch["labels"][:, 1:] != step.IGNORED).sum())
        width = self.scale.teacher.hidden_size
        batch["teacher_hidden"] = torch.randn(positions, width, generator=torch.Generator().manual_seed(1)) * 2
        if self.cell.way.packed:
            lengths, order = text.tolist(), range(len(text))
            room = {"input_ids": 0, "attention_mask": 0, "labels": step.IGNORED}
            batch |= {name: torch.nn.functional.pad(batch[name], (0, 1), value=value) for name, value in room.items()}
            width = batch["input_ids"].shape[1]
            # The samples stay in order, so that positions and images do.
            assert len(pack_rows(lengths, ROW_TOKENS)) == 1
            batch["packing"] = layout([list(order)], lengths, width)
            seen = text[shown].tolist()
            batch["switch_packing"] = layout([list(range(len(seen)))], seen, width)
        return batch

    def _trainer(self, live: bool) -> SwitchTrainer:
        rows = self.scale.student.vocab_size
        source: Any = None
        if self.objective.needs_teacher:
            head = self.teacher.lm_head.weight
            source = LiveTeacher(self.teacher, rows) if live else StoredHidden(head, rows, exact_knee=False)
        arguments = TrainingArguments(
            tempfile.mkdtemp(), use_cpu=self.device == "cpu", report_to="none", remove_unused_columns=False
        )
        teacher = self.teacher if self.objective.switch else None
        return SwitchTrainer(
            objective=self.objective, source=source, teacher=teacher, model=self.student, args=arguments
        )

    def loss(self) -> Tensor:
        """Return the loss of the batch, with graph."""
        if self.cell.kind != LLAVA_KD:
            found: Tensor = self.trainer.compute_loss(self.student, dict(self.batch))
            return found
        old = step.Bench.__new__(step.Bench)  # its way of a live teacher, with these models
        old.student, old.teacher, old.batch, old.vocabulary = (
            self.student,
            self.teacher,
            self.batch,
            self.scale.student.vocab_size,
        )
        old.rows = step.predicting_rows(self.batch["labels"])
        return old.live(partial(dbild_loss, reduction="sum"), self.objective.switch)

    def step(self, timed: Callable[[str], Any] = lambda part: nullcontext()) -> None:
        """Forward, backward, update; `timed(part)` encloses each part."""
        self.optimizer.zero_grad()
        with self.copies.in_place() if self.copies is not None else nullcontext():
            with timed("forward"), torch.autocast(self.device, torch.bfloat16, enabled=self.copies is None):
                loss = self.loss()
            with timed("backward"):
                loss.backward()
        with timed("optimizer"):
            self.optimizer.step()

    def flops(self) -> float:
        """Return the FLOP of a step, without padding."""
        lengths, shown = self.batch["attention_mask"].sum(-1).double(), self.batch["has_image"]
        positions = (self.batch["labels"] != step.IGNORED).sum(-1).double()
        sums = [lengths, lengths**2, shown.double(), lengths[shown], lengths[shown] ** 2, positions, positions[shown]]
        needs = self.objective.needs_teacher
        live = self.teacher if self.cell.kind in (LIVE, LLAVA_KD) and needs else None
        head = self.teacher.lm_head.weight.numel() if needs and live is None else 0
        model = CostModel(
            self.student, self.teacher if self.objective.switch else None, live, head, self.scale.image_tokens
        )
        return model.flops(Work(*(float(each.sum()) for each in sums)))


def wait(device: str) -> None:
    """Wait until the device's work is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure_peak(device: str, size: int) -> dict[str, float]:
    """Return the rate of a product of two square bfloat16 matrices, TFLOP/s: the best of 20."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(20):
        wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        wait(device)
        best = min(best, time.perf_counter() - start)
    return {"tflops": 2 * size**3 / best / 1e12}


def check_kernels(device: str) -> dict[str, Any]:
    """Return what the checks before a run say of each kernel on this device."""
    found: dict[str, Any] = {}
    for name, check in (("varlen-attention", check_kernel), ("triton-selection", experimental.check_selection)):
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


def in_a_process(cell: Cell, scale: str, device: str, seconds: float) -> dict[str, Any]:
    """Measure one cell in a process of its own; what ends it is the result. Raises TimeoutExpired."""
    command = [
        sys.executable,
        __file__,
        "--cell",
        cell.key,
        "--scale",
        scale,
        "--device",
        device,
        "--batches",
        str(cell.batch),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return {"failed": "does not fit" if "OutOfMemory" in done.stderr else f"failed: {last[:160]}"}


def describe(device: str) -> dict[str, str]:
    """Return the device and the versions that results belong to."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    import transformers

    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def table(results: dict[str, Any], about: dict[str, str], batches: tuple[int, ...], made_by: str) -> list[str]:
    """Return the tables of all results, with "not measured" where there is none."""
    peak = results.get(Cell("peak").key, {}).get("tflops")
    lines = [
        f"{about['device']}, torch {about['torch']}, transformers {about['transformers']}, bfloat16; a large product of matrices: "
        f"{f'{peak:,.0f} TFLOP/s' if peak else NOT_MEASURED}; made by `{made_by}`.",
        "",
        "| kernel | check before a run |",
        "| --- | --- |",
    ]
    kernels = results.get(Cell("kernels").key, {})
    lines += [f"| {name} | {kernels.get(name, NOT_MEASURED)} |" for name in ("varlen-attention", "triton-selection")]
    lines += [
        "",
        "A step, at the batch with the least time a sample. Memory a sample is what a step adds to what is held between steps.",
        "",
        "| switch | way | batch | ms a step | ms a sample | times as fast as before | MFU | memory a sample, MB "
        "| graphs compiled, frames not |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for objective in OBJECTIVES:
        base = best_of(results, "step", BEFORE, objective, batches)
        rows = [("step", way, way.name) for way in WAYS]
        rows += [] if objective == "SFT" else [(LIVE, BEST, f"{LIVE}, {BEST.name}"), (LLAVA_KD, BEFORE, LLAVA_KD)]
        lines += [
            row_of(objective, name, best_of(results, kind, way, objective, batches), base, peak)
            for kind, way, name in rows
        ]
    lines += [
        "",
        f"Parts of a step with switch, {batches[0]} samples, ms.",
        "",
        f"| part | {BEFORE.name} | {BEST.name} |",
        "| --- | ---: | ---: |",
    ]
    found = [results.get(Cell("profile", way, "with", batches[0]).key, {}).get("parts", {}) for way in (BEFORE, BEST)]
    names = list(found[0] or found[1]) or ["step"]
    for part in names:
        lines.append(
            f"| {part} | "
            + " | ".join(f"{1e3 * each[part]:,.1f}" if part in each else NOT_MEASURED for each in found)
            + " |"
        )
    return lines


def best_of(
    results: dict[str, Any], kind: str, way: Way, objective: str, batches: tuple[int, ...]
) -> tuple[int, dict[str, Any]]:
    """Return (batch, result) with the least time a sample; of a way that was never measured or never fitted, what is known."""
    found = [(batch, results.get(Cell(kind, way, objective, batch).key, {})) for batch in batches]
    timed = [each for each in found if "seconds" in each[1]]
    if timed:
        return min(timed, key=lambda each: each[1]["seconds"] / each[0])
    return next((each for each in found if each[1]), found[0])


def row_of(
    objective: str, name: str, best: tuple[int, dict[str, Any]], base: tuple[int, dict[str, Any]], peak: float | None
) -> str:
    """Return one row of the table of steps."""
    batch, found = best
    if "seconds" not in found:
        return f"| {objective} | {name} | {batch if found else ''} | {found.get('failed', NOT_MEASURED)} | | | | | |"
    sample = found["seconds"] / batch
    faster = f"{base[1]['seconds'] / base[0] / sample:.2f}" if "seconds" in base[1] else ""
    mfu = f"{found['flops'] / found['seconds'] / peak / 1e12:.1%}" if peak else ""
    memory = f"{(found['peak'] - found['held']) / batch / 1e6:,.0f}" if found["peak"] else NOT_MEASURED
    graphs = f"{found['compiled_graphs']}, {found['not_compiled']}" if "compiled_graphs" in found else ""
    times = f"{1e3 * found['seconds']:,.1f} | {1e3 * sample:,.2f}"
    return f"| {objective} | {name} | {batch} | {times} | {faster} | {mfu} | {memory} | {graphs} |"


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing for some minutes, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--scale", choices=list(SCALES), default="real", help="tiny: whether this program runs, on any machine"
    )
    parser.add_argument("--batches", default="16,32,8", help="samples of a step; the first one is measured first")
    parser.add_argument("--results", type=Path, default=ROOT / "build/bench-gpu.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/step-gpu-table.md")
    parser.add_argument("--cell", help=argparse.SUPPRESS)  # measure this one, and print the result
    options = parser.parse_args(arguments)
    batches = tuple(int(number) for number in options.batches.split(","))
    every = cells(batches)
    if options.cell:
        cell = next(each for each in every if each.key == options.cell)
        print(json.dumps(run_cell(cell, options.scale, options.device)))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "there is no CUDA device here; `--device cpu --scale tiny --out FILE --results FILE` shows whether this program runs"
        )
    end, about = time.monotonic() + 60 * options.minutes, describe(options.device)
    kept = json.loads(options.results.read_text()) if options.results.is_file() else {}
    results = (
        kept.get("results", {}) if kept.get("about") == about else {}
    )  # of another device or version: measured anew
    options.results.parent.mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(every):
        if cell.key in results:
            continue
        try:
            results[cell.key] = in_a_process(cell, options.scale, options.device, max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"{len(every) - number} cells are left; run the same command again", flush=True)
            break
        print(f"{cell.key}: {results[cell.key]}", flush=True)
        options.results.write_text(json.dumps({"about": about, "results": results}, indent=1))
    options.out.write_text("\n".join(table(results, about, batches, "make bench-gpu")) + "\n")


if __name__ == "__main__":
    main()
