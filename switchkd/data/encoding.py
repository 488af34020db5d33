"""Encodes samples as model inputs (token ids, supervised mask, pixels) and collates them into batches."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from cachetools import LRUCache
from numpy.typing import NDArray
from torch import Tensor

from switchkd.data.chat_template import ChatTemplate, TemplateNotInvertible
from switchkd.data.images import check_enlarged, decode, image_bytes_of, was_decoded_otherwise
from switchkd.data.media import Media, MediaReader, collate_media
from switchkd.data.samples import BadSample, Sample, Status
from switchkd.data.templates import IMAGE_MARKER, ConversationFormat
from switchkd.data.tokenization import ConversationTokenizer, Tokens, check_template
from switchkd.errors import DataError, ReadFailure
from switchkd.fingerprints import SampleDigest, digest_sample
from switchkd.models.checkpoint import Checkpoint, blank_image
from switchkd.positions import IGNORED
from switchkd.settings import MAX_IMAGE_PIXELS

# Processed pixels kept per process, for data files that ask many questions about few images.
PIXEL_CACHE_BYTES = 256 << 20


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

    @property
    def positions(self) -> int:
        """Number of supervised tokens."""
        return int(self.supervised[1:].sum())

    @property
    def pixels(self) -> Tensor | None:
        """A Llava's pixels, [3, H, W] float32; None for text only."""
        return None if self.media is None else self.media["pixel_values"][0]


class SampleEncoder:
    """Encodes samples for one checkpoint and template; cheap to copy into DataLoader workers.

    Args:
        checkpoint: gives tokenizer, image processor, image token id and count.
        images: the image folder; may be None for text-only data.
        max_length: tokens, image tokens included; longer samples are refused, never cut.
        max_image_pixels: larger images are refused before they are decoded.
        with_starts: whether to keep `EncodedSample.starts`, by which the positions of two tokenizers are aligned.

    Raises:
        DataError: the image folder does not exist.
        CheckpointError: the image token is no added token of the tokenizer.
        ConfigError: template and tokenizer do not go together, see `tokenization.check_template`.
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
        self.tokenizer = checkpoint.tokenizer
        self.config, self.reader = checkpoint.config, MediaReader(checkpoint)
        self.image_token_id = checkpoint.image_token_id
        self.image_tokens = checkpoint.image_tokens  # a sample's; 0 where the image decides
        self.template = template
        self.images = images
        self.max_length = max_length
        self.max_image_pixels = max_image_pixels
        self.with_starts = with_starts
        self.words = ConversationTokenizer(
            checkpoint.tokenizer, checkpoint.image_token_id, not isinstance(template, ChatTemplate)
        )
        check_template(self.words, template, self._text_of(self.reader.probe() if self.reader.is_variable else None))
        self._media_cache: LRUCache[bytes, _Image] = LRUCache(PIXEL_CACHE_BYTES, getsizeof=attrgetter("nbytes"))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the cached pixels, which would be copied to every spawned DataLoader worker."""
        return self.__dict__ | {"_media_cache": LRUCache(PIXEL_CACHE_BYTES, getsizeof=attrgetter("nbytes"))}

    def encode(self, sample: Sample, pixels: bool = True) -> EncodedSample:
        """Encode one sample.

        Args:
            pixels: False leaves the image undecoded (its bytes still enter the digest).

        Raises:
            BadSample: names the row and the reason.
            ReadFailure: the image could not be read now, or memory ran out; names the row.
        """
        sample.require_ok()
        with _naming(sample):
            # The text of a Llava's sample does not depend on the image, and is refused before that is read.
            tokens = None if self.reader.is_variable else self._tokens(sample, None)
            data = image_bytes_of(sample, self.images)
            image = (
                self._image(data, sample.image) if data is not None and (pixels or self.reader.is_variable) else None
            )
            tokens = tokens or self._tokens(sample, None if image is None else image.media)
            changed = False
            if data is not None:
                changed = was_decoded_otherwise(data, self.max_image_pixels) if image is None else image.changed
        # The first token of a text is predicted by none.
        starts = tokens.starts[int(tokens.supervised[0]) :] if self.with_starts else None
        digest = digest_sample(tokens.ids, tokens.supervised, data, changed)
        media = image.media.columns if image is not None and pixels else None
        return EncodedSample(tokens.ids, tokens.supervised, media, digest, starts=starts)

    def encode_text(self, sample: Sample) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Encode one sample's text: (input_ids [L], supervised [L]).

        An image that is not read has the tokens of a made-up one where their number depends on the image.

        Raises:
            BadSample: the text cannot be used.
        """
        sample.require_ok()
        tokens = self._tokens(sample, None)
        return tokens.ids, tokens.supervised

    def _tokens(self, sample: Sample, media: Media | None) -> Tokens:
        tokens = self.words(self._segments(sample), [] if sample.image is None else [self._text_of(media)])
        self._require_fit(len(tokens.ids))
        if not tokens.supervised[1:].any():
            reason = (
                "every answer has weight 0"
                if len(sample.unsupervised) == len(sample.turns)
                else "the answers are empty"
            )
            raise BadSample(Status.NOTHING_SUPERVISED, reason)
        return tokens

    def _segments(self, sample: Sample) -> list[tuple[str, bool]]:
        self.words.require_no_control_tokens([text for turn in sample.turns for text in turn])
        try:
            segments = self.template.render(sample.turns, sample.image is not None, self.tokenizer.eos_token)
        except TemplateNotInvertible as error:
            raise BadSample(Status.BAD_TURN, f"template {self.template.name}: {error}") from None
        return without_answers(segments, sample) if sample.unsupervised else segments

    def encode_prompt(self, sample: Sample, turn: int) -> "Prompt":
        """Encode a sample up to where the answer of turn `turn` begins. Raises BadSample."""
        sample.require_ok()
        with _naming(sample):
            return self.encode_turns(sample.turns[: turn + 1], image_bytes_of(sample, self.images), str(sample.image))

    def encode_turns(self, turns: Sequence[tuple[str, str]], image: bytes | None, name: str) -> "Prompt":
        """Encode turns up to where the last one's answer begins.

        Args:
            turns: (question, answer) pairs; the last answer is ignored. image: an image file's bytes. name: its name in errors.

        Raises:
            BadSample: too long, no text, or an unusable image.
        """
        *before, (question, _) = turns
        self.words.require_no_control_tokens([*(text for turn in before for text in turn), question])
        try:
            segments = self.template.prompt(turns, image is not None, self.tokenizer.eos_token)
        except TemplateNotInvertible as error:
            raise BadSample(Status.BAD_TURN, f"template {self.template.name}: {error}") from None
        media = None if image is None else self._image(image, name).media
        ids = self.words.prompt(segments, [] if image is None else [self._text_of(media)])
        self._require_fit(len(ids))
        if not len(ids):
            raise BadSample(Status.NO_CONVERSATION, f"nothing stands before the answer of turn {len(turns) - 1}")
        return Prompt(ids, None if media is None else media.columns)

    def _text_of(self, media: Media | None) -> str:
        """Return the text of an image; None is one that was not read."""
        if media is None and self.reader.is_variable:
            media = self._probe
        image = self.words.image_token * self.image_tokens if media is None else media.texts[0]
        return self.reader.text_of(image, isinstance(self.template, ChatTemplate))

    @property
    def usual_image_tokens(self) -> int:
        """Tokens of an image, for estimates of lengths; those of a made-up one where the image decides."""
        return len(self.placeholder()[0]) if self.reader.is_variable else self.image_tokens

    def placeholder(self) -> tuple[NDArray[np.int32], Mapping[str, Tensor]]:
        """Return the ids [L] of an image without further text, and its media; a Llava's is blank, of others a made-up one."""
        if not self.reader.is_variable:
            ids = np.full(self.image_tokens, self.image_token_id, np.int32)
            return ids, {"pixel_values": blank_image(self.config)}
        return self.words([(IMAGE_MARKER, False)], [self._text_of(None)]).ids, self._probe.columns

    @cached_property
    def _probe(self) -> Media:
        return self.reader.probe()

    def _require_fit(self, tokens: int) -> None:
        if tokens > self.max_length:
            raise BadSample(Status.TOO_LONG, f"{tokens} tokens, the limit is {self.max_length}", tokens)

    def _image(self, data: bytes, name: str | None) -> "_Image":
        key = hashlib.blake2b(data, digest_size=16).digest()
        if key in self._media_cache:
            return self._media_cache[key]
        converted = decode(data, str(name), self.max_image_pixels)
        check_enlarged(converted.image, self.reader.image_processor, str(name), self.max_image_pixels)
        found = _Image(self.reader.read([converted.image]), converted.changed)
        if found.nbytes <= PIXEL_CACHE_BYTES:
            self._media_cache[key] = found
        return found


class Prompt(NamedTuple):
    """What stands before an answer, as a model reads it."""

    ids: NDArray[np.int32]  # [L], the image's tokens expanded
    media: Mapping[str, Tensor] | None  # as in `EncodedSample`


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


class _Image(NamedTuple):
    """A processed image."""

    media: Media
    changed: bool  # see `Converted.changed`

    @property
    def nbytes(self) -> int:
        """Bytes of the media."""
        return self.media.nbytes


@contextmanager
def _naming(sample: Sample) -> Iterator[None]:
    """Add the row number to the message of a BadSample, of a ReadFailure, and of a lack of memory."""
    try:
        yield
    except BadSample as bad:
        raise BadSample(bad.status, f"row {sample.index}: {bad.detail}", bad.tokens) from None
    except ReadFailure as failure:
        raise ReadFailure(f"row {sample.index}: {failure}") from failure
    except MemoryError as error:
        raise ReadFailure(
            f"row {sample.index}: out of memory while it was prepared; use fewer --workers, or leave out this row"
        ) from error


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
