"""What the processes of a run exchange in a step, counted from the models' sizes: no device, no network, no time is measured.

    python benchmarks/exchange.py      # writes docs/exchange-table.md (make bench-exchange)

Models have the sizes of Qwen2.5-3B, Qwen2.5-0.5B and SigLIP-SO400M, the batch is that of step_gpu.py, the step trains with switch
pathway and everything of the student. Counted are bytes that each of n processes sends:

* ddp: gradients in float32, all-reduced once a step whatever the accumulation: 2 (n - 1) / n of them, as rings and NCCL's trees do.
* fsdp: (n - 1) / n of each tensor that is gathered or scattered. The student's layers are gathered in bfloat16 in the forward and
  again in the backward pass, the rest of it (embedding, norm, projector, patch embedding) once; its gradients are scattered in
  float32; the frozen teacher's layers are gathered in the forward and in the backward pass, and have no gradient.

tests/training/test_exchange.py compares the counts with the collectives of real runs over two processes. Compute is the FLOP of the
step at a given share of a device's peak; efficiency is compute over compute and exchange, if nothing overlaps, and if everything
does. Latencies are left out: it is an upper bound.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import step
import torch
from transformers import LlavaForConditionalGeneration

from switchkd.models.components import language_model_of, layers_of
from switchkd.models.vlm import LlavaWithoutVision, freeze
from switchkd.pipelines.training.cost_model import CostModel, Work

PEAK, MFU = 989e12, 0.40  # an H100's dense bfloat16, FLOP/s; the goal of docs/step-gpu-table.md
LINKS = {"NVLink, 450 GB/s": 450e9, "network, 50 GB/s": 50e9}  # bytes that a GPU sends per second
PROCESSES = (2, 8, 64)


def exchanged_bytes(student: Any, teacher: Any | None, profile: str, *, half: bool) -> dict[str, int]:
    """Return the bytes of whole tensors that a step all-reduces, gathers and scatters, by kind.

    Args:
        student: its trained parameters by `requires_grad`. teacher: frozen, on the switch pathway; None without it.
        profile: "ddp" or "fsdp". half: whether parameters are gathered in bfloat16.

    Raises:
        ValueError: another profile.
    """
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    if profile == "ddp":
        return {"all-reduced": 4 * trained}
    if profile != "fsdp":
        raise ValueError(f"profile must be 'ddp' or 'fsdp', got {profile!r}")
    element = 2 if half else 4
    inside = sum({id(p): p.numel() for layer in layers_of(student) for p in layer.parameters()}.values())
    every = sum(p.numel() for p in student.parameters())
    frozen = 0
    if teacher is not None:
        frozen = sum(p.nbytes for layer in layers_of(language_model_of(teacher)) for p in layer.parameters())
    return {"gathered": element * (2 * inside + every - inside) + 2 * frozen, "scattered": 4 * trained}


def sent_bytes(exchanged: Mapping[str, int], processes: int) -> float:
    """Return what each process sends for whole tensors of so many bytes, see the module's docstring."""
    share = (processes - 1) / processes
    return share * (2 * exchanged.get("all-reduced", 0) + exchanged.get("gathered", 0) + exchanged.get("scattered", 0))


def models_and_flops() -> tuple[Any, Any, float]:
    """Return student and teacher of real sizes without weights, and the FLOP of a step without padding."""
    scale = step.SCALES["cuda"]
    with torch.device("meta"):
        student = step.make_llava(scale.vision, scale.student, LlavaForConditionalGeneration)
        teacher = freeze(step.make_llava(scale.vision, scale.teacher, LlavaWithoutVision).bfloat16())
    batch = step.make_batch(scale)
    lengths, shown = batch["attention_mask"].sum(-1).double(), batch["has_image"]
    positions = (batch["labels"] != step.IGNORED).sum(-1).double()
    sums = [lengths, lengths**2, shown.double(), lengths[shown], lengths[shown] ** 2, positions, positions[shown]]
    cost = CostModel(student, teacher, None, teacher.lm_head.weight.numel(), scale.image_tokens)
    return student, teacher, cost.flops(Work(*(float(each.sum()) for each in sums)))


def main() -> None:
    """Count and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs/exchange-table.md")
    options = parser.parse_args()
    samples = step.SCALES["cuda"].samples
    student, teacher, flops = models_and_flops()
    compute = flops / (PEAK * MFU)
    lines = [
        f"Counted, not measured: {samples} samples a process and step with switch, {flops / 1e12:,.0f} TFLOP, "
        f"{1e3 * compute:,.0f} ms at {MFU:.0%} of {PEAK / 1e12:,.0f} TFLOP/s; made by `make bench-exchange`.",
        "",
        "| profile | processes | sent by each, GB | link | ms | efficiency without overlap | with all of it |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for profile in ("ddp", "fsdp"):
        exchanged = exchanged_bytes(student, teacher, profile, half=True)
        for processes in PROCESSES:
            sent = sent_bytes(exchanged, processes)
            for link, rate in LINKS.items():
                took = sent / rate
                apart, hidden = compute / (compute + took), min(1.0, compute / took)
                lines.append(
                    f"| {profile} | {processes} | {sent / 1e9:.2f} | {link} | {1e3 * took:,.1f} | {apart:.1%} | {hidden:.1%} |"
                )
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
