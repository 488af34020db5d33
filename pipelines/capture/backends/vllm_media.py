"""The media of one sample, image by image: vLLM caches and schedules each image on its own."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from switchkd.models.families import Family


def split_media(columns: Mapping[str, Tensor], family: Family, counts: Sequence[int]) -> list[dict[str, Tensor]]:
    """Return the columns of each image of a sample, as the family's processor makes them of that image alone.

    Args:
        columns: of all its images, see `families.Family.media`. counts: image tokens of each image.

    Raises:
        ValueError: columns that cannot be divided so.
    """
    if len(counts) == 1:
        return [dict(columns)]
    split = {
        name: _rows(value, family.media[name] == "pad", counts)
        for name, value in columns.items()
        if value.numel() > 1  # else of the sample, such as its number of images
    }
    images = [{name: parts[index] for name, parts in split.items()} for index in range(len(counts))]
    return [_without_padding(image) for image in images]


def _rows(value: Tensor, padded: bool, counts: Sequence[int]) -> list[Tensor]:
    """Divide a column along its images: one row for each, or as many tiles or patches as correspond to its tokens."""
    if len(value) == len(counts):
        return list(value.split(1))
    of_tiles = (
        value[0] if padded and len(value) == 1 else value
    )  # [1, tiles of all images, …], or [tiles or patches, …]
    share, left = divmod(sum(counts), len(of_tiles))
    if share == 0:
        share, left = len(of_tiles) // sum(counts), len(of_tiles) % sum(counts)
        sizes = [count * share for count in counts]
    else:
        left += sum(count % share for count in counts)
        sizes = [count // share for count in counts]
    if left:
        raise ValueError(f"a column of {len(of_tiles)} rows cannot be divided among images with {list(counts)} tokens")
    parts = of_tiles.split(sizes)
    return [part[None] for part in parts] if of_tiles is not value else list(parts)


def _without_padding(image: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the zeros that brought an image to the size of its sample's largest: tiles at the end, or rows and columns."""
    pixels = image["pixel_values"]
    if "image_sizes" not in image:
        return dict(image)
    if pixels.ndim == 5:  # [1, tiles, 3, H, W]
        used = torch.nonzero(pixels[0].flatten(1).any(1)).flatten()
        return dict(image) | {"pixel_values": pixels[:, : int(used.max()) + 1 if len(used) else 1]}
    height, width = image["image_sizes"][0].tolist()
    return dict(image) | {"pixel_values": pixels[..., :height, :width]}
