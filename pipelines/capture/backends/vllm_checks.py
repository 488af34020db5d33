"""Checks of a teacher before vLLM runs it: what would otherwise give other numbers without an error.

They run before the engine starts and before a store is created.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from switchkd.data.media import Media, MediaReader
from switchkd.errors import CheckpointError, ConfigError
from switchkd.library_errors import as_checkpoint_error
from switchkd.losses.lm_head import LogitMap
from switchkd.models.checkpoint import Checkpoint, open_checkpoint
from switchkd.models.families import family_of
from switchkd.pipelines.capture.backends.vllm_plugin import capture_architecture

INSTEAD = "use --backend transformers"
PROBE_SIZE = (80, 56)  # of the probe image, in pixels
# Of normalised pixels, whose spread is about 1: what two implementations of a resize may differ by on a smooth image, on average.
# Pixels that are normalised twice, or not at all, differ by 1 to 250.
PIXEL_TOLERANCE = 0.1
# Of two logits, as a share of the largest, and as much again: rounding of states in half precision.
LOGIT_TOLERANCE = 0.02


def architecture_for(checkpoint: Checkpoint) -> str:
    """Return the name under which vLLM has the capture model of a checkpoint.

    Raises:
        CheckpointError: vLLM has no class for it, or one that reads the vision tower in another way.
    """
    from vllm import ModelRegistry, __version__

    from switchkd.pipelines.capture.backends.vllm_plugin import register

    kind = checkpoint.config.model_type
    layer = getattr(checkpoint.config, "vision_feature_layer", 0)
    if not isinstance(layer, int):
        raise CheckpointError(
            f"{checkpoint.path} is a {kind!r} with vision feature layer {layer}; vLLM takes one layer: {INSTEAD}"
        )
    (architecture, *_) = checkpoint.config.architectures or (_class_name(checkpoint.config),)
    if architecture not in ModelRegistry.get_supported_archs():
        raise CheckpointError(
            f"{checkpoint.path} is a {kind!r}; vLLM {__version__} has no class for its architecture {architecture}: {INSTEAD}"
        )
    register()
    return capture_architecture(architecture)


def _class_name(config: Any) -> str:
    from transformers import AutoModelForImageTextToText

    return str(AutoModelForImageTextToText._model_mapping[type(config)].__name__)


def check_platform(model_config: Any, checkpoint: Checkpoint, expert_parallel: bool = False) -> None:
    """Check that vLLM's attention on this platform does what the family's class does.

    Args:
        model_config: vLLM's, of the checkpoint. expert_parallel: whether its experts are to be spread over devices.

    Raises:
        ConfigError: expert parallel on a CPU, where vLLM's process crashes.
        CheckpointError: a mask or a layer that vLLM does not implement here; it would run, with other states.
    """
    from vllm.platforms import current_platform

    if expert_parallel and current_platform.is_cpu():
        raise ConfigError(
            "--vllm-option enable_expert_parallel: vLLM's kernel for experts on a CPU crashes with it (seen in 0.32): leave it "
            "out, or use GPUs"
        )
    kind, family = checkpoint.config.model_type, family_of(checkpoint.config, checkpoint.path)
    where = str(current_platform.device_name).upper()
    if family.type_ids.endswith("suffix"):
        raise CheckpointError(
            f"{checkpoint.path}: tokens of a {kind} see the whole prompt in both directions, while vLLM lets them see an image "
            f"alone so: {INSTEAD}"
        )
    if (model_config.is_mm_prefix_lm or not family.causal) and not (
        current_platform.is_cuda() or current_platform.is_rocm()
    ):
        raise CheckpointError(
            f"{checkpoint.path}: image tokens of a {kind} see each other in both directions, while vLLM's attention on "
            f"{where} lets each see earlier ones alone: {INSTEAD}, or a GPU"
        )
    if model_config.is_hybrid and current_platform.is_cpu():
        raise CheckpointError(
            f"{checkpoint.path}: vLLM's linear attention, of which a {kind} has layers, is not reliable on {where}: "
            f"{INSTEAD}, or a GPU"
        )


class StructureProbe:
    """A probe image in a short text: as our encoder makes a request of it, and as vLLM's own processor does.

    Args:
        processor: vLLM's. make: makes items of it.

    Raises:
        CheckpointError: a processor fails.
    """

    def __init__(self, checkpoint: Checkpoint, processor: Any, make: Any) -> None:
        from switchkd.pipelines.capture.backends.vllm_inputs import image_input

        self.path, self.kind = checkpoint.path, checkpoint.config.model_type
        self._tokenizer, self._image_id = checkpoint.tokenizer, checkpoint.image_token_id
        # The folder's own image processor, which vLLM has: options such as --max-pixels change ours alone.
        reader = MediaReader(open_checkpoint(checkpoint.path, checkpoint.trust_remote_code))
        picture = _picture()
        with as_checkpoint_error(checkpoint.path, "the image processor of {} fails on a probe image"):
            self.media: Media = reader.read([picture])
            self.image_tokens = reader.counts(self.media)
            ids = self._tokens(reader.text_of(self.media.texts[0], own_template=False))
            self.ours: Any = image_input(ids, [make(self.media.columns)], self._image_id, self.image_tokens)
        self._marked = self._tokens(reader.text_of(reader.marker, own_template=False))
        self._processor, self._picture = processor, picture

    @property
    def ids(self) -> list[int]:
        """The token ids of our request."""
        return list(self.ours["prompt_token_ids"])

    def check(self) -> None:
        """Compare the two requests: ids, where features go, and name, shape, dtype and values of every argument of the model.

        Raises:
            CheckpointError: they differ; or vLLM's processor fails.
        """
        with as_checkpoint_error(self.path, "vLLM's processor of {} fails on a probe image", INSTEAD):
            images = self._processor.info.parse_mm_data({"image": [self._picture]})
            theirs = self._processor(self._marked, images)
        differences = [*self._differences(theirs)]
        if differences:
            raise CheckpointError(
                f"{self.path}: vLLM would read an image of a {self.kind} otherwise than the trainer: "
                f"{'; '.join(differences)}. {INSTEAD.capitalize()}"
            )

    def _tokens(self, image: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(f"a {image} b", add_special_tokens=False)
        return ids

    def _differences(self, theirs: Any) -> list[str]:
        from switchkd.pipelines.capture.backends.vllm_inputs import TOKENS

        found = []
        if self.ids != list(theirs["prompt_token_ids"]):
            found.append(f"{len(theirs['prompt_token_ids'])} token ids for {len(self.ids)}, or others")
        ours_at, theirs_at = (
            [_features_at(place) for place in side["mm_placeholders"].get("image", [])] for side in (self.ours, theirs)
        )
        if ours_at != theirs_at:
            found.append(f"its features go to positions {_short(theirs_at)} for {_short(ours_at)}")
        mine, other = (side["mm_kwargs"]["image"][0].get_data() for side in (self.ours, theirs))
        del mine[TOKENS]
        return found + compare_arguments(mine, other)


def compare_arguments(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return how the arguments that vLLM's model is given for one image differ; nothing if they are the same up to rounding."""
    found = [f"it has no {name}" for name in sorted(ours.keys() - theirs.keys())]
    found += [f"it also wants {name}" for name in sorted(theirs.keys() - ours.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        mine, other = torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])
        if (mine.shape, mine.dtype) != (other.shape, other.dtype):
            found.append(
                f"{name} is {tuple(other.shape)} {other.dtype} there, {tuple(mine.shape)} {mine.dtype} here".replace(
                    "torch.", ""
                )
            )
        elif not mine.is_floating_point():
            if not torch.equal(mine, other):
                found.append(f"{name} has other values there")
        elif (away := float((mine.float() - other.float()).abs().mean())) > PIXEL_TOLERANCE:
            found.append(f"{name} is off by {away:.2g} on average there, as if pixels were normalised in another way")
    return found


def check_logit_map(path: Any, found: LogitMap, product: Tensor, logits: Tensor) -> None:
    """Check that the logits of vLLM's class are the trainer's: what `found` makes of the LM head's product.

    Args:
        product: [P, K], the LM head times final states, at the ids of `logits`. logits: [P, K], vLLM's.

    Raises:
        CheckpointError: they are not.
    """
    expected = found(product.float())
    away = float((expected - logits).abs().max())
    if away > LOGIT_TOLERANCE * (1 + float(expected.abs().max())):
        slope = float((logits * product).sum() / product.square().sum())
        raise CheckpointError(
            f"{path}: vLLM's logits are not the trainer's, which are the LM head times the final states with {found}; they are "
            f"off by {away:.3g}, about {slope:.3g} times the product. {INSTEAD.capitalize()}"
        )


def _picture() -> Image.Image:
    """Return a smooth image, on which resizing methods agree."""
    width, height = PROBE_SIZE
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = (across, down, np.sin(np.pi * across) * down)
    return Image.fromarray(np.stack([255 * wave for wave in waves], axis=-1).astype(np.uint8))


def _features_at(place: Any) -> list[int]:
    """Return the positions of the prompt that get a feature of one image."""
    filled = range(place.length) if place.is_embed is None else place.is_embed.nonzero().flatten().tolist()
    return [place.offset + index for index in filled]


def _short(positions: list[list[int]]) -> str:
    return ", ".join(f"{at[0]}…{at[-1]} ({len(at)})" for at in positions if at) or "none"
