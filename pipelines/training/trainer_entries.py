"""What a config file's `trainer:` may hold: an argument of transformers' `TrainingArguments` is allowed, or refused with a reason.

switchkd computes some arguments from its own options, and others do not apply to its loop: such an entry would change the run or be
ignored, without a word. A test compares the two tables with the fields of the installed TrainingArguments.
"""

from collections.abc import Mapping
from typing import Any

from switchkd.errors import ConfigError

_SAVED = "every checkpoint is whole, so that a run resumes exactly: use --save-every"
_EVALUATED = "use --eval-data, which evaluates a student while it trains, and --keep-best"
_CHECKPOINTING = "it is for other models: pass --student-checkpointing"
_LOADED = "the batches are switchkd's own"
_PUSHED = "use `switchkd export --push`"
_LOSS = "the loss is the objective's, see --objective"

# Field → what to use instead, or why it does not apply.
REFUSED: dict[str, str] = {
    "output_dir": "use --output",
    "per_device_train_batch_size": "use --batch-size",
    "gradient_accumulation_steps": "use --accumulation or --global-batch",
    "auto_find_batch_size": "use --batch-size: another size would change the run",
    "num_train_epochs": "use --epochs",
    "max_steps": "use --steps",
    "learning_rate": "use --lr",
    "lr_scheduler_type": "use --schedule",
    "warmup_steps": "use --warmup",
    "weight_decay": "use --weight-decay",
    "max_grad_norm": "use --grad-clip",
    "bf16": "use --precision",
    "fp16": "use --precision: float16 is not trained in",
    "seed": "use --seed",
    "data_seed": "use --seed, on which the order of samples depends",
    "label_smoothing_factor": _LOSS,
    "average_tokens_across_devices": "the mean is over the global batch, see --mean",
    "use_liger_kernel": "the fused loss is switchkd's own",
    "liger_kernel_config": "the fused loss is switchkd's own",
    "use_cache": "training keeps no keys and values",
    "activation_checkpointing": _CHECKPOINTING,
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "gradient_checkpointing": _CHECKPOINTING,
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "neftune_noise_alpha": "noise on embeddings is not part of the method, and a run with it does not resume exactly",
    "logging_strategy": "use --log-every",
    "logging_steps": "use --log-every",
    "logging_first_step": "use --log-every",
    "disable_tqdm": "progress is switchkd's own",
    "include_num_input_tokens_seen": "positions are logged",
    "save_strategy": _SAVED,
    "save_steps": "use --save-every",
    "save_only_model": _SAVED,
    "save_on_each_node": "checkpoints lie on a file system that all nodes share",
    "save_total_limit": "use --keep",
    "enable_jit_checkpoint": _SAVED,
    "restore_callback_states_from_checkpoint": "a run resumes exactly without it",
    "ignore_data_skip": "a run resumes exactly: it takes the samples that come next",
    "resume_from_checkpoint": "run the same command again, and it goes on from its last checkpoint",
    "dataloader_num_workers": "use --workers",
    "dataloader_drop_last": _LOADED,
    "dataloader_in_order": _LOADED,
    "remove_unused_columns": _LOADED,
    "label_names": _LOADED,
    "train_sampling_strategy": "use --group-by",
    "length_column_name": "use --group-by",
    "accelerator_config": _LOADED,
    "parallelism_config": "use --profile",
    "fsdp": "use --profile fsdp",
    "fsdp_config": "use --profile fsdp",
    "deepspeed": "use --profile zero3",
    "ddp_find_unused_parameters": "every trainable parameter has a gradient in every batch",
    "ddp_static_graph": "batches with and without images differ",
    "local_rank": "torchrun sets it",
    "use_cpu": "hide devices with CUDA_VISIBLE_DEVICES",
    "do_train": "`switchkd train` trains",
    **dict.fromkeys(
        (
            "do_eval", "do_predict", "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size",
            "prediction_loss_only", "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object",
            "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "load_best_model_at_end",
            "metric_for_best_model", "greater_is_better", "bf16_full_eval", "fp16_full_eval",
        ),
        _EVALUATED,
    ),
    **dict.fromkeys(
        (
            "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
        ),
        _PUSHED,
    ),
}  # fmt: skip
ALLOWED = frozenset(
    {
        "lr_scheduler_kwargs", "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon",
        "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "log_on_each_node",
        "logging_nan_inf_filter", "log_level", "log_level_replica", "report_to", "run_name", "project", "trackio_space_id",
        "trackio_bucket_id", "trackio_static_space_id", "full_determinism", "dataloader_pin_memory",
        "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
        "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_backend", "ddp_timeout", "debug", "skip_memory_metrics",
    }
)  # fmt: skip


def check_trainer_entries(entries: Mapping[str, Any]) -> None:
    """Check the entries of `trainer:`.

    Raises:
        ConfigError: an entry that switchkd computes itself or that does not apply, with what to use instead; an unknown one.
    """
    if not isinstance(entries, Mapping):
        raise ConfigError(f"trainer: should hold arguments of TrainingArguments by name, got {entries!r}")
    for name in entries:
        if name in REFUSED:
            raise ConfigError(f"trainer: {name} is refused: {REFUSED[name]}")
        if name not in ALLOWED:
            raise ConfigError(f"trainer: {name} is not an argument of transformers' TrainingArguments")
