"""Adds LDPv2 (MobileVLM V2, arXiv 2402.03766) as a projector beside Llava's two-layer MLP, and a model class that uses it.

transformers' Llava supports only the MLP. A checkpoint with LDPv2 has the model type `switch_llava` and opens with
`SwitchLlavaForConditionalGeneration.from_pretrained`, or, once this module is imported, with transformers' AutoConfig and
AutoModelForImageTextToText. The checkpoint contains no code.
"""

import math

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from switchkd.settings import LDPV2_GRID


class SwitchLlavaConfig(LlavaConfig):
    """A Llava's config, and `projector_grid`: LDPv2 gives projector_grid² tokens per image."""

    model_type = "switch_llava"
    projector_grid: int = LDPV2_GRID


class LDPv2(nn.Module):
    """The lightweight downsample projector, version 2.

    Linear → GELU → Linear on every token, average pooling to a grid of tokens, and a depthwise 3×3 convolution with a residual,
    which encodes the tokens' positions in the grid. 24×24 features of CLIP-L/14-336 become 12×12 tokens.
    """

    def __init__(self, config: SwitchLlavaConfig) -> None:
        super().__init__()
        width = config.text_config.hidden_size
        layers = config.vision_feature_layer
        features = config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))
        self.linear_1 = nn.Linear(features, width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)
        self.pool = nn.AdaptiveAvgPool2d(config.projector_grid)
        self.position = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, features: Tensor) -> Tensor:
        """Project [B, n, d_v] to [B, grid², d]; n must be a square number, row by row."""
        side = math.isqrt(features.shape[1])
        if side * side != features.shape[1]:
            raise ValueError(f"LDPv2 takes a square grid of features, got {features.shape[1]}")
        tokens = self.linear_2(self.act(self.linear_1(features)))
        grid = self.pool(tokens.mT.unflatten(-1, (side, side)))  # [B, d, grid, grid]
        located: Tensor = (self.position(grid) + grid).flatten(2).mT
        return located


class SwitchLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """A Llava whose projector is LDPv2; its tensor names and interface are those of Llava."""

    config_class = SwitchLlavaConfig

    def __init__(self, config: SwitchLlavaConfig) -> None:
        super().__init__(config)
        self.model.multi_modal_projector = LDPv2(config)
        self.post_init()


def image_token_count(config: LlavaConfig, features: int) -> int:
    """Return the number of tokens that the projector outputs for an image's features.

    Raises:
        ValueError: the projector needs a square grid, and the number of features is not a square.
    """
    if not isinstance(config, SwitchLlavaConfig):
        return features
    if math.isqrt(features) ** 2 != features:
        raise ValueError(
            f"LDPv2 pools a square grid of features, the tower gives {features}: use vision_feature_select_strategy "
            "'default' with a tower that has a class token (CLIP), 'full' with one that has none (SigLIP)"
        )
    return config.projector_grid**2


def model_class(config: LlavaConfig) -> type[LlavaForConditionalGeneration]:
    """Return the class that a config belongs to."""
    return (
        SwitchLlavaForConditionalGeneration if isinstance(config, SwitchLlavaConfig) else LlavaForConditionalGeneration
    )


def register_weight_names(kind: type[LlavaForConditionalGeneration]) -> None:
    """Make transformers read and write Llava's saved tensor names for a class of switchkd, as it does for its own classes.

    Without this, an untied LM head, saved as language_model.lm_head.weight, is not found.
    """
    register_checkpoint_conversion_mapping(kind.__name__, get_checkpoint_conversion_mapping("llava"), overwrite=True)


register_weight_names(SwitchLlavaForConditionalGeneration)
AutoConfig.register(SwitchLlavaConfig.model_type, SwitchLlavaConfig)
AutoModelForImageTextToText.register(SwitchLlavaConfig, SwitchLlavaForConditionalGeneration)
