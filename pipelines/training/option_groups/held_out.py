"""Options of `switchkd train` for held-out samples, and what they mean together."""

from pathlib import Path
from typing import Literal

from switchkd.errors import ConfigError
from switchkd.pipelines.options import keyword_options_class, option
from switchkd.settings import BASELINE_OBJECTIVES, StoreLocation

HELD_OUT = "Held-out samples"  # heading of the help
Metric = Literal["loss", "ce", "align", "vsd", "exact-match"]
SAMPLES, ANSWERS = 256, 64
TRAINED_PER_EVALUATED = 100  # samples; by default an evaluation costs about half a per cent of the steps before it
# Nothing of these changes what is trained.
FREE = {"eval_data", "eval_images", "eval_cache", "eval_every", "eval_samples", "eval_answers", "keep_best"}


@keyword_options_class
class HeldOutOptions:
    """By which samples a student is evaluated while it trains, how often, and by which metric the best one is kept."""

    eval_data: Path | None = option(
        names="data",
        default=None,
        group=HELD_OUT,
        help="Data file of held-out samples, on which the student is evaluated while it trains: CE, exact match of greedy answers, "
        "and with --eval-cache or a live teacher Align and VSD.",
    )
    eval_images: Path | None = option(
        names="images", default=None, group=HELD_OUT, help="Folder that its image paths start from.", unset="--images"
    )
    eval_cache: StoreLocation | None = option(
        names="store",
        default=None,
        group=HELD_OUT,
        help="The same teacher's store of these samples, or a folder of stores.",
        unset="none: Align and VSD are left out, unless the teacher is live",
    )
    eval_every: int | None = option(
        default=None,
        at_least=1,
        group=HELD_OUT,
        help="Steps between two evaluations; there is one after the last step, too.",
        unset=f"as many as train {TRAINED_PER_EVALUATED} times the samples that are evaluated",
    )
    eval_samples: int | None = option(
        default=None,
        at_least=1,
        group=HELD_OUT,
        help="The losses are those of at most so many samples, evenly spaced over the file.",
        unset=str(SAMPLES),
    )
    eval_answers: int | None = option(
        default=None,
        at_least=0,
        group=HELD_OUT,
        help="At most so many of their questions are answered for exact match.",
        unset=str(ANSWERS),
    )
    keep_best: Metric | None = option(
        default=None,
        group=HELD_OUT,
        help="Keep the student that was best by this metric of the held-out samples, in the run's folder best.",
    )

    def answers(self) -> int:
        """Return how many questions are answered at most."""
        return ANSWERS if self.eval_answers is None else self.eval_answers

    def every(self, samples: int, global_batch: int) -> int:
        """Return the steps between two evaluations of `samples` samples."""
        return self.eval_every or max(1, -(-TRAINED_PER_EVALUATED * samples // global_batch))


def check_held_out(options: HeldOutOptions, *, objective: str, switch: bool | None, cached: bool, profile: str) -> None:
    """Check the options of held-out samples against each other and those of the run.

    Args:
        switch: the switch pathway; None: not known yet. cached: whether the run reads the teacher from a store.

    Raises:
        ConfigError: an option without samples, one that does not go with the teacher or profile, a metric that is never computed.
    """
    if options.eval_data is None:
        for name in sorted(FREE):
            if getattr(options, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} is about held-out samples: pass --eval-data, too")
        return
    if profile == "zero3":
        raise ConfigError(
            "--eval-data goes with --profile ddp or fsdp: a student that DeepSpeed shards is not evaluated"
        )
    with_teacher = objective not in ("sft", "switch-ce", *BASELINE_OBJECTIVES)
    if options.eval_cache is not None and not (with_teacher and cached):
        why = (
            "reads no teacher store"
            if with_teacher
            else f"with objective {objective} is evaluated by CE and exact match"
        )
        raise ConfigError(f"--eval-cache is for a run that trains from a store; this one {why}: leave it out")
    metric = options.keep_best
    if metric == "exact-match" and options.answers() == 0:
        raise ConfigError("--keep-best exact-match: --eval-answers 0 asks no question, so it is never computed")
    if metric == "vsd" and switch is False:
        raise ConfigError("--keep-best vsd: the switch pathway is off, so VSD is never computed; pass --switch")
    needs_teacher = metric in ("align", "vsd") or (metric == "loss" and objective != "sft")
    if needs_teacher and not with_teacher:
        raise ConfigError(f"--keep-best {metric} is never computed with objective {objective}: take ce or exact-match")
    if needs_teacher and cached and options.eval_cache is None:
        raise ConfigError(
            f"--keep-best {metric} compares with the teacher, of which nothing is known on the held-out samples: cache them, too, "
            "and pass --eval-cache; or take ce or exact-match"
        )
