"""Where an image's tokens lie on it, and the image as a model's processor made it; `attention.py` draws maps by both."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchkd.errors import CheckpointError, ConfigError
from switchkd.models.checkpoint import Checkpoint
from switchkd.models.families import FAMILIES, PIXELS, family_of


@dataclass(frozen=True)
class Grid:
    """The layout of an image's tokens: `rows` × `columns` patches in row-major order, of which the first `missing` have no token.

    `extra` tokens (CLIP's class token with strategy "full") precede the patches and belong to none; they are left out. Of an image
    in tiles, this is the layout of the tile that shows it whole; `before` and `after` are the tokens of the other tiles.
    """

    rows: int
    columns: int
    missing: int = 0
    extra: int = 0
    before: int = 0
    after: int = 0

    @property
    def tokens(self) -> int:
        """Number of an image's tokens."""
        return self.before + self.rows * self.columns - self.missing + self.extra + self.after

    def place(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Arrange the values of an image's tokens but `extra`, [n] → [rows, columns], scaled to sum 1; NaN without a token."""
        values = values[self.before : len(values) - self.after]
        cells = np.full(self.rows * self.columns, np.nan)
        cells[self.missing :] = values / values.sum()
        return cells.reshape(self.rows, self.columns)


def patch_grid(checkpoint: Checkpoint) -> Grid:
    """Return the layout of a Llava's image tokens over the image, which is the same for every image.

    A tower has image_size / patch_size patches per side. Strategy "default" drops the first state: CLIP's class token, but
    SigLIP's first patch. A projector that pools gives a smaller square.

    Raises:
        ConfigError: the number of tokens does not correspond to a square.
    """
    vision, tokens = checkpoint.config.vision_config, checkpoint.image_tokens
    side, pooled = vision.image_size // vision.patch_size, math.isqrt(tokens)
    for grid in (Grid(side, side), Grid(side, side, missing=1), Grid(side, side, extra=1), Grid(pooled, pooled)):
        if grid.tokens == tokens:
            return grid
    raise ConfigError(
        f"{checkpoint.path}: an image becomes {tokens} tokens, which form no square over {side} × {side} patches"
    )


def grid_of_image(checkpoint: Checkpoint, media: Mapping[str, Tensor], tokens: int) -> Grid:
    """Return the layout of one image's tokens, in any family.

    Two layouts are known: the grid of patches that the media name (`image_grid_thw`), of which the projector merges squares; and a
    square over the only tile of an image, or over the one that shows it whole.

    Args:
        media: of the image, as the checkpoint's processor makes them. tokens: number of its tokens.

    Raises:
        ConfigError: a Llava's tokens form no square.
        CheckpointError: the tokens lie on no grid, as those of several tiles; names the families that can be drawn.
    """
    if family_of(checkpoint.config).is_llava:
        return patch_grid(checkpoint)
    found = _square(checkpoint, len(_tiles(media)), tokens)
    if (patches := media.get("image_grid_thw")) is not None:
        merged = checkpoint.config.vision_config.spatial_merge_size
        found = Grid(*(int(count) // merged for count in patches[0, 1:]))
    if found is not None and found.tokens == tokens:
        return found
    by_grid = [name for name, family in FAMILIES.items() if "image_grid_thw" in family.media]
    by_tile = [name for name, family in FAMILIES.items() if family.overview is not None or family.media == PIXELS]
    raise CheckpointError(
        f"{checkpoint.path} is a {checkpoint.config.model_type}, for which this image becomes {tokens} tokens in "
        f"{len(_tiles(media))} tiles, which lie on no grid. A map is drawn for {', '.join(by_grid)}; and for "
        f"{', '.join(by_tile)}, whose tiles are square: leave this model out"
    )


def _square(checkpoint: Checkpoint, tiles: int, tokens: int) -> Grid | None:
    """Return the square of the tile that shows a whole image; None if its tokens form none."""
    family = family_of(checkpoint.config)
    if family.overview == 0:  # line breaks stand among the tokens of the other tiles
        vision = checkpoint.config.vision_config
        of_tile = (vision.image_size // vision.patch_size) ** 2
    elif tokens % tiles == 0 and "image_sizes" not in family.media:
        of_tile = tokens // tiles
    else:
        return None
    side, others = math.isqrt(of_tile), tokens - of_tile
    if side * side != of_tile or others < 0 or (others and family.overview is None):
        return None
    return Grid(side, side, after=others) if family.overview == 0 else Grid(side, side, before=others)


def seen_image(checkpoint: Checkpoint, media: Mapping[str, Tensor]) -> NDArray[np.float64]:
    """Return an image after a model's processor, its normalisation undone, so that it is aligned with the model's patches.

    Args:
        media: of one image, for which `grid_of_image` found a grid.

    Returns:
        [H, W, 3], 0 … 1.
    """
    processor = checkpoint.image_processor
    overview = family_of(checkpoint.config).overview
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    pixels = _unfolded(checkpoint, media) if "image_grid_thw" in media else _tiles(media)[overview or 0]
    seen: NDArray[np.float64] = (pixels.float() * std + mean).clamp(0, 1).permute(1, 2, 0).double().numpy()
    return seen


def _tiles(media: Mapping[str, Tensor]) -> Tensor:
    """Return the tiles of an image, [tiles, 3, H, W]; of a model with a grid, its rows of patches."""
    pixels = media["pixel_values"]
    return pixels.flatten(0, -4) if pixels.ndim > 3 else pixels


def _unfolded(checkpoint: Checkpoint, media: Mapping[str, Tensor]) -> Tensor:
    """Return the pixels [3, H, W] of rows of patches [n, 3 · frames · side²], which come by squares that are merged."""
    vision = checkpoint.config.vision_config
    merged, frames, side = vision.spatial_merge_size, vision.temporal_patch_size, vision.patch_size
    _, rows, columns = (int(count) for count in media["image_grid_thw"][0])
    patches = media["pixel_values"].reshape(
        rows // merged, columns // merged, merged, merged, 3, frames, side, side
    )  # an image is repeated in every frame
    return patches[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6).reshape(3, rows * side, columns * side)
