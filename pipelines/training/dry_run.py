"""`switchkd train --dry-run`: what a run would take, from configs and data alone; no weights are loaded and nothing is written."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from switchkd.errors import ConfigError
from switchkd.models.block_attention import uses_block_attention
from switchkd.models.components import language_model_of
from switchkd.pipelines.batch import Batch
from switchkd.pipelines.mixture import mixture_at
from switchkd.pipelines.run_folder import free_bytes
from switchkd.pipelines.training.arguments import fit_to_data, training_arguments
from switchkd.pipelines.training.batches.sampler import StepBatches
from switchkd.pipelines.training.cost_model import CostModel, Work
from switchkd.pipelines.training.inputs import TrainingInputs, open_inputs, resolve_options
from switchkd.pipelines.training.metrics import StepMetrics
from switchkd.pipelines.training.model_setup import set_up_models
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.run_log import estimate_memory, tell_plan
from switchkd.pipelines.training.train import collator_of

PROBED_SAMPLES = 128  # at least; whole micro-batches from all over the first epoch
TYPICAL_SHARE = 0.4  # of a device's peak that training reaches; an assumption, as in docs/cluster.md
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainPlan:
    """What a run would take; see docs/scale.md."""

    steps: int
    devices: int
    global_batch: int  # samples per step
    memory: dict[str, float]  # peak of each device, in bytes by kind
    step_flops: float  # of all devices together, as a run logs them
    recomputed_flops: float  # in addition, by activation checkpointing
    probed_samples: int  # from which both are extrapolated
    checkpoint_bytes: int
    checkpoints: int  # that are on the disk at the same time, the one that is being written included
    student_bytes: int  # of the finished student, and with --keep-best of the best one
    free_bytes: int  # on the file system of the run's folder
    has_store: bool  # False: the plan is that of a run with a store that is still to be made

    @property
    def disk_bytes(self) -> int:
        """The most bytes that the run's folder holds."""
        return self.checkpoints * self.checkpoint_bytes + self.student_bytes

    def hours(self, peak_tflops: float, share: float = TYPICAL_SHARE) -> float:
        """Return the hours of the run's arithmetic on devices that reach a share of `peak_tflops` TFLOP/s."""
        flops = self.steps * (self.step_flops + self.recomputed_flops)
        return flops / (self.devices * peak_tflops * 1e12 * share) / 3600


def plan(options: TrainOptions, devices: int) -> TrainPlan:
    """Open and compare everything as a run would, log the plan that it would log, and estimate what it takes.

    Without `options.cache`, the plan is that of a run with a store that holds hidden states of every usable sample.

    Args:
        devices: that torchrun would start a process for.

    Raises:
        InputError: as the run itself would raise before it loads weights.
    """
    options = resolve_options(options, devices)
    # Sharding is refused outside of torchrun; here only what does not depend on it is read of the arguments.
    arguments = training_arguments(replace(options, profile="ddp"))
    inputs, has_store = _open(options)
    options = inputs.options
    fit_to_data(arguments, options, inputs.stores, len(inputs.samples))
    models = set_up_models(inputs, arguments, weights=False)
    tell_plan(inputs, arguments.max_steps, devices, models.cost_model, models.unused, None)
    assert options.global_batch is not None  # resolved
    work, probed = probe_work(inputs, models.cost_model, arguments.max_steps)
    *_, memory = estimate_memory(inputs, devices, models.cost_model)
    a_step, again = (
        flops * options.global_batch / probed
        for flops in (
            models.cost_model.flops(work),
            models.cost_model.recomputed_flops(
                work, student=options.student_checkpointing, teacher=options.teacher_checkpointing
            ),
        )
    )
    return TrainPlan(
        steps=arguments.max_steps,
        devices=devices,
        global_batch=options.global_batch,
        memory=memory,
        step_flops=a_step,
        recomputed_flops=again,
        probed_samples=probed,
        checkpoint_bytes=models.cost_model.checkpoint_bytes(),
        checkpoints=(arguments.save_total_limit or 0) + 1,
        student_bytes=(1 + (options.keep_best is not None)) * sum(p.nbytes for p in models.student.parameters()),
        free_bytes=free_bytes(options.output),
        has_store=has_store,
    )


def _open(options: TrainOptions) -> tuple[TrainingInputs, bool]:
    """Return the inputs of a run, and whether its stores are there; without stores, as if they were still to be made."""
    mixture = mixture_at(options.data)
    named = options.cache is not None or (mixture is not None and any(entry.store for entry in mixture.entries))
    if named or options.teacher_mode == "live" or not options.as_objective().needs_signal:
        return open_inputs(options), True
    if options.teacher is None:
        raise ConfigError("a plan needs the store, or the teacher that is to make it: pass --cache or --teacher")
    log.info(
        "no --cache: planned as with a store of hidden states of all usable samples, which is still to be made; pass what it will "
        "be made with (--template, --max-length, --max-pixels). Until then, lengths are estimated from characters"
    )
    # A live teacher is what a run without a store opens; int8 weights are refused for one.
    inputs = open_inputs(replace(options, teacher_mode="live", teacher_dtype="auto", weight_by=None))
    asked = replace(
        inputs.options, teacher_mode="cached", teacher_dtype=options.teacher_dtype, weight_by=options.weight_by
    )
    return replace(inputs, options=asked), False


def probe_work(inputs: TrainingInputs, cost_model: CostModel, steps: int) -> tuple[Work, int]:
    """Read micro-batches from all over the first epoch of a run, and count their work as the run would.

    The text that all rows of a batch begin with, which a run without sharding computes once for the switch pathway, is counted for
    each row.

    Returns:
        The work of these micro-batches, and how many samples they have.
    """
    samples, collator = inputs.samples, collator_of(inputs, inputs.samples)
    switch = cost_model.switch
    metrics = StepMetrics(
        cost_model,
        knees=False,
        window=None,
        in_blocks=(
            uses_block_attention(language_model_of(cost_model.student)),
            switch is not None and uses_block_attention(language_model_of(switch)),
        ),
    )
    probed = 0
    for chosen in _some_batches(inputs, steps):
        metrics.count(Batch.of(collator([samples[index] for index in chosen])))
        probed += len(chosen)
    return metrics.work(), probed


def _some_batches(inputs: TrainingInputs, steps: int) -> Iterator[list[int]]:
    """Yield the samples of micro-batches at equal distances in the first epoch; all, if they are few."""
    options = inputs.options
    assert options.global_batch is not None  # resolved
    a_step = options.global_batch // options.batch_size  # micro-batches, of all processes
    order = inputs.samples.order(options.group_by or "none", options.seed, options.global_batch)
    there = min(steps * a_step, -(-len(inputs.samples) // options.batch_size))
    count = min(there, -(-PROBED_SAMPLES // options.batch_size))
    chosen = set(np.linspace(0, there - 1, count).round().astype(int).tolist())
    batches = islice(StepBatches(order, steps, options.batch_size, a_step), there)
    return (batch for number, batch in enumerate(batches) if number in chosen)
