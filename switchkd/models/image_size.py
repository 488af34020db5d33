"""A limit on the pixels of an image, in the words of each family's image processor."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from switchkd.errors import ConfigError
from switchkd.models.families import Family


def limit_pixels(processor: Any, family: Family, max_pixels: int, path: Path) -> Any:
    """Return an image processor that makes at most so many pixels of an image, and so fewer tokens.

    The families with a limit of their own have it in different words: an area (the Qwen line, GLM-4V), a longest edge (SmolVLM,
    Idefics3, Pixtral), a number of tiles (InternVL), a list of tilings (LLaVA-NeXT and -OneVision). The overview picture that some
    of them add to the tiles is not counted.

    Args:
        processor: an image processor of transformers. path: of the checkpoint, for the error.

    Raises:
        ConfigError: every image has the same size for this family, or the limit is below its smallest image.
    """
    settings = processor.to_dict()
    rule = _rule_of(processor, settings)
    if rule is None:
        raise ConfigError(
            f"--max-pixels: for {path}, a {family.model_type}, every image has the same number of pixels; leave it out"
        )
    changes, smallest = rule(settings, max_pixels)
    if changes is None:
        raise ConfigError(
            f"--max-pixels {max_pixels:,} is below the smallest image of {path}, which has {smallest:,} pixels; raise it"
        )
    return type(processor).from_dict(settings | changes)


_Rule = Callable[[dict[str, Any], int], tuple[dict[str, Any] | None, int]]


def _rule_of(processor: Any, settings: dict[str, Any]) -> _Rule | None:
    size = dict(settings.get("size") or {})
    if settings.get("image_grid_pinpoints"):
        return _tilings
    if settings.get("max_patches") and settings.get("crop_to_patches"):
        return _tiles
    if size.get("shortest_edge") and size.get("longest_edge") and hasattr(processor, "merge_size"):
        return _area
    if size.get("longest_edge") and not size.get("shortest_edge"):
        return _longest_edge
    return None


def _area(settings: dict[str, Any], limit: int) -> tuple[dict[str, Any] | None, int]:
    """The Qwen line's `size` holds areas, in pixels."""
    size = dict(settings["size"])
    unit = (settings["patch_size"] * settings["merge_size"]) ** 2  # pixels of one token
    if limit < unit:
        return None, unit
    smallest = min(size["shortest_edge"], limit)
    return {"size": {"shortest_edge": smallest, "longest_edge": min(size["longest_edge"], limit)}}, unit


def _longest_edge(settings: dict[str, Any], limit: int) -> tuple[dict[str, Any] | None, int]:
    """A square image of this edge has the limit's pixels; others have fewer."""
    tile = (dict(settings.get("max_image_size") or {})).get("longest_edge") or settings.get("patch_size") or 1
    tile = tile if isinstance(tile, int) else max(dict(tile).values())
    edge = min(int(dict(settings["size"])["longest_edge"]), math.isqrt(limit) // tile * tile)
    return ({"size": {"longest_edge": edge}} if edge else None), tile * tile


def _tiles(settings: dict[str, Any], limit: int) -> tuple[dict[str, Any] | None, int]:
    size = dict(settings["size"])
    tile = int(size["height"]) * int(size["width"])
    count = min(int(settings["max_patches"]), limit // tile)
    changes = {"max_patches": count, "min_patches": min(int(settings.get("min_patches") or 1), count)}
    return (changes if count else None), tile


def _tilings(settings: dict[str, Any], limit: int) -> tuple[dict[str, Any] | None, int]:
    tilings = settings["image_grid_pinpoints"]
    kept = [tiling for tiling in tilings if tiling[0] * tiling[1] <= limit]
    return ({"image_grid_pinpoints": kept} if kept else None), min(height * width for height, width in tilings)
