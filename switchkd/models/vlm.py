"""Loads VLMs and runs their components: vision tower V, projector P, language model L (paper, section 3.1).

Every VLM here is an ordinary checkpoint of one of transformers' families (`families.py`), or a Llava whose projector is LDPv2
(`projectors.py`). This module loads one, whole or without its vision tower.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from switchkd.errors import CheckpointError
from switchkd.fingerprints import weight_files
from switchkd.library_errors import as_checkpoint_error
from switchkd.models.checkpoint import Checkpoint, blank_image
from switchkd.models.components import layers_of, tower_of
from switchkd.models.families import family_of
from switchkd.models.features import final_states, image_outputs, media_of, output_tensors
from switchkd.models.hollow import load_hollow
from switchkd.models.projectors import (
    SwitchLlavaConfig,
    SwitchLlavaForConditionalGeneration,
    register_weight_names,
)
from switchkd.positions import predicting_rows
from switchkd.printable import printable
from switchkd.waits import Waiting


class LlavaWithoutVision(LlavaForConditionalGeneration):
    """A Llava without a vision tower, whose weights are neither read from disk nor kept in memory."""

    _keys_to_ignore_on_load_unexpected = [r"vision_tower\."]

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)  # from_pretrained builds on the meta device, so building the tower allocates no memory
        self.model.vision_tower = None


class SwitchLlavaWithoutVision(LlavaWithoutVision, SwitchLlavaForConditionalGeneration):
    """`LlavaWithoutVision` with the LDPv2 projector."""

    config_class = SwitchLlavaConfig


WITHOUT_VISION: dict[type[Any], type[Any]] = {
    LlavaForConditionalGeneration: LlavaWithoutVision,
    SwitchLlavaForConditionalGeneration: SwitchLlavaWithoutVision,
}
for _kind in WITHOUT_VISION.values():
    register_weight_names(_kind)


HEAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_model(checkpoint: Checkpoint, *, vision: bool = True, dtype: str | torch.dtype = "auto") -> Any:
    """Load a checkpoint's weights on the CPU, in evaluation mode; safetensors only.

    Args:
        vision: if False, the vision tower is left out: a Llava has none, another model a hollow one (`hollow.py`).
        dtype: "auto" keeps the checkpoint's, else "float32", "bfloat16", …

    Returns:
        A model of the class that transformers has for the checkpoint's config.

    Raises:
        CheckpointError: weights missing, of another shape, or not safetensors.
    """
    checkpoint.require_whole_weights("pass the checkpoint that it was made from")
    config = checkpoint.config
    kind = AutoModelForImageTextToText._model_mapping[type(config)]
    _require_enough_weights(checkpoint, vision)
    with as_checkpoint_error(checkpoint.path), Waiting(f"loading the weights of {printable(checkpoint.path)}"):
        if vision or family_of(config).is_llava:
            kind = kind if vision else WITHOUT_VISION[kind]
            model, report = kind.from_pretrained(
                checkpoint.path, dtype=dtype, use_safetensors=True, output_loading_info=True, local_files_only=True
            )
        else:
            wanted = checkpoint.resolve_dtype(dtype) if isinstance(dtype, str) else dtype
            model, report = load_hollow(kind, config, checkpoint.path, wanted)
    if missing := sorted(set(report["missing_keys"]) - {"lm_head.weight"}):
        raise CheckpointError(f"{checkpoint.path} lacks {len(missing)} weights, the first is {missing[0]}")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if "lm_head.weight" in report["missing_keys"] and not tied:
        raise CheckpointError(
            f"{checkpoint.path} lacks lm_head.weight, and its config does not tie it to the embedding"
        )
    return model.eval()


def load_lm_head(checkpoint: Checkpoint, dtype: str) -> Tensor:
    """Read only the LM head's weight, [V, d]; if it is tied, from the embedding.

    Raises:
        CheckpointError: no such weight, of another shape, or a damaged file.
    """
    rows, width = checkpoint.config.text_config.vocab_size, checkpoint.config.text_config.hidden_size
    endings = ("lm_head.weight",) + (("embed_tokens.weight",) if checkpoint.config.tie_word_embeddings else ())
    for ending in endings:
        for name, tensors in _saved_tensors(checkpoint.path, ("language",)):
            if name.endswith(ending):
                saved = tensors.get_tensor(name)
                if saved.dtype not in HEAD_DTYPES:
                    raise CheckpointError(
                        f"{checkpoint.path}: {name} is {saved.dtype}, whose scale is stored elsewhere; expected a checkpoint whose "
                        "LM head is not quantised"
                    )
                head: Tensor = saved.to(getattr(torch, dtype))
                if head.shape != (rows, width):
                    raise CheckpointError(
                        f"{checkpoint.path}: {name} is {tuple(head.shape)}, its config says {(rows, width)}: copy the weights or "
                        "the config again"
                    )
                return head
    raise CheckpointError(f"{checkpoint.path} holds no {' or '.join(endings)}")


def _saved_tensors(folder: Path, components: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield (name, open safetensors file that holds it) of a checkpoint's tensors; no bytes of them are read.

    Raises:
        CheckpointError: a file is missing, cut short, or no safetensors file.
    """
    for file in weight_files(folder, components):
        with as_checkpoint_error(folder, f"cannot read {file.name} of {{}}", "copy it again"):
            opened = safe_open(file, framework="pt")
        with opened as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                yield name, tensors


def _require_enough_weights(checkpoint: Checkpoint, vision: bool) -> None:
    """Compare how many numbers the largest matrices of a config have with those in the weight files.

    transformers makes new weights for those that are missing, so that a wrong number in a config could take all memory before the
    missing ones are reported.

    Raises:
        CheckpointError: the config describes a model several times as large as its weights.
    """
    components = ("vision", "projector", "language") if vision else ("projector", "language")
    held = sum(
        math.prod(tensors.get_slice(name).get_shape()) for name, tensors in _saved_tensors(checkpoint.path, components)
    )
    text, tower = checkpoint.config.text_config, checkpoint.config.vision_config
    query = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    described = text.hidden_size * (text.vocab_size + text.num_hidden_layers * (text.intermediate_size + query))
    if vision and family_of(checkpoint.config).is_llava:  # others have other names for these
        described += tower.num_hidden_layers * tower.hidden_size * tower.intermediate_size
    if described > 4 * held + (1 << 20):
        raise CheckpointError(
            f"{checkpoint.path}: its config.json describes a model of at least {described:,} weights, its safetensors files hold "
            f"{held:,}: they do not belong together, or a file is missing. Copy both again"
        )


def freeze(model: nn.Module) -> nn.Module:
    """Stop gradients to every parameter; activations still carry them."""
    return model.requires_grad_(False).eval()


def enable_activation_checkpointing(*towers: nn.Module | None, dropout: bool = False) -> None:
    """Recompute the activations of each layer in the backward pass instead of keeping them; results are the same.

    transformers' own option works only in training mode, while a frozen teacher is in evaluation mode. It also makes embeddings
    require a gradient, so that the backward pass runs through towers that are not trained.

    Args:
        towers: vision towers or language models; None is skipped. dropout: whether they draw random numbers.
    """
    for layer in (layer for tower in towers if tower is not None for layer in layers_of(tower)):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=dropout)


def freeze_unused_vision(model: Any, media: Mapping[str, Tensor] | None = None) -> list[str]:
    """Freeze the parameters of the vision tower that receive no gradient, and return their names.

    If the feature layer is not the last, the later layers, the final norm and the pooling head are unused; a trainable parameter
    without a gradient makes DistributedDataParallel fail. The graph of one image's forward pass tells them.

    Args:
        media: of any image, as the checkpoint's processor makes it; a Llava takes a blank image by default.
    """
    tower = tower_of(model)
    assert tower is not None
    outputs = image_outputs(model, blank_media(model.config) if media is None else media)
    reached = _parameters_behind(output_tensors(outputs))
    unused = {id(p) for p in tower.parameters() if p.requires_grad} - reached
    names = [name for name, p in tower.named_parameters() if id(p) in unused]
    for parameter in tower.parameters():
        if id(parameter) in unused:
            parameter.requires_grad_(False)
    return names


def _parameters_behind(tensors: list[Tensor]) -> set[int]:
    """Return the ids of the parameters that a gradient of these tensors would reach, by their graph; no gradient is computed."""
    waiting: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen, found = set(waiting), set()
    while waiting:
        node = waiting.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        waiting += new
    return found


def blank_media(config: Any) -> dict[str, Tensor]:
    """Return the media of a blank image for a Llava, see `checkpoint.blank_image`."""
    assert family_of(config).is_llava, "other families take the media of an image that their processor made"
    return {"pixel_values": blank_image(config)}


def states_at_positions(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Run a VLM over a batch, and return its final hidden states at the rows that predict supervised tokens.

    The caller decides whether a graph is recorded (`torch.no_grad`, `torch.inference_mode`).

    Args:
        model: on any device, in any dtype. batch: the result of `encoded.collate`, on any device; it is not modified.

    Returns:
        [P, d] on the model's device, after the final norm, in row-major order of `positions.predicting_rows`.
    """
    ids, mask, labels = (batch[name].to(model.device) for name in ("input_ids", "attention_mask", "labels"))
    return final_states(model, ids, mask, labels, media_of(batch))[predicting_rows(labels)]
