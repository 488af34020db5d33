"""Loading of the components of which a checkpoint is assembled: vision tower, image processor, tokenizer."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from switchkd.errors import CheckpointError
from switchkd.library_errors import as_checkpoint_error
from switchkd.models.checkpoint import CONFIGS, open_checkpoint
from switchkd.models.components import tower_of
from switchkd.models.vlm import load_model

IMAGE_TOKEN = "<image>"


def read_vision_config(folder: Path) -> Any:
    """Return the config of a vision tower's folder, of a SigLIP or CLIP folder with both towers, or of a Llava's tower.

    Raises:
        CheckpointError: the folder contains none of these.
    """
    with as_checkpoint_error(folder):
        config: Any = AutoConfig.from_pretrained(folder)
        config = getattr(config, "vision_config", config)
        if not hasattr(config, "image_size") or not hasattr(config, "hidden_size"):
            raise CheckpointError(
                f"{folder} is a {config.model_type!r} model; expected a vision tower (SigLIP, CLIP, …)"
            )
    return config


def load_tower(folder: Path, config: Any) -> nn.Module:
    """Load a vision tower from a folder that `read_vision_config` reads, as `config` describes it; safetensors only.

    Raises:
        CheckpointError: weights missing, of another shape, or not safetensors.
    """
    with as_checkpoint_error(folder):
        if AutoConfig.from_pretrained(folder).model_type in CONFIGS:
            whole = tower_of(load_model(open_checkpoint(folder)))
            assert whole is not None
            return whole
        kind = AutoModel._model_mapping[type(config)]  # for a folder with both towers, AutoModel would load the pair
        tower, report = kind.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True, local_files_only=True
        )
    require_all_weights(folder, report)
    found: nn.Module = tower
    return found


def require_all_weights(folder: Path, report: dict[str, Any], tied: bool = False) -> None:
    """Check transformers' loading report. Raises CheckpointError if weights are missing, except a tied LM head's."""
    missing = sorted(set(report["missing_keys"]) - ({"lm_head.weight"} if tied else set()))
    if missing:
        raise CheckpointError(f"{folder} lacks {len(missing)} weights, the first is {missing[0]}")


def tokenizer_with_image(language: Path, other: Path | None = None, trust_remote_code: bool = False) -> Any:
    """Return a language model's tokenizer with the token <image>, which is added at its end if it is missing.

    Args:
        other: a folder with the tokenizer to use instead, such as the teacher's; it must give every token of the language
            model's tokenizer the same id.

    Raises:
        CheckpointError: no fast tokenizer, or ids that differ.
    """
    found = []
    for folder in (language, *([] if other is None else [other])):
        with as_checkpoint_error(folder):
            found.append(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
        if not getattr(found[-1], "is_fast", False):
            raise CheckpointError(f"{folder} has a slow tokenizer; a tokenizer.json is needed")
    own, tokenizer = found[0].get_vocab(), found[-1]
    vocabulary = tokenizer.get_vocab()
    if moved := {token for token, number in own.items() if vocabulary.get(token) != number}:
        raise CheckpointError(
            f"the tokenizer of {other} gives {len(moved):,} of the {len(own):,} tokens of {language} another id or none, "
            f"such as {min(moved)!r}; the embedding of {language} is ordered by its own"
        )
    if IMAGE_TOKEN not in vocabulary:
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return tokenizer
