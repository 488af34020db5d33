"""Samples and prompts as a model reads them, and their collation into batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchkd.data.media import collate_media
from switchkd.fingerprints import SampleDigest
from switchkd.positions import IGNORED


@dataclass(frozen=True)
class EncodedSample:
    """One sample as a model reads it."""

    input_ids: NDArray[np.int32]  # [L], the image's tokens expanded
    supervised: NDArray[np.bool_]  # [L]
    media: (
        Mapping[str, Tensor] | None
    )  # of its image, by column, see `data.media.Media`; a Llava's pixel_values is [1, 3, H, W]
    digest: SampleDigest
    teacher: "EncodedSample | None" = (
        None  # the teacher's encoding where it differs; with media if its processor differs
    )
    starts: NDArray[np.int64] | None = (
        None  # [P], where each position's token begins in the answers, see `Tokens.starts`
    )
    image_tokens: tuple[int, ...] = ()  # of each of its images, in the order of the media; empty without media
    switched: bool = True  # with an image: whether it passes the switch pathway, see `--vsd-share`
    blurred: Mapping[str, Tensor] | None = None  # as `media`, of the blurred image; for a capture of visual advantages

    @property
    def positions(self) -> int:
        """Number of supervised tokens."""
        return int(self.supervised[1:].sum())


class Prompt(NamedTuple):
    """What stands before an answer, as a model reads it."""

    ids: NDArray[np.int32]  # [L], the image's tokens expanded
    media: Mapping[str, Tensor] | None  # as in `EncodedSample`


def collate(samples: Sequence[EncodedSample], pad_id: int, room: int = 0) -> dict[str, Any]:
    """Pad encoded samples on the right into one batch.

    Args:
        room: additional columns of padding after the longest sample.

    Returns:
        input_ids, attention_mask, labels [B, L] int64 (label -100 where not supervised), has_image [B] bool, and the media of the
        images, see `media.collate_media`: of Llavas, pixel_values [number of images, 3, H, W].
    """
    length = max(len(sample.input_ids) for sample in samples) + room
    input_ids = torch.full((len(samples), length), pad_id)
    labels = torch.full((len(samples), length), IGNORED)
    attention_mask = torch.zeros(len(samples), length, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids = torch.from_numpy(sample.input_ids.astype(np.int64))
        input_ids[row, : len(ids)] = ids
        attention_mask[row, : len(ids)] = 1
        labels[row, : len(ids)] = torch.where(torch.from_numpy(sample.supervised), ids, IGNORED)
    batch: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    batch["has_image"] = torch.tensor([sample.media is not None for sample in samples])
    return batch | collate_media([sample.media for sample in samples if sample.media is not None])


def pad_id_of(tokenizer: Any) -> int:
    """Return the id used for padding; padding is masked, so any id is valid, and 0 replaces a missing pad token."""
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0
