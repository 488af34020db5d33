"""Options of stage two, and the record of them that lies beside a run."""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from switchkd.errors import ConfigError
from switchkd.losses.objective import Objective
from switchkd.losses.signals import TailPolicy
from switchkd.pipelines.run_folder import read_record
from switchkd.pipelines.training.student_parts import PARTS, parts_of
from switchkd.stores.storage.base import StoreLocation

# Options that may change between two starts of one run: they do not change what is computed. How the global batch is made up
# (batch size, accumulation, processes) may change, the global batch may not.
RESUMABLE_CHANGES = {
    "student_checkpointing",
    "teacher_checkpointing",
    "packing",
    "log_every",
    "save_every",
    "workers",
    "output",
    "profile",
    "peak_tflops",
    "batch_size",
    "accumulation",
}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainOptions:
    """What `switchkd train` was asked for; fields are its options. Defaults follow LLaVA-KD's fine-tuning stage."""

    student: Path
    data: Path
    output: Path
    teacher: Path | None = None
    images: Path | None = None
    cache: StoreLocation | None = None
    objective: str = "dbild-rkl"
    switch: bool = True
    align_weight: float = 1.0  # λ1
    vsd_weight: float = 1.0  # λ2
    switch_adapter: str | None = None  # or "linear", "mlp": maps the student's features to the teacher's shape
    vocab_map: bool = False  # the teacher has another tokenizer
    temperature: float | None = None
    window: int | None = None
    mean: str = "position"  # or sample: of each sample first
    teacher_mode: str = "cached"  # or live: the standard pathway online, without a store
    payload: str | None = None  # None: hidden if the store has it, else topk
    tail: TailPolicy = "student"
    template: str | None = None  # None: the store's; without a store qwen2_base
    image_mode: str | None = None  # None: the store's; without a store the checkpoint's own
    max_length: int | None = None  # None: the store's; without a store 2048
    epochs: float = 1.0
    steps: int | None = None  # overrides epochs
    batch_size: int = 16  # samples per device
    accumulation: int | None = None  # None: what global_batch asks for, else 1
    global_batch: int | None = None  # samples per optimizer step over all devices
    stage: str | None = None  # whose defaults these options were made from, see stages.py
    train_parts: str = "vision,projector,language"
    group_by: str = "none"  # or "length", "modality-length": which samples share a batch
    packing: int | None = None  # tokens of a row that samples of a batch share; None: one sample a row
    lr: float = 2e-5
    lr_vision: float | None = None  # of a part; None: lr
    lr_projector: float | None = None
    lr_language: float | None = None
    warmup: float = 0.03  # share of the steps
    schedule: str = "cosine"
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    profile: str = "ddp"  # how processes share the work, see profiles.py
    precision: str = "float32"  # or bfloat16: autocast over float32 master weights
    teacher_dtype: str = "auto"  # the checkpoint's; bfloat16 under --precision bfloat16; or "int8", see int8_teacher.py
    student_checkpointing: bool = False  # recompute the student's activations in the backward pass
    teacher_checkpointing: bool = False  # the frozen teacher's
    seed: int = 42
    log_every: int = 10
    peak_tflops: float | None = None  # of one device, in TFLOP/s; MFU is told over it
    save_every: int = 500
    workers: int = 0
    trust_remote_code: bool = False
    trainer: dict[str, Any] = field(default_factory=dict)  # further transformers.TrainingArguments

    def as_objective(self) -> Objective:
        """Return the objective; raises ConfigError if its parts contradict each other."""
        return Objective(
            self.objective, self.switch, self.align_weight, self.vsd_weight, self.temperature, self.window, self.mean
        )

    def as_parts(self) -> frozenset[str]:
        """Return the parts of the student that train.

        Raises:
            ConfigError: an unknown part, a learning rate of a part that does not train, or a switch pathway that teaches nothing.
        """
        parts = parts_of(self.train_parts)
        if idle := [part for part in self.part_rates() if part not in parts]:
            raise ConfigError(f"--lr-{idle[0]} is given, but --train-parts {self.train_parts} leaves {idle[0]} frozen")
        if self.switch_adapter is not None and not self.switch:
            raise ConfigError("--switch-adapter belongs to the switch pathway: leave it out, or pass --switch")
        if self.switch and "vision" not in parts:
            raise ConfigError(
                "the switch pathway teaches the vision tower alone: add vision to --train-parts, or pass --no-switch"
            )
        return parts

    def part_rates(self) -> dict[str, float]:
        """Return the peak learning rates of the parts that have their own."""
        rates = {part: getattr(self, f"lr_{part}") for part in PARTS}
        return {part: rate for part, rate in rates.items() if rate is not None}

    def accumulated(self, processes: int) -> int:
        """Return the forward passes per optimizer step of `processes` devices. Raises ConfigError if the batches do not fit."""
        if self.global_batch is None:
            return 1 if self.accumulation is None else self.accumulation
        if self.accumulation is not None:
            raise ConfigError("--global-batch and --accumulation say the same thing twice: pass one of them")
        at_once = self.batch_size * processes
        if self.global_batch % at_once:
            raise ConfigError(
                f"a global batch of {self.global_batch} samples cannot be made of {processes} devices x {self.batch_size} "
                "samples: choose a --batch-size that divides it, or pass --accumulation"
            )
        return self.global_batch // at_once


def resolve_batches(options: TrainOptions, processes: int) -> TrainOptions:
    """Return the options with accumulation and global batch as numbers.

    A run that goes on keeps its global batch. Where the same command meets another number of processes, the accumulation is
    chosen anew.

    Raises:
        ConfigError: the global batch cannot be made of these processes and batch sizes, or is not that of the run.
    """
    before = read_record(options.output)
    accumulation = options.accumulated(processes)
    asked = options.batch_size * accumulation * processes
    wanted = options.global_batch or int(before.get("global_batch") or asked)
    if asked != wanted:
        if options.accumulation not in (None, before["accumulation"]):
            raise ConfigError(
                f"{options.output} was begun with {wanted} samples a step; {processes} processes x batch size "
                f"{options.batch_size} x accumulation {options.accumulation} make {asked}. Choose numbers that make {wanted}"
            )
        accumulation = replace(options, global_batch=wanted, accumulation=None).accumulated(processes)
        log.info("accumulation %d: a step of this run has %d samples", accumulation, wanted)
    return replace(options, accumulation=accumulation, global_batch=wanted)
