"""Options of `switchkd train` for how much each position weighs."""

from typing import Any

from switchkd.errors import ConfigError
from switchkd.pipelines.options import keyword_options_class, option
from switchkd.settings import WeightBy

OBJECTIVE = "Objective"  # heading of the help


@keyword_options_class
class WeightOptions:
    """By what the positions of Align and VSD are weighted."""

    weight_by: WeightBy | None = option(
        default=None,
        group=OBJECTIVE,
        help="Average Align and VSD over the fifth of each answer's tokens that gain most from the image and over the others, each "
        "apart, and take the mean of both; the store must hold it, see `cache-teacher --visual-advantage`.",
        unset="every token alike",
    )


def check_weights(options: Any) -> None:
    """Raise ConfigError for weights where no store is read, or whose positions are not the student's.

    Args:
        options: those of training. An objective that has nothing to weight is refused by `settings.check_objective`.
    """
    if options.weight_by is None:
        return
    if options.teacher_mode == "live":
        raise ConfigError(
            f"--weight-by {options.weight_by} reads a store, and a live teacher is not run over blurred images: leave it out, or "
            "train from a store of `switchkd cache-teacher --visual-advantage`"
        )
    if options.vocab_map:
        raise ConfigError(
            f"--weight-by {options.weight_by} weights the teacher's tokens, and with --vocab-map the student has others: leave one "
            "of them out"
        )
