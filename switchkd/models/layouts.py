"""Converts tensor names and configs between transformers and the checkpoint layouts of other projects, in both directions.

    layout      made by                              language model      vision tower                    projector
    tinyllava   TinyLLaVA Factory, LLaVA-KD          language_model.*    vision_tower._vision_tower.*    connector._connector.*
    llava       LLaVA (1.5, Qwen, …), MobileVLM V2   model.*             model.vision_tower.*            model.mm_projector.*
    hf          transformers, switchkd

The first two insert an image where the text contains the id -200, which is no token's; hf has a token <image>.
"""

import re
from typing import Any

from transformers import AutoConfig, LlavaConfig

from switchkd.errors import CheckpointError
from switchkd.models.checkpoint import CONFIGS
from switchkd.models.projectors import SwitchLlavaConfig
from switchkd.settings import LDPV2_GRID

LAYOUTS = ("hf", "tinyllava", "llava")
_VISION, _PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."
_LDPV2 = [
    ("model.mm_projector.mlp.mlp.0.", f"{_PROJECTOR}linear_1."),
    ("model.mm_projector.mlp.mlp.2.", f"{_PROJECTOR}linear_2."),
    ("model.mm_projector.peg.peg.0.", f"{_PROJECTOR}position."),
]
_MLP = [("model.mm_projector.0.", f"{_PROJECTOR}linear_1."), ("model.mm_projector.2.", f"{_PROJECTOR}linear_2.")]
# (prefix in the layout, prefix in transformers); the first match is used, so longer prefixes come before shorter ones
_PREFIXES: dict[str, list[tuple[str, str]]] = {
    "tinyllava": [
        ("vision_tower._vision_tower.vision_model.", _VISION),
        ("connector._connector.0.", f"{_PROJECTOR}linear_1."),
        ("connector._connector.2.", f"{_PROJECTOR}linear_2."),
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
    ],
    "llava": [
        ("model.vision_tower.vision_tower.vision_model.", _VISION),
        ("model.", "model.language_model."),
        ("lm_head.", "lm_head."),
    ],
}
RECOMPUTED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")  # buffers that old versions saved
_STRATEGIES = {"patch": "default", "cls_patch": "full"}
_BACK = {ours: theirs for theirs, ours in _STRATEGIES.items()}
# Substring of the architecture or model type → text model type; the first match is used.
_TEXT_TYPES = {"qwen3": "qwen3", "qwen": "qwen2", "mistral": "mistral", "llama": "llama", "llava": "llama"}
_ARCHITECTURES = {
    "qwen2": "LlavaQwenForCausalLM",
    "qwen3": "LlavaQwen3ForCausalLM",
    "mistral": "LlavaMistralForCausalLM",
}
_LLAVA_ONLY = ("mm_", "image_", "tokenizer_", "tune_", "freeze_", "unfreeze_", "use_mm_", "architectures", "model_type")


def layout_of(config: dict[str, Any]) -> str:
    """Return the layout that a config.json belongs to. Raises CheckpointError for any other model."""
    kind = config.get("model_type", "")
    if kind == "tinyllava":
        return "tinyllava"
    if "mm_projector_type" in config:  # original LLaVA's model type is also "llava"
        return "llava"
    if kind in CONFIGS:
        return "hf"
    raise CheckpointError(f"a {kind!r} model is in none of the layouts {', '.join(LAYOUTS)}")


def _prefixes(layout: str, config: LlavaConfig) -> list[tuple[str, str]]:
    if layout != "llava":
        return _PREFIXES[layout]
    return (_LDPV2 if isinstance(config, SwitchLlavaConfig) else _MLP) + _PREFIXES["llava"]


def to_hf(name: str, layout: str, config: LlavaConfig) -> str | None:
    """Return transformers' name of a layout's tensor; None for a name that the layout does not have."""
    for theirs, ours in _prefixes(layout, config):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return None


def from_hf(name: str, layout: str, config: LlavaConfig) -> str:
    """Return a layout's name of a transformers tensor."""
    for theirs, ours in _prefixes(layout, config):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(name)


def config_to_hf(config: dict[str, Any], vision: Any, image_token: int, strategy: str | None) -> LlavaConfig:
    """Return the Llava config that is equivalent to the config of another layout.

    Args:
        config: the config.json. vision: the vision tower's config for layout llava, whose config only names the tower; else None.
        image_token: id of the token <image>. strategy: "default" or "full", overrides the config.

    Raises:
        CheckpointError: a component has no counterpart in transformers; names it.
    """
    tiny = layout_of(config) == "tinyllava"
    projector = config["connector_type" if tiny else "mm_projector_type"]
    if projector != "mlp2x_gelu" and (tiny or projector != "ldpnetv2"):
        raise CheckpointError(
            f"projector {projector!r}: mlp2x_gelu can be converted" + ("" if tiny else ", and MobileVLM V2's ldpnetv2")
        )
    if config.get("mm_use_im_start_end"):
        raise CheckpointError("mm_use_im_start_end wraps images in two tokens, which Llava does not")
    layer = config.get("vision_feature_layer" if tiny else "mm_vision_select_layer", -2)
    select = config.get("vision_feature_select_strategy" if tiny else "mm_vision_select_feature") or "patch"
    if strategy is None and select not in _STRATEGIES:
        raise CheckpointError(f"features {select!r}: {' and '.join(_STRATEGIES)} are known")
    text = _text_config(config, tiny)
    settings = {
        "vision_config": AutoConfig.for_model(**config["vision_config"]) if tiny else vision,
        "text_config": text,
        "image_token_index": image_token,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy or _STRATEGIES[select],
        "tie_word_embeddings": text.tie_word_embeddings,
        "dtype": config.get("dtype") or config.get("torch_dtype"),
    }
    return (
        SwitchLlavaConfig(**settings, projector_grid=LDPV2_GRID) if projector == "ldpnetv2" else LlavaConfig(**settings)
    )


def _text_config(config: dict[str, Any], tiny: bool) -> Any:
    if tiny:
        return AutoConfig.for_model(**config["text_config"])
    names = " ".join([*(config.get("architectures") or []), config.get("model_type", "")]).lower()
    kind = next((kind for word, kind in _TEXT_TYPES.items() if word in names), None)
    if kind is None:
        raise CheckpointError(f"no language model is known for {names!r}; known are {', '.join(_TEXT_TYPES)}")
    return AutoConfig.for_model(kind, **{k: v for k, v in config.items() if not k.startswith(_LLAVA_ONLY)})


def config_from_hf(config: LlavaConfig, layout: str, language: str, vision: str, padded: bool) -> dict[str, Any]:
    """Return the config.json of a Llava in another layout.

    Args:
        language, vision: where the other project finds the components' configs, tokenizer and image processor. padded: whether
            images are padded to squares.

    Raises:
        CheckpointError: the layout cannot express a setting.
    """
    text, tower, ldpv2 = config.text_config, config.vision_config, isinstance(config, SwitchLlavaConfig)
    if not isinstance(config.vision_feature_layer, int):
        raise CheckpointError(f"layout {layout} projects one layer's features, not {config.vision_feature_layer}")
    if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
        raise CheckpointError(f"layout {layout} has projectors with GELU and biases only")
    if ldpv2 and (layout == "tinyllava" or config.projector_grid != LDPV2_GRID):
        raise CheckpointError(
            f"layout {layout} has no LDPv2 with a grid of {config.projector_grid}; llava has one of {LDPV2_GRID}"
        )
    layer, select = config.vision_feature_layer, _BACK[config.vision_feature_select_strategy]
    ratio = "pad" if padded else "square"
    if layout == "llava":
        flat: dict[str, Any] = text.to_dict()
        flat |= {
            "architectures": [_ARCHITECTURES.get(text.model_type, "LlavaLlamaForCausalLM")],
            "model_type": f"llava_{text.model_type}",
            "mm_vision_tower": vision,
            "mm_projector_type": "ldpnetv2" if ldpv2 else "mlp2x_gelu",
            "mm_hidden_size": tower.hidden_size,
            "mm_vision_select_layer": layer,
            "mm_vision_select_feature": select,
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
            "image_aspect_ratio": ratio,
            "torch_dtype": str(config.dtype).removeprefix("torch."),
        }
        return flat
    return {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "llm_model_name_or_path": language,
        "tokenizer_name_or_path": language,
        "vision_model_name_or_path": vision,
        "connector_type": "mlp2x_gelu",
        "text_config": text.to_dict(),
        "vision_config": tower.to_dict(),
        "hidden_size": text.hidden_size,
        "vocab_size": text.vocab_size,
        "vision_hidden_size": tower.hidden_size,
        "ignore_index": -100,
        "image_token_index": -200,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": select,
        "image_aspect_ratio": ratio,
        "tokenizer_padding_side": "right",
        "torch_dtype": str(config.dtype).removeprefix("torch."),
    }
