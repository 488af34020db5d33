"""Requests with images in the form of vLLM's engine, made of our encoder's token ids and media, without vLLM's processors.

vLLM holds an image as an *item*: the arguments that its model takes for it, by name. Which those are, and how they are cut from a
batch, its processor of the family says (`_get_mm_fields_config`). Most are columns that transformers' processor makes as well;
some more follow from those. Whether the items are right is found out at the start, see `vllm_checks.check_structure`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.inputs.engine import MultiModalInput, mm_input
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)

from switchkd.models.families import family_of

# An argument of our own in each item: how many image tokens the text has for it, see `vllm_model`.
TOKENS = "switchkd_image_tokens"


class ItemMaker:
    """Makes vLLM's items of one checkpoint.

    Args:
        processor: vLLM's, of the checkpoint. config: the checkpoint's. dtype: of the engine; pixels are converted to it.
    """

    def __init__(self, processor: Any, config: Any, dtype: torch.dtype) -> None:
        self._processor, self._dtype = processor, dtype
        self._family, self._image_id = family_of(config), config.image_token_id

    def __call__(self, columns: Mapping[str, Tensor]) -> MultiModalKwargsItem:
        """Return the item of one image.

        Args:
            columns: the image's media, see `families.Family.media`.

        Raises:
            ValueError: vLLM does not take them as those of one image.
        """
        known = {name: self._cast(value) for name, value in columns.items()}
        tiles = self._tiles(known["pixel_values"])
        # Arguments that vLLM's processors add to transformers' columns, whatever the family; others are not looked at.
        known |= {name: torch.tensor([tiles]) for name in ("num_patches", "image_num_patches")}
        known["image_token_id"] = torch.tensor(self._image_id)
        fields = self._processor._get_mm_fields_config(BatchFeature(known), {})
        for name in known.keys() & fields.keys():
            # vLLM joins the tiles of all images, where transformers has [images, tiles, …].
            if self._has_images_first(name) and not isinstance(fields[name].field, MultiModalBatchedField):
                known[name] = known[name].flatten(0, 1)
        items = MultiModalKwargsItems.from_hf_inputs(BatchFeature(known), fields).get("image", [])
        if len(items) != 1:
            raise ValueError(f"vLLM reads {len(items)} images from the columns {', '.join(columns)} of one")
        return items[0]

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self._dtype) if value.is_floating_point() else value

    def _has_images_first(self, name: str) -> bool:
        """Whether a column is [images, tiles, …] or [images, …], padded, and not the tiles or patches of all images in a row."""
        return self._family.media.get(name) == "pad"

    def _tiles(self, pixels: Tensor) -> int:
        return pixels.shape[1] if self._has_images_first("pixel_values") and pixels.ndim == 5 else len(pixels)


def image_input(
    ids: list[int], items: Sequence[MultiModalKwargsItem], image_id: int, counts: Sequence[int]
) -> MultiModalInput:
    """Return a request with images, each under a name of its own, by which vLLM caches its features and the prefixes with it.

    Args:
        ids: [L], the images' tokens expanded. items: of the images, in the order of the text. image_id: the token that features
            replace. counts: how many such tokens each image has.

    Raises:
        ValueError: another number of image tokens than the images have.
    """
    at = [index for index, token in enumerate(ids) if token == image_id]
    if len(counts) != len(items) or sum(counts) != len(at) or 0 in counts:
        raise ValueError(f"{len(items)} images with {list(counts)} tokens, and the text has {len(at)} image tokens")
    places, first = [], 0
    for count in counts:
        mine = at[first : first + count]
        first += count
        # From the first feature on, which M-RoPE counts from, to the last; what lies between tiles has no feature.
        filled = torch.tensor(ids[mine[0] : mine[-1] + 1]) == image_id
        places.append(PlaceholderRange(offset=mine[0], length=len(filled), is_embed=None if filled.all() else filled))
    counted = [_with_count(item, count) for item, count in zip(items, counts, strict=True)]
    names = [digest_of(item) for item in counted]
    return mm_input(ids, MultiModalKwargsItems({"image": counted}), {"image": names}, {"image": places})


def _with_count(item: MultiModalKwargsItem, count: int) -> MultiModalKwargsItem:
    field = MultiModalBatchedField(keep_on_cpu=True)
    return MultiModalKwargsItem({**item, TOKENS: MultiModalFieldElem(data=torch.tensor(count), field=field)})


def digest_of(item: MultiModalKwargsItem) -> str:
    """Return a digest of everything that the model is given of an image, 32 hex digits (BLAKE2b).

    vLLM takes two images of one name for the same. A digest of the whole sample, or of an image's file alone, would not do: two
    images of a sample, or one image in two sizes, have different features.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(item.get_data().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
