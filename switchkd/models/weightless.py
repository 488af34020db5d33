"""Models without weights, built from a checkpoint's config alone: for what depends on shapes only, such as plans of memory.

Every parameter is one zero that is expanded to the parameter's shape, so a model of any size takes no memory to speak of, while
shapes, dtypes, ties and `requires_grad` are those of the loaded model. Buffers are real, and a forward pass runs: code that reads
the layout of an image (grids, tiles) works, which it does not on torch's meta device.
"""

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForImageTextToText

from switchkd.fingerprints import component_of
from switchkd.library_errors import as_checkpoint_error
from switchkd.models.block_attention import NAME, is_plain
from switchkd.models.checkpoint import Checkpoint
from switchkd.models.components import language_model_of
from switchkd.models.families import family_of
from switchkd.models.hollow import hollow_class
from switchkd.models.lora import lora_layers
from switchkd.models.packing_probe import check_packing
from switchkd.models.vlm import WITHOUT_VISION


def build_weightless(checkpoint: Checkpoint, *, vision: bool = True, dtype: str | torch.dtype = "auto") -> Any:
    """Build what `vlm.load_model` would load, without its weights; no weight file is opened, and none need exist.

    Args:
        vision, dtype: as `vlm.load_model` takes them.

    Returns:
        A model on the CPU, in evaluation mode; all its parameters are zeros without memory of their own.

    Raises:
        CheckpointError: transformers cannot build a model of this config.
    """
    config, kind = checkpoint.config, AutoModelForImageTextToText._model_mapping[type(checkpoint.config)]
    if not vision:
        kind = WITHOUT_VISION[kind] if family_of(config).is_llava else hollow_class(kind)
    wanted = getattr(torch, checkpoint.resolve_dtype(dtype)) if isinstance(dtype, str) else dtype
    with as_checkpoint_error(checkpoint.path), init_empty_weights(include_buffers=False):
        model = kind(copy.deepcopy(config))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zero = torch.zeros(1, dtype=wanted)
                module._parameters[name] = nn.Parameter(zero.expand(parameter.shape))
    model.tie_weights()
    return model.eval()


def expect_frozen_in_bfloat16(model: Any) -> None:
    """Give the frozen weights that `lora.hold_frozen_in_bfloat16` would convert that dtype, for a checkpoint in bfloat16."""
    for name in lora_layers(model):
        if component_of(name) == "language":
            weight = model.get_submodule(name).base_layer.weight
            weight.data = torch.zeros(1, dtype=torch.bfloat16).expand(weight.shape)


def expect_packing(model: Any, name: str) -> None:
    """Set the attention that `packing_probe.enable_packing_in` would choose, without weights to test it with.

    Args:
        model: made by `build_weightless`. name: of the model, for the error.

    Raises:
        ConfigError: a model of this config cannot keep the samples of a row apart.
    """
    check_packing(model.config, name)
    language = language_model_of(model)
    if family_of(model.config).causal and is_plain(language.config):
        language.set_attn_implementation(NAME)
