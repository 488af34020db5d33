"""Conditions between options of `switchkd train`, checked when the options are made."""

from typing import TYPE_CHECKING

from switchkd.errors import ConfigError
from switchkd.settings import BASELINE_OBJECTIVES

if TYPE_CHECKING:
    from switchkd.pipelines.training.options import TrainOptions

PARTS = ("vision", "projector", "language")


def parts_of(text: str) -> frozenset[str]:
    """Read a list of parts such as "vision,projector". Raises ConfigError for an unknown part or none."""
    parts = [part.strip() for part in text.split(",")]
    if unknown := [part for part in parts if part not in PARTS]:
        raise ConfigError(f"no part {unknown[0]!r} to train; parts are {', '.join(PARTS)}, separated by commas")
    return frozenset(parts)


def check_baseline(options: "TrainOptions") -> None:
    """Raise ConfigError for options that a baseline's objective cannot be trained with."""
    if options.attention_layer is not None and options.objective != "align-ti-iva":
        raise ConfigError(f"--attention-layer belongs to objective align-ti-iva: leave it out with {options.objective}")
    if options.objective not in BASELINE_OBJECTIVES:
        return
    if options.teacher_mode != "live":
        compared = {
            "llava-kd": "logits at visual tokens",
            "align-kd": "visual tokens and attention",
            "compodistill": "attention among visual tokens",
            "align-ti-iva": "logits at visual tokens, weighted by attention",
        }
        what = compared[options.objective]
        raise ConfigError(
            f"objective {options.objective} compares {what}, which no store holds: pass --teacher-mode live, and the teacher "
            "runs in every step"
        )
    if options.packing is not None:
        raise ConfigError(f"objective {options.objective} compares images sample by sample: leave --packing out")
    if options.profile != "ddp":
        raise ConfigError(f"objective {options.objective} trains with --profile ddp only, got {options.profile}")
    if options.vocab_map:
        raise ConfigError(f"objective {options.objective} compares one tokenizer's logits: leave --vocab-map out")


def check_switch_ce(options: "TrainOptions") -> None:
    """Raise ConfigError for options of the teacher's logits, which objective switch-ce does not read."""
    if options.objective != "switch-ce":
        return
    if options.cache is not None:
        raise ConfigError("objective switch-ce reads no store: leave --cache out, it needs --teacher alone")
    if options.teacher_mode == "live":
        raise ConfigError("objective switch-ce reads no logits of the teacher: leave --teacher-mode live out")
    if options.vocab_map:
        raise ConfigError(
            "objective switch-ce asks the teacher's LLM for the student's tokens, so both have one tokenizer: leave --vocab-map out"
        )


def check_lora(options: "TrainOptions", trained: frozenset[str]) -> None:
    """Raise ConfigError for LoRA that does not go together with the `trained` parts, see `LoraOptions.as_lora`, or a profile."""
    if options.as_lora(trained) is not None and options.profile == "zero3":
        raise ConfigError(
            "--lora trains with --profile ddp or fsdp: DeepSpeed's checkpoints, from which zero3 resumes, hold no merged student"
        )


def check_int8_teacher(options: "TrainOptions") -> None:
    """Raise ConfigError for an int8 teacher where a run cannot use one."""
    if options.teacher_dtype != "int8":
        return
    if options.teacher_mode == "live":
        raise ConfigError(
            "--teacher-dtype int8 is for the switch pathway; a live teacher is the reference of cached runs. Pass "
            "bfloat16, or --cache"
        )
    if options.profile == "fsdp":
        raise ConfigError(
            "--profile fsdp shards the teacher's layers and cannot shard int8 ones: pass --teacher-dtype bfloat16, or "
            "--profile ddp"
        )
