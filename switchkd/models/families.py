"""The families of vision-language models: what this package must know of each beyond what transformers' own classes do.

A family is one entry of `FAMILIES`, keyed by transformers' model type. The model's own code scatters image features into the text,
computes positions and masks, and joins tiles; the entry names what it cannot be asked for. `tests/families` runs every entry.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from switchkd.errors import CheckpointError
from switchkd.losses.lm_head import LogitMap

MediaRule = Literal["concatenate", "pad"]
"""How one column of several samples' media becomes a batch's: concatenated along the first dimension; or the same after all other
dimensions were padded with zeros to the largest (tiles of [images, tiles, 3, H, W], images of several sizes)."""
TypeIds = Literal["none", "mm_token_type_ids = image", "token_type_ids = image", "token_type_ids = suffix"]
"""Which argument tells a model what a token is, and what it is 1 for. A model that is not given it computes other logits without
an error. "suffix": from a sample's first supervised token on, all before it attend to each other in both directions."""


LLAVA = ("llava", "switch_llava")
PIXELS: dict[str, MediaRule] = {"pixel_values": "concatenate"}
TILES: dict[str, MediaRule] = {"pixel_values": "pad", "image_sizes": "concatenate"}
MASKED: dict[str, MediaRule] = {"pixel_values": "pad", "pixel_attention_mask": "pad"}
GRID: dict[str, MediaRule] = {"pixel_values": "concatenate", "image_grid_thw": "concatenate"}


@dataclass(frozen=True)
class Family:
    """What is known of one family.

    Attributes:
        model_type: transformers' name.
        cuts: the modules of the projector P, below the model's body, whose inputs are V(x); `name.*` are the items of a list. What
            comes before them is the vision tower V, whatever module it is part of.
        media: columns that `get_image_features` takes, each with its collation rule.
        type_ids: see `TypeIds`.
        mrope: whether positions have three axes. They are the model's own (`get_rope_index`); packed rows get [4, R, N] of them.
        packs: whether packed rows give each sample its own states; tested again at every start by `enable_packing`.
        first_position: the position id of a sample's first token.
        causal: whether no token sees a later one.
        caps_logits: whether the class applies the text config's final_logit_softcapping itself.
        teaches_only: a model that is no student here.
        overview: which tile of a tiled image shows it whole, 0 or -1; None if images are not tiled.
        switch_note: what speaks against VSD between models of the family, which is off there by default; empty where it makes
            sense.
    """

    model_type: str
    cuts: tuple[str, ...] = ("multi_modal_projector",)
    media: Mapping[str, MediaRule] = field(default_factory=PIXELS.copy)
    type_ids: TypeIds = "none"
    mrope: bool = False
    packs: bool = True
    first_position: int = 0
    causal: bool = True
    caps_logits: bool = False
    teaches_only: bool = False
    overview: Literal[0, -1] | None = None
    switch_note: str = ""

    @property
    def keeps_prefix(self) -> bool:
        """Whether `SharedPrefixCache` may be used: positions have one axis, and no mask looks ahead."""
        return self.causal and not self.mrope

    @property
    def is_llava(self) -> bool:
        """Whether one image always becomes the same number of tokens, and P is one module that reads [images, n, d_v]."""
        return self.model_type in LLAVA


DEEPSTACK = ("visual.merger", "visual.deepstack_merger_list.*")
_MROPE: dict[str, Any] = {"media": GRID, "type_ids": "mm_token_type_ids = image", "mrope": True}
_TWO_TILINGS = (
    "models of this family tile an image differently from size to size, while VSD needs the same tiles; with two tilings, "
    "CE and Align train on two views of a sample"
)
_FAMILIES = (
    Family("llava"),
    Family("switch_llava"),
    Family("vipllava"),
    Family("llava_next", media=TILES, overview=0),
    Family("llava_onevision", media=TILES | {"batch_num_images": "concatenate"}, overview=0),
    Family("qwen2_vl", cuts=("visual.merger",), **_MROPE),
    Family("qwen2_5_vl", cuts=("visual.merger",), **_MROPE),
    Family("qwen3_vl", cuts=DEEPSTACK, **_MROPE),
    Family("qwen3_vl_moe", cuts=DEEPSTACK, teaches_only=True, **_MROPE),
    Family("qwen3_5", cuts=("visual.merger",), packs=False, **_MROPE),  # linear attention mixes a row's samples
    Family("qwen3_5_moe", cuts=("visual.merger",), packs=False, teaches_only=True, **_MROPE),
    Family("glm4v", cuts=("visual.post_layernorm",), **_MROPE),  # a convolution behind it merges patches
    Family("glm46v", cuts=("visual.post_layernorm",), **_MROPE),
    Family("smolvlm", cuts=("connector",), media=MASKED, overview=-1, switch_note=_TWO_TILINGS),
    Family("idefics3", cuts=("connector",), media=MASKED, overview=-1),
    Family("internvl", overview=-1),
    Family(
        "gemma3",
        type_ids="token_type_ids = image",
        packs=False,
        causal=False,
        switch_note="all sizes of Gemma 3 have the same frozen tower, so VSD is about 0 until training moves it",
    ),
    Family("paligemma", type_ids="token_type_ids = suffix", first_position=1, causal=False, caps_logits=True),
    Family("mistral3", media=TILES),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _FAMILIES}
MEDIA: tuple[str, ...] = tuple(dict.fromkeys(name for family in _FAMILIES for name in family.media))
"""Every column of media that some family takes."""
assert {family.type_ids for family in _FAMILIES} <= set(get_args(TypeIds))


def family_of(config: Any, path: str | Path | None = None) -> Family:
    """Return the family of a model's config.

    Args:
        path: of the checkpoint, for the error.

    Raises:
        CheckpointError: a model of no family here; says what it lacks.
    """
    kind = getattr(config, "model_type", None)
    if kind in FAMILIES:
        return FAMILIES[kind]
    raise CheckpointError(
        f"{path or 'the model'} is a {kind!r} model, which {_what_it_lacks(config)}. Supported: {', '.join(FAMILIES)}"
    )


def _what_it_lacks(config: Any) -> str:
    """Return why a model cannot be used, for an error; imports its class."""
    from transformers import AutoModelForImageTextToText

    try:
        kind = AutoModelForImageTextToText._model_mapping[type(config)]
    except KeyError:
        return "transformers does not know as a model that reads images and text and writes text"
    if "mm_encoder_outputs" not in inspect.signature(kind.forward).parameters:
        return f"cannot be given image features: {kind.__name__}.forward takes no mm_encoder_outputs"
    return "has no entry in switchkd/models/families.py, which names the modules of its projector (docs/families.md)"


def logit_map_of(config: Any, path: str | Path | None = None) -> LogitMap:
    """Return what a model computes of its LM head's product: a soft-cap where its class applies one.

    Some language models scale or cap logits in a class of their own (logits_scaling of Granite, logit_scale of Cohere, Gemma 2's
    final_logit_softcapping). A vision-language class of transformers that holds their body drops it, while vLLM applies it: one
    checkpoint would have two sets of logits.

    Raises:
        CheckpointError: such a model, whose logits differ between backends.
    """
    text = config.get_text_config()
    cap = getattr(text, "final_logit_softcapping", None)
    if cap is not None and family_of(config, path).caps_logits:
        return LogitMap(softcap=float(cap))
    dropped = {"final_logit_softcapping": cap} if cap is not None else {}
    dropped |= {
        name: value
        for name in ("logits_scaling", "logit_scale")
        if (value := getattr(text, name, None)) is not None and value != 1
    }
    if dropped:
        said = ", ".join(f"{name} = {value}" for name, value in dropped.items())
        raise CheckpointError(
            f"{path or 'the model'}: its language model ({text.model_type}) asks for {said}, which transformers' "
            f"{config.model_type} class leaves out and vLLM applies, so its logits depend on the program that runs it. Use a "
            "checkpoint with another language model, or one whose LM head has the factor in its weights"
        )
    return LogitMap()
