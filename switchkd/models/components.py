"""The components of a vision-language model of any family: vision tower V, projector P, language model L, LM head (paper, 3.1).

V and P are told apart by what enters P's modules, the family's *cuts* (`families.Family.cuts`): a tower of the Qwen line holds its
merger, which is P.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from switchkd.errors import CheckpointError
from switchkd.losses.lm_head import LMHead
from switchkd.models.families import family_of, logit_map_of


def tower_of(model: Any) -> nn.Module | None:
    """Return the module that holds the vision tower; None for a Llava without one.

    Raises:
        CheckpointError: transformers does not name the class's tower.
    """
    if family_of(model.config).is_llava:
        found: nn.Module | None = model.model.vision_tower
        return found
    tower: nn.Module = model.get_encoder("image")
    if tower is model or tower is model.model:
        raise CheckpointError(
            f"{type(model).__name__} names no vision tower: get_encoder('image') of transformers finds none"
        )
    return tower


def language_model_of(model: Any) -> Any:
    """Return the language model's body, without its LM head."""
    body = model.model
    return body.language_model if hasattr(body, "language_model") else body.text_model


def projector_modules_of(model: Any) -> dict[str, nn.Module]:
    """Return the modules whose inputs are V(x), by their names below the model's body, in the order of the family's cuts.

    Raises:
        CheckpointError: the class has no such module.
    """
    found: dict[str, nn.Module] = {}
    for cut in family_of(model.config).cuts:
        try:
            if cut.endswith(".*"):
                items = model.model.get_submodule(cut[:-2])
                found |= {f"{cut[:-2]}.{index}": item for index, item in enumerate(items)}
            else:
                found[cut] = model.model.get_submodule(cut)
        except AttributeError:
            raise CheckpointError(
                f"{type(model).__name__} has no module model.{cut}, which the entry of {model.config.model_type} in "
                "switchkd/models/families.py names as part of its projector"
            ) from None
    return found


def lm_head_of(model: Any) -> LMHead:
    """Return the LM head, and what the model makes of its output outside of a block of `replace_lm_head`."""
    logit_map = model.__dict__.get(_KNOWN) or logit_map_of(model.config)
    return LMHead(model.lm_head.weight, model.lm_head.bias, logit_map)


_KNOWN = "_logit_map"  # attribute of a model whose config says nothing of its soft-cap for a while


def tower_layers_of(model: Any) -> list[nn.Module]:
    """Return the layers of the vision tower (members of module lists), without those that belong to the projector."""
    tower = tower_of(model)
    inside = {id(module) for cut in projector_modules_of(model).values() for module in cut.modules()}
    return [] if tower is None else [layer for layer in layers_of(tower) if id(layer) not in inside]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model's towers (members of module lists), the unit of sharding, gathering and checkpointing."""
    return [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]


@contextmanager
def replace_lm_head(model: Any, head: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the LM head's computation inside the block: `model` passes final hidden states to `head`, whose result is its logits.

    The LM head is still called as a module, inside the forward pass of any wrapper of the model. So its parameters are gathered as
    usual (FSDP, DeepSpeed ZeRO-3), and their gradient comes from a graph that the wrapper tracks (DistributedDataParallel). A class
    that soft-caps its logits does not cap the result.
    """
    module = model.get_submodule("lm_head")
    before = module.__dict__.get("forward")
    module.forward = torch.compiler.disable(head)
    try:
        with _without_softcap(model):
            yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def _without_softcap(model: Any) -> Iterator[None]:
    """Switch off the soft-cap that a class applies to what its LM head returns, read from the config in each forward pass."""
    text = model.config.get_text_config()
    cap = getattr(text, "final_logit_softcapping", None)
    if cap is None:
        yield
        return
    model.__dict__[_KNOWN] = logit_map_of(model.config)
    text.final_logit_softcapping = None
    try:
        yield
    finally:
        del model.__dict__[_KNOWN]
        text.final_logit_softcapping = cap
