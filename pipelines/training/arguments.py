"""Translation of the training options into `transformers.TrainingArguments`."""

import logging
import math
import os
from dataclasses import replace
from typing import Any

import torch
from transformers import TrainingArguments

from switchkd.errors import ConfigError
from switchkd.pipelines.run_folder import read_record
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.parallelism import profile_arguments
from switchkd.stores import TeacherStore

log = logging.getLogger(__name__)


def training_arguments(options: TrainOptions, store: TeacherStore | None, samples: int) -> TrainingArguments:
    """Translate the options; `trainer` entries go to transformers as they are. Raises ConfigError for a value it refuses."""
    assert options.global_batch is not None
    steps = options.steps or math.ceil(options.epochs * samples / options.global_batch)
    arguments: dict[str, Any] = {
        "output_dir": str(options.output),
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "max_steps": steps,
        "learning_rate": options.lr,
        "warmup_steps": options.warmup,
        "lr_scheduler_type": options.schedule,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.grad_clip,
        "bf16": options.precision == "bfloat16",
        "seed": options.seed,
        "logging_steps": options.log_every,
        "save_steps": options.save_every,
        "save_total_limit": 2,
        "dataloader_num_workers": options.workers,
        "remove_unused_columns": False,  # the collator's teacher columns are not arguments of the model's forward
        "ddp_find_unused_parameters": False,  # every trainable parameter receives a gradient in every batch, see SwitchTrainer
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    arguments |= profile_arguments(options.profile, os.environ) | options.trainer
    if store is not None and not store.storage.survives_fork and arguments["dataloader_num_workers"]:
        arguments.setdefault("dataloader_multiprocessing_context", "spawn")
    try:
        made = TrainingArguments(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"training arguments: {error}") from error
    if made.n_gpu > 1:
        log.warning(
            "using one of %d GPUs; for all: torchrun --nproc-per-node %d --no-python switchkd train …",
            *[made.n_gpu] * 2,
        )
        made._n_gpu = 1  # else transformers would copy the model to all of them in every step (DataParallel)
    return made


def resolve_batches(options: TrainOptions, processes: int) -> TrainOptions:
    """Return the options with accumulation and global batch as numbers.

    A resumed run keeps its global batch. If the number of processes has changed, the accumulation is computed again to match.

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
