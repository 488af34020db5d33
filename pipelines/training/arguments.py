"""Translation of the training options into `transformers.TrainingArguments`."""

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from switchkd.errors import ConfigError
from switchkd.pipelines.training.loggers import PROJECT, require_loggers
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.parallelism import profile_arguments
from switchkd.stores import TeacherStore

# Of entries of `trainer:` that are counts; every number is at least 0.
_LEAST = {"torch_empty_cache_steps": 1, "dataloader_prefetch_factor": 1, "ddp_timeout": 1, "ddp_bucket_cap_mb": 1}
TRIAL_STEPS = 100  # of a schedule that is tried before the number of samples is known
log = logging.getLogger(__name__)


def training_arguments(options: TrainOptions) -> TrainingArguments:
    """Translate the options, without what depends on the data, see `fit_to_data`; `trainer` entries go to transformers.

    All that the Trainer would make of them later is made once on trial: it must not fail after samples were read.

    Raises:
        ConfigError: transformers or torch refuses a value, or a package that it needs is missing.
    """
    arguments: dict[str, Any] = {
        "output_dir": str(options.output),
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "max_steps": options.steps or TRIAL_STEPS,
        "learning_rate": options.lr,
        "warmup_steps": options.warmup,
        "lr_scheduler_type": options.schedule,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.grad_clip,
        "bf16": options.precision == "bfloat16",
        "seed": options.seed,
        "logging_steps": options.log_every,
        "save_steps": options.save_every,
        "save_total_limit": options.keep,
        "dataloader_num_workers": options.workers or 0,
        "remove_unused_columns": False,  # the collator's teacher columns are not arguments of the model's forward
        "ddp_find_unused_parameters": False,  # every trainable parameter receives a gradient in every batch, see SwitchTrainer
        # It asks the device in every step whether the loss is a number; SwitchTrainer does at every log and checkpoint.
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    if "trackio" in options.log_to:
        arguments["project"] = PROJECT
    arguments |= profile_arguments(options.profile, os.environ) | options.trainer
    _check_types(options.trainer)
    require_loggers(options.log_to)
    with _refusing("training arguments"):
        made = TrainingArguments(**arguments)
    _try_parts(made)
    if made.n_gpu > 1:
        log.warning(
            "using one of %d GPUs; for all: torchrun --nproc-per-node %d --no-python switchkd train …",
            *[made.n_gpu] * 2,
        )
        made._n_gpu = 1  # else transformers would copy the model to all of them in every step (DataParallel)
    return made


def _check_types(entries: Mapping[str, Any]) -> None:
    """Compare the entries of `trainer:` with the types of TrainingArguments, which itself compares few of them.

    Raises:
        ConfigError: an entry of another type, or a number out of its bounds.
    """
    kinds = get_type_hints(TrainingArguments)
    for name, value in entries.items():
        try:
            TypeAdapter(kinds.get(name, Any)).validate_python(value, strict=True)
        except ValidationError:
            raise ConfigError(f"trainer: {name} should be {_words(kinds[name])}, found {value!r}") from None
        if type(value) in (int, float) and not (math.isfinite(value) and value >= _LEAST.get(name, 0)):
            raise ConfigError(f"trainer: {name} should be at least {_LEAST.get(name, 0)} and finite, found {value!r}")


def _words(kind: Any) -> str:
    """Return a type as words: "str | list[str] | None"."""
    text = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    return text.replace("typing.", "").replace("transformers.", "")


def fit_to_data(
    arguments: TrainingArguments, options: TrainOptions, stores: Sequence[TeacherStore], samples: int
) -> None:
    """Set the number of steps over `samples` samples an epoch, and how loader processes begin. Raises ConfigError."""
    assert options.global_batch is not None
    arguments.max_steps = options.steps or math.ceil(options.epochs * samples / options.global_batch)
    if arguments.dataloader_num_workers and not all(store.storage.survives_fork for store in stores):
        arguments.dataloader_multiprocessing_context = arguments.dataloader_multiprocessing_context or "spawn"
    _try_schedule(arguments)


def _try_parts(arguments: TrainingArguments) -> None:
    """Make, and throw away, what the Trainer makes of the arguments: optimizer, schedule, loader, loggers, compiler."""
    with _refusing("trainer: dataloader_…"):
        DataLoader(
            [0],  # type: ignore[arg-type]
            num_workers=arguments.dataloader_num_workers,
            persistent_workers=arguments.dataloader_persistent_workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            multiprocessing_context=arguments.dataloader_multiprocessing_context,
        )
    with _refusing("trainer: optim"):
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        if not settings.keys() & {"params", "model", "optimizer_dict"}:  # those are made for one model
            kind([torch.nn.Parameter(torch.zeros(1, device=arguments.device))], **settings)
    _try_schedule(arguments)
    with _refusing("trainer: report_to"):
        for logger in get_reporting_integration_callbacks(arguments.report_to):
            logger()
    with _refusing("trainer: log_level"):
        logging.Logger("trial").setLevel(arguments.get_process_log_level())
    if arguments.torch_compile:
        with _refusing("trainer: torch_compile_…"):
            torch.compile(
                torch.nn.Identity(), backend=arguments.torch_compile_backend, mode=arguments.torch_compile_mode
            )
            torch._dynamo.lookup_backend(arguments.torch_compile_backend)


def _try_schedule(arguments: TrainingArguments) -> None:
    """Run through the learning rates of `max_steps` steps, as far as they say something about its arguments."""
    name, given = str(arguments.lr_scheduler_type.value), arguments.lr_scheduler_kwargs
    if given and name in ("constant", "constant_with_warmup"):
        raise ConfigError(f"--schedule {name} takes no arguments, trainer: lr_scheduler_kwargs has {given}")
    with _refusing(f"--schedule {name} with trainer: lr_scheduler_kwargs {given}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the schedule steps without its optimizer
        schedule = get_scheduler(
            name,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate),
            num_warmup_steps=arguments.get_warmup_steps(arguments.max_steps),
            num_training_steps=arguments.max_steps,
            scheduler_specific_kwargs=given,
        )
        for _ in range(min(arguments.max_steps, TRIAL_STEPS)):
            schedule.step()


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Raise ConfigError for any error that a library raises for wrong arguments or a missing package."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, AssertionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{what}: {error or type(error).__name__}") from error
