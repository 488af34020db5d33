"""Conditions between options of `switchkd train`, checked when the options are made."""

from typing import TYPE_CHECKING

from switchkd.errors import ConfigError
from switchkd.settings import BASELINE_OBJECTIVES

if TYPE_CHECKING:
    from switchkd.pipelines.training.options import TrainOptions

PARTS = ("vision", "projector", "language")
VARLEN, TRITON, COMPILE = "varlen-attention", "triton-selection", "compile-layers"
EXPERIMENTAL = (VARLEN, TRITON, COMPILE)  # of `--experimental`


def parts_of(text: str) -> frozenset[str]:
    """Read a list of parts such as "vision,projector". Raises ConfigError for an unknown part or none."""
    parts = [part.strip() for part in text.split(",")]
    if unknown := [part for part in parts if part not in PARTS]:
        raise ConfigError(f"no part {unknown[0]!r} to train; parts are {', '.join(PARTS)}, separated by commas")
    return frozenset(parts)


def experimental_of(text: str | None) -> frozenset[str]:
    """Read a list such as "varlen-attention,compile-layers". Raises ConfigError for an unknown name."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in EXPERIMENTAL]:
        raise ConfigError(
            f"--experimental has no {unknown[0]!r}; there are {', '.join(EXPERIMENTAL)}, separated by commas"
        )
    return frozenset(names)


def check_experimental(options: "TrainOptions") -> None:
    """Raise ConfigError for ways of running a step that do not fit the other options."""
    chosen = experimental_of(options.experimental)
    if VARLEN in chosen and options.packing is None:
        raise ConfigError(f"--experimental {VARLEN} is the attention of packed rows: pass --packing TOKENS")
    if VARLEN in chosen and options.precision == "float32":
        raise ConfigError(f"--experimental {VARLEN} computes in half precision: pass --precision bfloat16")
    if COMPILE in chosen and options.profile != "ddp":
        raise ConfigError(f"--experimental {COMPILE} compiles whole layers: pass --profile ddp, got {options.profile}")
    if COMPILE in chosen and options.objective in BASELINE_OBJECTIVES:
        raise ConfigError(
            f"--experimental {COMPILE} cannot be combined with objective {options.objective}, which hooks layers"
        )


def check_copies(options: "TrainOptions") -> None:
    """Raise ConfigError for bfloat16 copies of the weights where a run cannot have them."""
    if options.precision != "bfloat16-copies":
        return
    if options.profile != "ddp":
        raise ConfigError(
            f"--profile {options.profile} makes bfloat16 copies of its own: pass --precision bfloat16, got bfloat16-copies"
        )
    if options.objective in BASELINE_OBJECTIVES:
        raise ConfigError(f"objective {options.objective} trains under autocast: pass --precision bfloat16")


def check_vsd_share(options: "TrainOptions") -> None:
    """Raise ConfigError for a share of the samples on the switch pathway where there is none, or all processes run it together."""
    if options.vsd_share in (None, 1.0):
        return
    if options.switch is False:
        raise ConfigError("--vsd-share belongs to the switch pathway: leave it out, or pass --switch")
    if options.profile != "ddp":
        raise ConfigError(
            f"--vsd-share lets processes pass the switch pathway at different times, which --profile {options.profile} "
            "cannot: pass --profile ddp"
        )


def check_baseline(options: "TrainOptions") -> None:
    """Raise ConfigError for options that a baseline's objective cannot be trained with."""
    if options.objective not in BASELINE_OBJECTIVES:
        return
    if options.teacher_mode != "live":
        what = "logits at visual tokens" if options.objective == "llava-kd" else "visual tokens and attention"
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
