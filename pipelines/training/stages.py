"""Training stages of the paper's schemes: trainable parts of the student, learning rates and other settings.

A scheme has two training stages, pre-training and fine-tuning, each with or without a teacher (paper, Table 5): PT-SFT, DPT-SFT,
PT-DFT, DPT-DFT. A training stage is a set of defaults for `TrainOptions`; options that are given override them.
"""

from collections.abc import Mapping
from typing import Any

from switchkd.errors import ConfigError
from switchkd.pipelines.training.option_checks import PARTS

# The setting that the paper inherits from LLaVA-KD and TinyLLaVA (section 4.1). Distilled pre-training trains only the projector,
# so the switch pathway, which trains the vision tower, is off; the scores of Table 5 are those without switch.
_PRE_TRAINING: dict[str, Any] = {"train_parts": "projector", "lr": 1e-3, "global_batch": 256}
_FINE_TUNING: dict[str, Any] = {"train_parts": ",".join(PARTS), "lr": 2e-5, "global_batch": 128}
_SCHEDULE: dict[str, Any] = {"epochs": 1.0, "warmup": 0.03, "schedule": "cosine", "weight_decay": 0.0}
_NO_TEACHER: dict[str, Any] = {"objective": "sft", "switch": False}
STAGES: dict[str, dict[str, Any]] = {
    "pt": {**_SCHEDULE, **_PRE_TRAINING, **_NO_TEACHER, "template": "plain", "max_length": 2048},
    "dpt": {**_SCHEDULE, **_PRE_TRAINING, "objective": "dbild-rkl", "switch": False},
    "sft": {**_SCHEDULE, **_FINE_TUNING, **_NO_TEACHER, "max_length": 2048},
    "dft": {**_SCHEDULE, **_FINE_TUNING, "objective": "dbild-rkl"},
}


def with_stage(stage: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options `given`, and the training stage's defaults for those that are not.

    `accumulation` replaces the stage's global batch. A plain stage (pt, sft) allows no objective except "sft".

    Raises:
        ConfigError: no such stage.
    """
    if stage not in STAGES:
        raise ConfigError(f"no stage {stage!r}; there are {', '.join(STAGES)}")
    defaults = dict(STAGES[stage])
    if given.get("accumulation") is not None:
        defaults.pop("global_batch")
    return defaults | dict(given) | {"stage": stage}
