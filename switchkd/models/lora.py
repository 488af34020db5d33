"""Low-rank adaptation (LoRA, arXiv 2106.09685) of a student, through peft.

A linear layer W of the student is frozen and gets a trained addend: W + (alpha / rank) · B · A, A [rank, in], B [out, rank]. peft
replaces the layers in place, so the model keeps its class, and everything that finds its components keeps finding them. Tensors of
a layer `q_proj` are then `q_proj.base_layer.weight`, `q_proj.lora_A.default.weight` and `q_proj.lora_B.default.weight`.
"""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from switchkd.errors import ConfigError
from switchkd.fingerprints import component_of
from switchkd.models.components import language_model_of, layers_of, tower_layers_of
from switchkd.settings import Lora

ADAPTER_WEIGHTS = "adapter_model.safetensors"  # as peft names it
_NAME = "default"  # of the adapter, peft's own
_BASE = ".base_layer."


def has_peft() -> bool:
    """Whether peft is installed."""
    return importlib.util.find_spec("peft") is not None


def linear_layers(model: Any, parts: frozenset[str]) -> list[str]:
    """Return the names of the linear layers of a model's LLM and vision tower, as far as `parts` names them.

    Only what belongs to a layer of these transformers counts: not embedding, LM head, patch embedding and projector.
    """
    layers = layers_of(language_model_of(model)) if "language" in parts else []
    layers += tower_layers_of(model) if "vision" in parts else []
    inside = {id(module) for layer in layers for module in layer.modules()}
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside]


def chosen_layers(model: Any, lora: Lora) -> list[str]:
    """Return the names of the layers that train as LoRA.

    Args:
        model: on any device, also on "meta".

    Raises:
        ConfigError: a target that no linear layer of these parts has; names those that there are.
    """
    names = linear_layers(model, lora.parts)
    if lora.targets is None:
        return names
    for target in lora.targets:
        if not any(_is(name, target) for name in names):
            there = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise ConfigError(
                f"--lora-targets {target}: the student has no such linear layer in {' and '.join(sorted(lora.parts))}; "
                f"there are {there}"
            )
    return [name for name in names if any(_is(name, target) for target in lora.targets)]


def _is(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def check_targets(config: Any, lora: Lora) -> None:
    """Compare targets with a model's layers by its config; no weights are read. Raises ConfigError, see `chosen_layers`."""
    if lora.targets is not None:
        with torch.device("meta"):
            chosen_layers(AutoModelForImageTextToText._model_mapping[type(config)](config), lora)


def attach_lora(model: Any, lora: Lora, seed: int) -> None:
    """Freeze the named parts of a model, and let LoRA weights of their linear layers train instead; other parts stay as they are.

    A is drawn as peft draws it (Kaiming, uniform), B is 0: the model computes what it did before.

    Args:
        model: whole, not sharded, with `requires_grad` as it should be without LoRA. seed: of A.

    Raises:
        ConfigError: see `chosen_layers`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = chosen_layers(model, lora)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and component_of(name) not in lora.parts}
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names, bias="none"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():  # peft froze everything else
        parameter.requires_grad_(is_lora(name) or name in trained)


def hold_frozen_in_bfloat16(model: Any) -> int:
    """Keep the frozen weights of the LLM's layers with LoRA in bfloat16, where that is what they are; return how many layers.

    Under autocast a linear layer converts its weight to bfloat16 in every step, so the result is the same bit for bit. A weight
    that bfloat16 cannot hold exactly stays as it is, since the saved student is made from it.

    Args:
        model: with LoRA attached, not sharded; its LLM runs under autocast to bfloat16 only.
    """
    held = 0
    for name in lora_layers(model):
        weight = model.get_submodule(name).base_layer.weight
        half = weight.data.bfloat16()
        if component_of(name) == "language" and torch.equal(half.to(weight.dtype), weight.data):
            weight.data = half
            held += 1
    return held


def is_lora(name: str) -> bool:
    """Whether a parameter is A or B of a layer, by its name."""
    return ".lora_A." in name or ".lora_B." in name


def lora_config_of(model: Any) -> Any | None:
    """Return peft's config of a model's LoRA; None for a model without."""
    found: Any | None = getattr(model, "peft_config", {}).get(_NAME)
    return found


def lora_layers(model: Any) -> list[str]:
    """Return the names of the layers with LoRA."""
    return [
        name for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    ]


def plain_name(name: str) -> str:
    """Return the name that a parameter of a layer with LoRA has in the same model without."""
    return name.replace(_BASE, ".")


def merged_weights(weights: Mapping[str, Tensor], scaling: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (the weights of the same model without LoRA, W + scaling · B · A in place of W; the LoRA weights).

    Args:
        weights: by name, on the CPU, unsharded. scaling: alpha / rank.
    """
    lora = {name: tensor for name, tensor in weights.items() if is_lora(name)}
    plain: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name in lora:
            continue
        layer, base, kind = name.rpartition(_BASE)
        if base and kind == "weight":
            a, b = (lora[f"{layer}.{side}.{_NAME}.weight"] for side in ("lora_A", "lora_B"))
            plain[plain_name(name)] = tensor + (b @ a) * scaling
        else:
            plain[plain_name(name)] = tensor
    return plain, lora


def save_adapter(folder: Path, config: Any, lora: Mapping[str, Tensor], base: str) -> None:
    """Write LoRA weights as a folder that `peft.PeftModel.from_pretrained` opens on the student's own checkpoint.

    Args:
        config: see `lora_config_of`. lora: see `merged_weights`. base: the student's checkpoint, recorded in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": tensor.contiguous() for name, tensor in lora.items()
    }
    save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    before = config.base_model_name_or_path, config.inference_mode
    config.base_model_name_or_path, config.inference_mode = base, True
    try:
        config.save_pretrained(folder)
    finally:
        config.base_model_name_or_path, config.inference_mode = before
