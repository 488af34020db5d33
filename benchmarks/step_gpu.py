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
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from step_gpu_cells import SCALES, Cell, cells
from step_gpu_measures import run_cell
from step_gpu_table import table

ROOT = Path(__file__).parent.parent
MINUTES = 9


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
