"""Stages of the paper's training schemes: which parts of a student train, how fast, with which settings.

A scheme is two stages, a pre-training one and a fine-tuning one, each with or without a teacher (paper, Table 5): PT-SFT, DPT-SFT,
PT-DFT, DPT-DFT. A stage is a set of defaults for `TrainOptions`; whatever is given beside it wins.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from switchkd.errors import ConfigError
from switchkd.peers import ADAPTERS

PARTS = ("vision", "projector", "language")

# The setting that the paper inherits from LLaVA-KD and TinyLLaVA (section 4.1). Distilled pre-training moves the projector alone,
# so the switch pathway, which teaches the vision tower, has no place in it; the scores of Table 5 are those without switch.
_PRE_TRAINING: dict[str, Any] = {"train_parts": "projector", "lr": 1e-3, "global_batch": 256}
_FINE_TUNING: dict[str, Any] = {"train_parts": ",".join(PARTS), "lr": 2e-5, "global_batch": 128}
_SCHEDULE: dict[str, Any] = {"epochs": 1.0, "warmup": 0.03, "schedule": "cosine", "weight_decay": 0.0}
_NO_TEACHER: dict[str, Any] = {"objective": "sft", "switch": False}
STAGES: dict[str, dict[str, Any]] = {
    "pt": {**_SCHEDULE, **_PRE_TRAINING, **_NO_TEACHER, "template": "plain", "max_length": 2048},
    "dpt": {**_SCHEDULE, **_PRE_TRAINING, "objective": "dbild-rkl", "switch": False},
    "sft": {**_SCHEDULE, **_FINE_TUNING, **_NO_TEACHER, "max_length": 2048},
    "dft": {**_SCHEDULE, **_FINE_TUNING, "objective": "dbild-rkl", "switch": True},
}


def with_stage(stage: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options `given`, and the stage's defaults for those that are not.

    `accumulation` replaces the stage's global batch; another objective than "sft" cannot be without a teacher stage.

    Raises:
        ConfigError: no such stage.
    """
    if stage not in STAGES:
        raise ConfigError(f"no stage {stage!r}; there are {', '.join(STAGES)}")
    defaults = dict(STAGES[stage])
    if given.get("accumulation") is not None:
        defaults.pop("global_batch")
    return defaults | dict(given) | {"stage": stage}


def parts_of(text: str) -> frozenset[str]:
    """Read a list of parts such as "vision,projector". Raises ConfigError for an unknown part or none."""
    parts = [part.strip() for part in text.split(",")]
    if unknown := [part for part in parts if part not in PARTS]:
        raise ConfigError(f"no part {unknown[0]!r} to train; parts are {', '.join(PARTS)}, separated by commas")
    return frozenset(parts)


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to, by its name; the LM head counts as language, a switch adapter as projector.

    Adapters that a peer's objective hangs on a student are no part of it: "adapters".
    """
    if f"{ADAPTERS}." in name:
        return "adapters"
    if "vision_tower." in name:
        return "vision"
    return "projector" if "multi_modal_projector." in name or "switch_adapter." in name else "language"


def freeze_other_parts(model: nn.Module, trained: Iterable[str]) -> None:
    """Stop gradients to the parameters of every part that is not named."""
    trained = set(trained)
    for name, parameter in model.named_parameters():
        if part_of(name) not in trained:
            parameter.requires_grad_(False)


def set_part_rates(optimizer: Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Split an optimizer's groups so that each part named in `rates` has its own peak learning rate.

    To be called before a scheduler is made, which takes each group's rate for its peak, and before the first step.
    """
    part_by_id = {id(p): part_of(name) for name, p in model.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        members: dict[str | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            members.setdefault(part_by_id.get(id(parameter)), []).append(parameter)
        for part, parameters in members.items():
            rate = rates.get(part, group["lr"]) if part is not None else group["lr"]
            groups.append({**group, "params": parameters, "lr": rate})
    optimizer.param_groups[:] = groups
