"""Images as a model reads them: the checkpoint's own processor makes the pixels, and says what text stands for each image.

A Llava has one pixel tensor and one number of tokens an image. In other families both depend on the image: tiles, dynamic
resolution, row separators. Their processor of transformers knows; nothing of it is computed here.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

from switchkd.errors import CheckpointError
from switchkd.fingerprints import pin_tokenizer
from switchkd.library_errors import as_checkpoint_error, words_of
from switchkd.models.checkpoint import Checkpoint
from switchkd.models.families import Family, family_of
from switchkd.models.fit import probe_cuts

_PROBE_SIZE = (64, 48)  # of the image by which a processor is tried
_CONFIGS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")  # where its class is named
_ADVICE = "copy processor_config.json and preprocessor_config.json from the model's origin"
_PACKAGES = ("torchvision", "num2words")  # that some processors of transformers need
_PARTS = {"image_processor", "video_processor", "feature_extractor", "tokenizer", "auto_map", "chat_template"}
# Tokens that stand before and after an image in the text of a model, where the processor's own text does not hold them.
_BORDERS = (
    ("vision_start_token_id", "vision_end_token_id"),
    ("image_start_token_id", "image_end_token_id"),
)


class Media(NamedTuple):
    """The images of one sample."""

    columns: dict[str, Tensor]  # by the names that the model takes, see `families.Family.media`
    # What stands for each image: image tokens, one for every row of features, and what is between them.
    texts: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes of the columns."""
        return sum(column.nbytes for column in self.columns.values())


class MediaReader:
    """Makes the media of images with a checkpoint's processor; cheap to copy into DataLoader workers.

    Attributes:
        marker: what the checkpoint's own chat template writes for an image, and the processor replaces.
        borders: the text before and after an image in other templates.

    Raises:
        CheckpointError: the processor's files are missing or damaged, or it needs a package that is not installed.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self._opened = checkpoint.path, checkpoint
        self.family: Family = family_of(checkpoint.config, checkpoint.path)
        self.image_processor = checkpoint.image_processor
        self.image_token = str(checkpoint.tokenizer.convert_ids_to_tokens(checkpoint.image_token_id))
        self.image_tokens = checkpoint.image_tokens
        self.marker, self.borders = self.image_token, ("", "")
        self._processor: Any = None
        if self.is_variable:
            self.marker = str(self._open().image_token)
            self.borders = _borders_of(checkpoint)

    def _open(self) -> Any:
        if self._processor is None:
            with as_checkpoint_error(self.checkpoint, advice=_ADVICE):
                self._processor = _open_processor(self._opened)
                merged = self._processor._merge_kwargs(self._processor.valid_processor_kwargs, tokenizer_init_kwargs={})
                self._settings = merged["images_kwargs"]
        return self._processor

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the processor, whose class is made here: a spawned process opens it again."""
        return self.__dict__ | {"_processor": None}

    @property
    def is_variable(self) -> bool:
        """Whether the number of tokens depends on the image."""
        return not self.family.is_llava

    def read(self, images: Sequence[Image.Image]) -> Media:
        """Return the media of a sample's images, which are RGB.

        Raises:
            CheckpointError: the processor gives columns that the model does not take.
        """
        if not self.is_variable:
            pixels = [self.image_processor(images=image, return_tensors="pt")["pixel_values"] for image in images]
            return Media({"pixel_values": torch.cat(pixels)}, [self.image_token * self.image_tokens] * len(images))
        features, texts = self._open()._process_images([list(images)], **self._settings)
        columns = {name: _tensor(features[name]) for name in self.family.media if name in features}
        if "pixel_values" not in columns:
            raise CheckpointError(
                f"{self.checkpoint}: its processor gives {', '.join(features)} for an image, and no pixel_values"
            )
        return Media(columns, list(texts))

    def text_of(self, replacement: str, own_template: bool) -> str:
        """Return the text of an image: the processor's, within `borders` unless the checkpoint's own template writes them."""
        before, after = self.borders
        return replacement if own_template else before + replacement + after

    def counts(self, media: Media) -> tuple[int, ...]:
        """Return how many image tokens each image has."""
        return tuple(text.count(self.image_token) for text in media.texts)

    @cached_property
    def probe(self) -> Media:
        """The media of a made-up image, by which templates and pairs of models are checked.

        Raises:
            CheckpointError: the processor fails, or writes another number of image tokens than the model has features for them.
        """
        pixels = np.random.default_rng(0).integers(0, 256, (*_PROBE_SIZE[::-1], 3), np.uint8)
        with as_checkpoint_error(self.checkpoint, "the processor of {} fails on a made-up image", _ADVICE):
            media = self.read([Image.fromarray(pixels)])
        if self.is_variable:
            with as_checkpoint_error(self.checkpoint, "the vision tower of {} fails on a made-up image", _ADVICE):
                self._require_as_many_features(media)
        return media

    def _require_as_many_features(self, media: Media) -> None:
        features, (tokens,) = probe_cuts(self._opened.config, media.columns).tokens, self.counts(media)
        if tokens != features:
            raise CheckpointError(
                f"{self.checkpoint}: for an image of {' × '.join(map(str, _PROBE_SIZE))} pixels its processor writes {tokens:,} "
                f"tokens, and its model has {features:,} features; {_ADVICE}"
            )


def collate_media(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put the media of several samples into one batch; samples without an image have no columns.

    Returns:
        Each column concatenated along the first dimension, after its other dimensions were padded with zeros to the largest: tiles
        of [images, tiles, 3, H, W], images of several sizes. Zeros are what the families' processors pad with.
    """
    names = dict.fromkeys(name for sample in samples for name in sample)
    return {name: torch.cat(_padded([sample[name] for sample in samples if name in sample])) for name in names}


def _padded(columns: Sequence[Tensor]) -> list[Tensor]:
    largest = torch.tensor([column.shape[1:] for column in columns]).amax(0).tolist()
    if all(list(column.shape[1:]) == largest for column in columns):
        return list(columns)
    padded = []
    for column in columns:
        target = column.new_zeros(len(column), *largest)
        target[tuple(slice(size) for size in column.shape)] = column
        padded.append(target)
    return padded


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, list | tuple) and value and not np.isscalar(value[0]):
        return torch.stack([_tensor(item) for item in value])
    return torch.as_tensor(np.asarray(value))


def _borders_of(checkpoint: Checkpoint) -> tuple[str, str]:
    for names in _BORDERS:
        ids = [getattr(checkpoint.config, name, None) for name in names]
        if all(isinstance(found, int) for found in ids):
            before, after = checkpoint.tokenizer.convert_ids_to_tokens(ids)
            return str(before), str(after)
    return "", ""


def _open_processor(checkpoint: Checkpoint) -> Any:
    """Return a checkpoint's processor with its Pillow image processor, and without the one for videos, which needs torchvision.

    Raises:
        CheckpointError: a class that transformers does not have, or one that needs a package that is not installed.
    """
    saved, name = _saved_processor(checkpoint)
    kind = processor_class_from_name(name)
    if kind is None:
        usual = PROCESSOR_MAPPING_NAMES.get(checkpoint.config.model_type)
        raise CheckpointError(
            f"{checkpoint.path} names the processor {name!r}, which transformers {transformers.__version__} does not have; "
            f"expected {usual} for a {checkpoint.config.model_type}: copy {_CONFIGS[0]} from its origin, or update transformers"
        )
    try:
        return _without_video(kind, checkpoint, saved)
    except ImportError as error:
        package = next((package for package in _PACKAGES if package in str(error).lower()), None)
        raise CheckpointError(
            f"{checkpoint.path}: its processor ({name}) needs "
            + (f"the package {package}: pip install {package}" if package else f"a package: {words_of(error)}")
        ) from error


def _without_video(kind: Any, checkpoint: Checkpoint, saved: Mapping[str, Any]) -> Any:
    """Return a processor of a class, made of what a checkpoint has, without parts for other media than images and text."""

    class ForImages(kind):  # type: ignore[misc]
        """The processor of a checkpoint without its parts for other media."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            """Accept a part that is left out."""
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    pin_tokenizer(checkpoint.tokenizer)
    parts: dict[str, Any] = {"image_processor": checkpoint.image_processor, "tokenizer": checkpoint.tokenizer}
    parts |= {part: None for part in kind.get_attributes() if part not in parts}
    settings = {key: value for key, value in saved.items() if key not in _PARTS | {"processor_class"}}
    return ForImages(**parts, **settings)


def _saved_processor(checkpoint: Checkpoint) -> tuple[Mapping[str, Any], str]:
    """Return the settings of a checkpoint's processor, and the name of its class."""
    found: dict[str, Any] = {}
    name = None
    for file in _CONFIGS:
        path = Path(checkpoint.path) / file
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            name = name or content.get("processor_class")
            if file == _CONFIGS[0]:
                found = content
    name = name or PROCESSOR_MAPPING_NAMES.get(checkpoint.config.model_type)
    if not isinstance(name, str):
        raise CheckpointError(
            f"{checkpoint.path} names no processor: {_CONFIGS[0]} is missing; copy it from the model's origin"
        )
    return found, name
