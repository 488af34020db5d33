"""Checks a checkpoint's config.json before transformers builds anything from it.

Sizes are bounded: transformers makes a list entry, a module or a row for what a config claims, and 10⁹ layers take all memory
before anything else is compared. What transformers itself checks (types of most keys, names of model types) is left to it.
"""

import re
from pathlib import Path
from typing import Any

from switchkd.counting import counted
from switchkd.errors import CheckpointError
from switchkd.printable import printable

# Name of a number → the largest value that a model may have; the first pattern that fits counts.
_LARGEST = (
    (re.compile(r".*layers"), 1 << 10),
    (re.compile(r"num_channels"), 3),
    (re.compile(r"num_.*|projector_grid"), 1 << 16),
    (re.compile(r"image_size|patch_size"), 1 << 14),
    (re.compile(r".*_(size|dim|length)"), 1 << 24),
    (re.compile(r".*"), 1 << 53),  # what a float holds exactly
)
_AT_LEAST_ONE = re.compile(
    r"(hidden|image|patch|vocab|intermediate)_size|num_(hidden_layers|attention_heads|key_value_heads|channels)|projector_grid"
)
MAX_DEPTH = 20
MAX_IMAGE_TOKENS = 1 << 16
STRATEGIES = ("default", "full")


def check_config(config: Any, path: Path, llava: bool) -> None:
    """Check the content of a checkpoint's config.json.

    Args:
        llava: whether it is a Llava's, whose parts are known here.

    Raises:
        CheckpointError: not an object, an image token or feature layer of the wrong type, or a size that no model has.
    """
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}/config.json should hold an object, found {type(config).__name__}: copy it again")
    if llava:
        _check_llava(config, path)
    _check_sizes(config, path, "")


def _check_llava(config: dict[str, Any], path: Path) -> None:
    for name in ("vision_config", "text_config"):
        if not isinstance(config.get(name), dict):
            found = type(config[name]).__name__ if name in config else "nothing"
            raise CheckpointError(f"{path}/config.json should describe its {name} in an object, found {found}")
    for name in ("image_token_id", "image_token_index"):
        value = config.get(name)
        if name in config and (type(value) is not int or value < 0):
            raise CheckpointError(f"{path}/config.json: {name} should be the id of a token, found {_shown(value)}")
    layers = config.get("vision_feature_layer", -2)
    if not (type(layers) is int or (isinstance(layers, list) and layers and all(type(item) is int for item in layers))):
        raise CheckpointError(
            f"{path}/config.json: vision_feature_layer should be the number of a layer, or a list of them, found {_shown(layers)}"
        )
    if (strategy := config.get("vision_feature_select_strategy", "default")) not in STRATEGIES:
        raise CheckpointError(
            f"{path}/config.json: vision_feature_select_strategy should be {' or '.join(STRATEGIES)}, found {_shown(strategy)}"
        )


def _check_sizes(value: Any, path: Path, name: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{path}/config.json is nested more than {MAX_DEPTH} deep at {printable(name, 60)}")
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else ((name, item) for item in value):
            _check_sizes(item, path, str(key), depth + 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        largest = next(limit for pattern, limit in _LARGEST if pattern.fullmatch(name))
        least = 1 if _AT_LEAST_ONE.fullmatch(name) else -largest
        if not (least <= value <= largest or value in (float("inf"), float("-inf"))):
            raise CheckpointError(
                f"{path}/config.json: {printable(name, 60)} should be between {least:,} and {largest:,}, found {_shown(value)}"
            )


def check_feature_layers(layers: int | list[int], states: int, path: Path | str) -> None:
    """Check that a vision tower has the layers whose outputs are projected.

    Args:
        layers: `vision_feature_layer`. states: outputs of the tower, the embeddings' before the first layer included.

    Raises:
        CheckpointError: no such layer.
    """
    for layer in [layers] if isinstance(layers, int) else layers:
        if not -states <= layer < states:
            raise CheckpointError(
                f"{path}: feature layer {layer} does not exist: the tower has {counted(states - 1, 'layer')}, so that it is one of "
                f"{-states} … {states - 1} (-2 is usual). Correct vision_feature_layer in its config.json, or pass --feature-layer"
            )


def check_image_token(token: int, tokenizer: Any, path: Path) -> None:
    """Check that an image token is a token that no text contains by accident.

    Raises:
        CheckpointError: it has no entry in the tokenizer, is an ordinary word, or has another purpose already.
    """
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values(), default=-1)
    if token > largest:
        raise CheckpointError(
            f"{path}: image token id {token} is not in the tokenizer, whose largest id is {largest}: take the tokenizer that "
            "belongs to the checkpoint, or correct image_token_id in its config.json"
        )
    spelled = tokenizer.convert_ids_to_tokens(token)
    advice = f"Correct image_token_id in {path}/config.json" + (
        f": <image> has the id {vocabulary['<image>']}" if "<image>" in vocabulary else "; <image> is usual"
    )
    for purpose in ("eos", "bos", "pad", "unk"):
        if token == getattr(tokenizer, f"{purpose}_token_id", None):
            raise CheckpointError(
                f"{path}: image token id {token}, {printable(spelled, 60)!r}, is the tokenizer's {purpose} token, which texts "
                f"hold as well. {advice}"
            )
    marked = re.fullmatch(r"[<\[|▁].*[>\]|]", str(spelled), re.DOTALL)
    if token not in tokenizer.added_tokens_decoder and not marked:
        raise CheckpointError(
            f"{path}: image token id {token} is {printable(spelled, 60)!r}, an ordinary word: texts that hold it could not be told "
            f"from images. {advice}"
        )


def _shown(value: Any) -> str:
    try:
        return printable(repr(value), 60)
    except (ValueError, RecursionError):  # a number of thousands of digits, or nested too deep
        return f"a {type(value).__name__} too large to print"
