"""The capture models: any multimodal class of vLLM with a pooler that packs supervised positions. Imported by vLLM alone.

A class is made when it is asked for, as an attribute of this module (see `vllm_plugin.register`).
"""

from collections.abc import Iterable, Mapping, Set
from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.inputs.engine import MultiModalInput
from vllm.model_executor.layers.pooler import Pooler, PoolingParamsUpdate
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder, LlavaMultiModalProcessor, LlavaProcessingInfo
from vllm.multimodal import MULTIMODAL_REGISTRY

from switchkd.models.checkpoint import blank_image, probe_vision
from switchkd.pipelines.capture.backends.vllm_inputs import TOKENS, ItemMaker, image_input
from switchkd.pipelines.capture.backends.vllm_plugin import architecture_of
from switchkd.pipelines.capture.backends.vllm_pooler import RowsPooler

PROFILE_TOP_K = 128
LLAVA = "LlavaForConditionalGeneration"
# vLLM reads the joined weights of their experts as the published checkpoints hold them, input features first. transformers reads
# both ways and saves the other one.
TRANSPOSED_EXPERTS = ("Qwen3VLMoeForConditionalGeneration",)


def __getattr__(name: str) -> Any:
    architecture = architecture_of(name)
    if architecture is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _capture_class(name, architecture)


class _Pooler(RowsPooler, Pooler):
    def get_supported_tasks(self) -> Set[Any]:
        return {"token_embed"}

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        return PoolingParamsUpdate()


class _LlavaProcessor(LlavaMultiModalProcessor):
    """Makes the dummy inputs of the engine's start without a processor of transformers, which a Llava's folder may lack."""

    def get_dummy_mm_inputs(
        self, mm_counts: Mapping[str, int], *, cache: Any = None, scheduler_config: Any = None
    ) -> MultiModalInput:
        config = self.info.get_hf_config()
        image, tokens = config.image_token_index, probe_vision(config)[0]
        make = ItemMaker(self, config, self.info.ctx.model_config.dtype)
        return image_input([image] * tokens, [make({"pixel_values": blank_image(config)})], image, [tokens])


@cache
def _capture_class(name: str, architecture: str) -> Any:
    """Return the class of vLLM that runs `architecture`, with packed rows as its output."""
    base: Any = ModelRegistry.models[architecture].load_model_cls()

    class Capture(base):  # type: ignore[misc]
        is_pooling_model = True
        # Pixels come normalised. A class for which this is True would normalise them again, see EngineArgs.mm_device_do_normalize.
        supports_mm_device_do_normalize = False

        def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            rows = vllm_config.model_config.hf_config.get_text_config().vocab_size
            self.pooler = _Pooler(self.compute_logits, min(PROFILE_TOP_K, rows))

        def embed_multimodal(self, **inputs: Any) -> Any:
            """Return the features of images; vLLM itself would drop those for which the text has no token."""
            counts = inputs.pop(TOKENS, None)
            features = super().embed_multimodal(**inputs)
            found = [len(of_one) for of_one in features]
            if counts is not None and found != (expected := torch.as_tensor(counts).flatten().tolist()):
                raise ValueError(
                    f"images have {expected} tokens in the text, and the model makes {found} features of them"
                )
            return features

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            """Load a checkpoint as transformers saves it."""
            if hasattr(getattr(self, "vision_tower", None), "vision_model"):
                weights = ((_with_vision_model(name), tensor) for name, tensor in weights)
            if architecture in TRANSPOSED_EXPERTS:
                width = self.config.get_text_config().hidden_size
                weights = ((name, _transposed(name, tensor, width)) for name, tensor in weights)
            loaded: set[str] = super().load_weights(weights)
            return loaded

    Capture.__name__ = Capture.__qualname__ = name
    Capture.__module__ = __name__
    if architecture == LLAVA:
        return MULTIMODAL_REGISTRY.register_processor(
            _LlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
        )(Capture)
    return Capture


def _with_vision_model(name: str) -> str:
    """Return a weight's name with the level `vision_model` of its tower, which transformers from 5 on does not write."""
    head, tower, rest = name.partition("vision_tower.")
    return f"{head}{tower}vision_model.{rest}" if tower and not rest.startswith("vision_model.") else name


def _transposed(name: str, tensor: Tensor, width: int) -> Tensor:
    """Return the joined weights of experts as vLLM reads them, whichever way they were saved.

    Args:
        tensor: gate_up_proj [E, 2i, d] or [E, d, 2i], down_proj [E, d, i] or [E, i, d]; others are left alone. width: d.
    """
    dimension = {"gate_up_proj": 2, "down_proj": 1}.get(name.rpartition("experts.")[2])
    return tensor.transpose(1, 2) if dimension is not None and tensor.shape[dimension] == width else tensor
