"""The components of a student (vision, projector, language): which of them train, and at which learning rates."""

from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

from switchkd.fingerprints import component_of
from switchkd.losses.baselines import ADAPTERS


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to, by its name; the LM head counts as language, a switch adapter as projector.

    Adapters that a baseline's objective attaches to a student belong to none of its components; for them it returns "adapters".
    """
    if f"{ADAPTERS}." in name:
        return "adapters"
    return "projector" if "switch_adapter." in name else component_of(name)


def freeze_other_parts(model: nn.Module, trained: Iterable[str]) -> None:
    """Stop gradients to the parameters of every part that is not named."""
    trained = set(trained)
    for name, parameter in model.named_parameters():
        if part_of(name) not in trained:
            parameter.requires_grad_(False)


def set_part_rates(optimizer: Optimizer, model: nn.Module, rates: Mapping[str, float]) -> None:
    """Split an optimizer's groups so that each part named in `rates` has its own peak learning rate.

    Call it before the first step, and before a scheduler is created, since a scheduler takes each group's rate as its peak.
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
