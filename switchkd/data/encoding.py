"""Encodes samples as model inputs (token ids, supervised mask, pixels) and collates them into batches."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cachetools import LRUCache
from numpy.typing import NDArray
from torch import Tensor

from switchkd.data.chat_template import TemplateNotInvertible
from switchkd.data.images import check_enlarged, decode, image_bytes_of, was_decoded_otherwise
from switchkd.data.samples import BadSample, Sample, Status
from switchkd.data.templates import IMAGE_MARKER, ConversationFormat
from switchkd.errors import CheckpointError, ConfigError, DataError, ReadFailure, SwitchKDError
from switchkd.fingerprints import SampleDigest, digest_sample
from switchkd.library_errors import is_library_failure, is_out_of_memory, words_of
from switchkd.models.check_processor import check_processor
from switchkd.models.checkpoint import Checkpoint, token_rows
from switchkd.positions import IGNORED
from switchkd.settings import MAX_IMAGE_PIXELS

# Processed pixels kept per process, for data files that ask many questions about few images.
PIXEL_CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class EncodedSample:
    """One sample as a model reads it."""

    input_ids: NDArray[np.int32]  # [L], the image's tokens expanded
    supervised: NDArray[np.bool_]  # [L]
    pixels: Tensor | None  # [3, H, W] float32
    digest: SampleDigest
    teacher: "EncodedSample | None" = None  # the teacher's encoding, without pixels, where it differs
    starts: NDArray[np.int64] | None = (
        None  # [P], where each position's token begins in the answers, see `token_starts`
    )

    @property
    def positions(self) -> int:
        """Number of supervised tokens."""
        return int(self.supervised[1:].sum())


class SampleEncoder:
    """Encodes samples for one checkpoint and template; cheap to copy into DataLoader workers.

    Args:
        checkpoint: gives tokenizer, image processor, image token id and count.
        images: the image folder; may be None for text-only data.
        max_length: tokens, image tokens included; longer samples are refused, never cut.
        max_image_pixels: larger images are refused before they are decoded.
        with_starts: whether to compute `EncodedSample.starts`, by which the positions of two tokenizers are aligned.

    Raises:
        DataError: the image folder does not exist.
        CheckpointError: the image token is not in the vocabulary, or the image processor's pixels do not fit the vision tower.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        template: ConversationFormat,
        images: Path | None,
        max_length: int,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        with_starts: bool = False,
    ) -> None:
        if images is not None and not images.is_dir():
            raise DataError(
                f"no image folder {images}: --images takes the folder that the data file's paths start from"
            )
        if checkpoint.image_token_id >= token_rows(checkpoint.tokenizer):
            raise CheckpointError(
                f"{checkpoint.path}: image token id {checkpoint.image_token_id} is not in the tokenizer, whose largest id is "
                f"{token_rows(checkpoint.tokenizer) - 1}"
            )
        check_processor(checkpoint)
        self.path, self.embedding_rows = checkpoint.path, checkpoint.config.text_config.vocab_size
        self.tokenizer = checkpoint.tokenizer
        self.image_processor = checkpoint.image_processor
        self.image_token_id = checkpoint.image_token_id
        self.image_tokens = checkpoint.image_tokens
        self.template = template
        self.images = images
        self.max_length = max_length
        self.max_image_pixels = max_image_pixels
        self.with_starts = with_starts
        self._pixel_cache: LRUCache[bytes, _Pixels] = LRUCache(PIXEL_CACHE_BYTES, getsizeof=attrgetter("nbytes"))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the cached pixels, which would be copied to every spawned DataLoader worker."""
        return self.__dict__ | {"_pixel_cache": LRUCache(PIXEL_CACHE_BYTES, getsizeof=attrgetter("nbytes"))}

    def encode(self, sample: Sample, pixels: bool = True) -> EncodedSample:
        """Encode one sample.

        Args:
            pixels: False leaves the image undecoded (its bytes still enter the digest).

        Raises:
            BadSample: names the row and the reason.
            ReadFailure: the image could not be read now, or memory ran out; names the row.
            CheckpointError: the tokenizer, chat template or image processor fails on this sample; names both.
        """
        sample.require_ok()
        with _naming(sample, self.path):
            ids, supervised = self.encode_text(sample)
            data = image_bytes_of(sample, self.images)
            image = self._pixels(data, sample.image) if data is not None and pixels else None
            changed = False
            if data is not None:
                changed = was_decoded_otherwise(data, self.max_image_pixels) if image is None else image.changed
            starts = self.token_starts(self._segments(sample))[int(supervised[0]) :] if self.with_starts else None
        digest = digest_sample(ids, supervised, data, changed)
        return EncodedSample(ids, supervised, None if image is None else image.pixels, digest, starts=starts)

    def encode_text(self, sample: Sample) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Encode one sample's text, including its image tokens: (input_ids [L], supervised [L]). Raises BadSample."""
        sample.require_ok()
        ids, supervised = self.tokenize(self._segments(sample))
        if not supervised[1:].any():
            reason = (
                "every answer has weight 0"
                if len(sample.unsupervised) == len(sample.turns)
                else "the answers are empty"
            )
            raise BadSample(Status.NOTHING_SUPERVISED, reason)
        return ids, supervised

    def _segments(self, sample: Sample) -> list[tuple[str, bool]]:
        try:
            segments = self.template.render(sample.turns, sample.image is not None, self.tokenizer.eos_token)
        except TemplateNotInvertible as error:
            raise BadSample(Status.BAD_TURN, f"template {self.template.name}: {error}") from None
        return without_answers(segments, sample) if sample.unsupervised else segments

    def encode_prompt(self, sample: Sample, turn: int) -> tuple[NDArray[np.int32], Tensor | None]:
        """Encode a sample up to where the answer of turn `turn` begins: (input_ids [L], pixels). Raises BadSample."""
        sample.require_ok()
        with _naming(sample, self.path):
            return self.encode_turns(sample.turns[: turn + 1], image_bytes_of(sample, self.images), str(sample.image))

    def encode_turns(
        self, turns: Sequence[tuple[str, str]], image: bytes | None, name: str
    ) -> tuple[NDArray[np.int32], Tensor | None]:
        """Encode turns up to where the last one's answer begins.

        Args:
            turns: (question, answer) pairs; the last answer is ignored. image: an image file's bytes. name: its name in errors.

        Returns:
            input_ids [L], and pixels [3, H, W] if there is an image.

        Raises:
            BadSample: too long, no text, or an unusable image.
        """
        try:
            segments = self.template.prompt(turns, image is not None, self.tokenizer.eos_token)
        except TemplateNotInvertible as error:
            raise BadSample(Status.BAD_TURN, f"template {self.template.name}: {error}") from None
        ids, _ = self.tokenize(segments)
        if not len(ids):
            raise BadSample(Status.NO_CONVERSATION, f"nothing stands before the answer of turn {len(turns) - 1}")
        return ids, None if image is None else self._pixels(image, name).pixels

    def token_starts(self, segments: list[tuple[str, bool]]) -> NDArray[np.int64]:
        """Return where each supervised token begins, in order: the number of its segment · 2³² + characters of it before the token.

        Equal numbers for two tokenizers mean that the preceding text is the same, except for the text that ends a segment.
        """
        found: list[int] = []
        for number, text in enumerate(text for text, is_supervised in segments if is_supervised):
            offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            # A token begins where the one before it ends; its own offset may leave out a space.
            found += [(number << 32) + end for end in [0, *(end for _, end in offsets)][: len(offsets)]]
        return np.array(found, np.int64)

    def tokenize(self, segments: list[tuple[str, bool]]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokenize segments; returns (ids [L], supervised [L]).

        Raises BadSample if too long, CheckpointError for a token without a row in the embedding.

        Adjacent segments with the same supervision are tokenized as one text, as inference engines tokenize a prompt as a whole:
        the tokenizer may merge characters across segments.
        """
        ids: list[int] = []
        supervised: list[bool] = []
        for is_supervised, run in groupby(segments, key=itemgetter(1)):
            text = "".join(text for text, _ in run)
            for number, piece in enumerate(text.split(IMAGE_MARKER) if not is_supervised else [text]):
                words = self.tokenizer.encode(piece, add_special_tokens=False) if piece else []
                if self.image_token_id in words:  # no image feature would correspond to it
                    raise BadSample(Status.MARKER_WITHOUT_IMAGE, "the text spells out the image token")
                new = ([self.image_token_id] * self.image_tokens if number else []) + words
                ids += new
                supervised += [is_supervised] * len(new)
        if len(ids) > self.max_length:
            raise BadSample(Status.TOO_LONG, f"{len(ids)} tokens, the limit is {self.max_length}", len(ids))
        if (largest := max(ids, default=0)) >= self.embedding_rows:
            raise CheckpointError(
                f"token {self.tokenizer.convert_ids_to_tokens(largest)!r} of {self.path} has id {largest}, and the embedding has "
                f"{self.embedding_rows} rows: take the tokenizer that belongs to the checkpoint"
            )
        return np.array(ids, np.int32), np.array(supervised, np.bool_)

    def _pixels(self, data: bytes, name: str | None) -> "_Pixels":
        key = hashlib.blake2b(data, digest_size=16).digest()
        if key in self._pixel_cache:
            return self._pixel_cache[key]
        converted = decode(data, str(name), self.max_image_pixels)
        check_enlarged(converted.image, self.image_processor, str(name), self.max_image_pixels)
        processed = self.image_processor(images=converted.image, return_tensors="pt")["pixel_values"][0]
        found = _Pixels(processed, converted.changed)
        if found.nbytes <= PIXEL_CACHE_BYTES:
            self._pixel_cache[key] = found
        return found


def without_answers(segments: list[tuple[str, bool]], sample: Sample) -> list[tuple[str, bool]]:
    """Return a sample's segments with those answers not supervised that the row gives the weight 0.

    Raises:
        BadSample: the template does not write one supervised segment for every answer.
    """
    answers = [number for number, (_, is_supervised) in enumerate(segments) if is_supervised]
    if len(answers) != len(sample.turns):
        raise BadSample(Status.BAD_TURN, "weight 0 needs a template that writes every answer as one supervised segment")
    dropped = {answers[turn] for turn in sample.unsupervised}
    return [(text, is_supervised and number not in dropped) for number, (text, is_supervised) in enumerate(segments)]


class _Pixels(NamedTuple):
    """A processed image."""

    pixels: Tensor  # [3, H, W] float32
    changed: bool  # see `Converted.changed`

    @property
    def nbytes(self) -> int:
        """Bytes of the pixels."""
        return self.pixels.nbytes


@contextmanager
def _naming(sample: Sample, checkpoint: Path) -> Iterator[None]:
    """Name the row in every error about a sample: ours, a lack of memory, and whatever tokenizer and image processor raise."""
    row = f"row {sample.index}"
    try:
        yield
    except BadSample as bad:
        raise BadSample(bad.status, f"{row}: {bad.detail}", bad.tokens) from None
    except ReadFailure as failure:
        raise ReadFailure(f"{row}: {failure}") from failure
    except ConfigError as failure:
        raise ConfigError(f"{row}, {checkpoint}: {failure}") from failure
    except CheckpointError as failure:
        raise CheckpointError(f"{row}: {failure}") from failure
    except SwitchKDError:
        raise
    except BaseException as error:
        if isinstance(error, MemoryError) or is_out_of_memory(error):
            raise ReadFailure(
                f"{row}: out of memory while it was prepared; use fewer --workers, or leave out this row"
            ) from error
        if not is_library_failure(error):
            raise
        raise CheckpointError(
            f"{row}: the tokenizer or image processor of {checkpoint} fails on it: {words_of(error)}; `switchkd data check "
            "--model` lists the rows that are affected. Copy the checkpoint's files again, or leave out this row"
        ) from error


def collate(samples: Sequence[EncodedSample], pad_id: int, room: int = 0) -> dict[str, Any]:
    """Pad encoded samples on the right into one batch.

    Args:
        room: additional columns of padding after the longest sample.

    Returns:
        input_ids, attention_mask, labels [B, L] int64 (label -100 where not supervised), has_image [B] bool, and
        pixel_values [number of images, 3, H, W] if there is an image.
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
    batch["has_image"] = torch.tensor([sample.pixels is not None for sample in samples])
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    if pixels:
        batch["pixel_values"] = torch.stack(pixels)
    return batch


def pad_id_of(tokenizer: Any) -> int:
    """Return the id used for padding; padding is masked, so any id is valid, and 0 replaces a missing pad token."""
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0
