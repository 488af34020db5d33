"""Options of `switchkd train` for how a step runs, and what they mean together."""

from typing import Any

from switchkd.errors import ConfigError
from switchkd.pipelines.options import keyword_options_class, option
from switchkd.settings import BASELINE_OBJECTIVES

STEP = "How a step runs"  # heading of the help
VARLEN, TRITON, COMPILE, FP8_TEACHER = "varlen-attention", "triton-selection", "compile-layers", "fp8-teacher"
EXPERIMENTAL = (VARLEN, TRITON, COMPILE, FP8_TEACHER)  # of `--experimental`


@keyword_options_class
class StepOptions:
    """Ways of running a step, and how much of the switch pathway it runs."""

    vsd_share: float | None = option(
        default=None,
        above=0,
        at_most=1,
        group=STEP,
        help="The share of the image samples that pass the switch pathway, drawn anew in every epoch; VSD is divided by it. "
        "Less time, the same mean, more variance.",
        unset="1: all of them",
    )
    experimental: str | None = option(
        default=None,
        group=STEP,
        metavar="LIST",
        help="Ways of running a step that no GPU has confirmed yet: varlen-attention (of packed rows, in one kernel), "
        "triton-selection, compile-layers, fp8-teacher (the layers of its LLM multiply in float8); separated by commas.",
        unset="none",
    )

    def as_experimental(self) -> frozenset[str]:
        """Return the ways of running a step that `experimental` lists. Raises ConfigError for an unknown name."""
        names = [] if self.experimental is None else [name.strip() for name in self.experimental.split(",")]
        if unknown := [name for name in names if name not in EXPERIMENTAL]:
            raise ConfigError(
                f"--experimental has no {unknown[0]!r}; there are {', '.join(EXPERIMENTAL)}, separated by commas"
            )
        return frozenset(names)


def check_step(options: Any) -> None:
    """Raise ConfigError for ways of running a step that do not fit the other options; `options` are those of training."""
    _check_experimental(options)
    _check_fp8_teacher(options)
    _check_copies(options)
    _check_vsd_share(options)


def _check_experimental(options: Any) -> None:
    """Raise ConfigError for ways of running a step that do not fit the other options."""
    chosen = options.as_experimental()
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
    if COMPILE in chosen and options.lora is not None:
        raise ConfigError(f"--experimental {COMPILE} was not tried with --lora: leave one of them out")


def _check_fp8_teacher(options: Any) -> None:
    """Raise ConfigError for a teacher in float8 where a step runs none, or one of another kind."""
    if FP8_TEACHER not in options.as_experimental():
        return
    if options.objective in BASELINE_OBJECTIVES:
        raise ConfigError(
            f"--experimental {FP8_TEACHER} cannot be combined with objective {options.objective}, whose teacher is as published"
        )
    if options.objective == "sft" or (options.switch is False and options.teacher_mode != "live"):
        raise ConfigError(
            f"--experimental {FP8_TEACHER} is for a teacher that runs in a step, on the switch pathway or with --teacher-mode "
            "live: leave it out"
        )
    if options.precision == "float32":
        raise ConfigError(f"--experimental {FP8_TEACHER} computes beside bfloat16: pass --precision bfloat16")
    if options.teacher_dtype not in ("auto", "bfloat16"):
        raise ConfigError(
            f"--experimental {FP8_TEACHER} quantises a teacher in bfloat16: pass --teacher-dtype bfloat16, got "
            f"{options.teacher_dtype}"
        )
    if options.profile != "ddp":
        raise ConfigError(
            f"--profile {options.profile} was not tried with a teacher in float8: pass --profile ddp, or leave --experimental "
            f"{FP8_TEACHER} out"
        )


def _check_copies(options: Any) -> None:
    """Raise ConfigError for bfloat16 copies of the weights where a run cannot have them."""
    if options.precision != "bfloat16-copies":
        return
    if options.profile != "ddp":
        raise ConfigError(
            f"--profile {options.profile} makes bfloat16 copies of its own: pass --precision bfloat16, got bfloat16-copies"
        )
    if options.objective in BASELINE_OBJECTIVES:
        raise ConfigError(f"objective {options.objective} trains under autocast: pass --precision bfloat16")
    if options.lora is not None:
        raise ConfigError("--lora keeps its frozen weights in bfloat16 by itself: pass --precision bfloat16")


def _check_vsd_share(options: Any) -> None:
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
