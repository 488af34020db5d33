"""The capture model: vLLM's Llava with a pooler that packs supervised positions. Imported by vLLM alone."""

from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.inputs.engine import MultiModalInput, mm_input
from vllm.model_executor.layers.pooler import Pooler, PoolingParamsUpdate
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange

from switchkd.models.checkpoint import blank_image, probe_vision
from switchkd.pipelines.capture.backends.vllm_pooler import RowsPooler

PROFILE_TOP_K = 128


def image_input(ids: list[int], pixels: Tensor, image_id: int, image_tokens: int, name: str) -> MultiModalInput:
    """Return a request with an image in the form of vLLM's engine, without vLLM's processors.

    Args:
        ids: [L], the image's tokens expanded. pixels: [3, H, W]. name: the image's hash, for the encoder's cache.
    """
    data = BatchFeature({"pixel_values": pixels[None]})
    items = MultiModalKwargsItems.from_hf_inputs(data, {"pixel_values": MultiModalFieldConfig.batched("image")})
    place = PlaceholderRange(offset=ids.index(image_id), length=image_tokens)
    return mm_input(ids, items, {"image": [name]}, {"image": [place]})


class _Processor(LlavaMultiModalProcessor):
    """Makes the dummy inputs of the engine's start; real requests are already processed, with the same pixels as in training."""

    def get_dummy_mm_inputs(
        self, mm_counts: Mapping[str, int], *, cache: Any = None, scheduler_config: Any = None
    ) -> MultiModalInput:
        config = self.info.get_hf_config()
        tokens = probe_vision(config)[0]
        pixels = blank_image(config)[0].to(self.info.ctx.model_config.dtype)
        return image_input([config.image_token_index] * tokens, pixels, config.image_token_index, tokens, "blank")


class _Pooler(RowsPooler, Pooler):
    def get_supported_tasks(self) -> Set[Any]:
        return {"token_embed"}

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        return PoolingParamsUpdate()


@MULTIMODAL_REGISTRY.register_processor(_Processor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder)
class CaptureLlava(LlavaForConditionalGeneration):
    """A Llava whose output is packed rows."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        rows = vllm_config.model_config.hf_config.text_config.vocab_size
        self.pooler = _Pooler(self.compute_logits, min(PROFILE_TOP_K, rows))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint with transformers' names, with or without the level `vision_model` that vLLM expects."""
        loaded: set[str] = super().load_weights((_with_vision_model(name), tensor) for name, tensor in weights)
        return loaded


def _with_vision_model(name: str) -> str:
    head, tower, rest = name.partition("vision_tower.")
    return f"{head}{tower}vision_model.{rest}" if tower and not rest.startswith("vision_model.") else name
