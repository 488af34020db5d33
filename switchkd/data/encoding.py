"""Encodes samples as model inputs: token ids, supervised mask, media."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray
from torch import Tensor

from switchkd.data.chat_template import ChatTemplate, TemplateNotInvertible
from switchkd.data.encoded import EncodedSample, Prompt
from switchkd.data.images import blurred, check_enlarged, decode, images_of, was_decoded_otherwise
from switchkd.data.media import Media, MediaReader
from switchkd.data.samples import BadSample, Sample, Status
from switchkd.data.templates import IMAGE_MARKER, ConversationFormat, NoPlaceForSystem
from switchkd.data.tokenization import ConversationTokenizer, Tokens, check_template
from switchkd.errors import CheckpointError, ConfigError, DataError, ReadFailure, SwitchKDError
from switchkd.fingerprints import digest_sample
from switchkd.library_errors import is_library_failure, is_out_of_memory, words_of
from switchkd.models.check_processor import check_processor
from switchkd.models.checkpoint import Checkpoint, blank_image
from switchkd.settings import MAX_IMAGE_PIXELS

# Processed pixels kept per process, for data files that ask many questions about few images.
PIXEL_CACHE_BYTES = 256 << 20


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
        CheckpointError: the image token is no added token of the tokenizer, or the image processor's pixels do not fit the vision
            tower.
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
        check_processor(checkpoint)
        self.path, self.embedding_rows = checkpoint.path, checkpoint.config.text_config.vocab_size
        self.tokenizer = checkpoint.tokenizer
        self.config, self.reader = checkpoint.config, MediaReader(checkpoint)
        self.image_token_id = checkpoint.image_token_id
        self.image_tokens = checkpoint.image_tokens  # a sample's; 0 where the image decides
        self.template = template
        self.images = images
        self.max_length = max_length
        self.max_image_pixels = max_image_pixels
        self.with_starts = with_starts
        self.blur = (
            0.0  # standard deviation of a Gaussian, as a share of an image's longer side; see `visual_advantage`
        )
        self.words = ConversationTokenizer(
            checkpoint.tokenizer, checkpoint.image_token_id, not isinstance(template, ChatTemplate)
        )
        try:
            check_template(self.words, template, *self._texts_of(None, 1))
        except ConfigError as error:
            raise ConfigError(f"{checkpoint.path}: {error}") from error
        self._media_cache: LRUCache[bytes, _Images] = LRUCache(PIXEL_CACHE_BYTES, getsizeof=attrgetter("nbytes"))

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
            CheckpointError: the tokenizer, chat template or image processor fails on this sample; names both.
        """
        sample.require_ok()
        with _naming(sample, self.path):
            # The text of a Llava's sample does not depend on the image, and is refused before that is read.
            tokens = None if self.reader.is_variable else self._tokens(sample, None)
            found = images_of(sample, self.images)
            read = None
            if found and (pixels or self.reader.is_variable):
                read = self._read(found, [image.name for image in sample.images])
            tokens = tokens or self._tokens(sample, None if read is None else read.media)
            otherwise = (was_decoded_otherwise(data, self.max_image_pixels) for data in found)
            changed = any(otherwise) if read is None else read.changed
        # The first token of a text is predicted by none.
        starts = tokens.starts[int(tokens.supervised[0]) :] if self.with_starts else None
        digest = digest_sample(tokens.ids, tokens.supervised, _joined(found), changed)
        media = read.media.columns if read is not None and pixels else None
        counts = () if media is None or read is None else self.reader.counts(read.media)
        return EncodedSample(tokens.ids, tokens.supervised, media, digest, starts=starts, image_tokens=counts)

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
        tokens = self.words(self._segments(sample), self._texts_of(media, len(sample.images)))
        self._require_fit(tokens.ids)
        if not tokens.supervised[1:].any():
            reason = (
                "every answer has weight 0"
                if len(sample.unsupervised) == len(sample.turns)
                else "the answers are empty"
            )
            raise BadSample(Status.NOTHING_SUPERVISED, reason)
        return tokens

    def _segments(self, sample: Sample) -> list[tuple[str, bool]]:
        self._require_plain([text for turn in sample.turns for text in turn], sample.system, sample.placed)
        try:
            before = 0 if sample.placed else len(sample.images)
            segments = self.template.render(sample.turns, before, self.tokenizer.eos_token, sample.system)
        except (TemplateNotInvertible, NoPlaceForSystem) as error:
            raise BadSample(Status.BAD_TURN, f"template {self.template.name}: {error}") from None
        return without_answers(segments, sample) if sample.unsupervised else segments

    def encode_prompt(self, sample: Sample, turn: int) -> Prompt:
        """Encode a sample up to where the answer of turn `turn` begins. Raises BadSample."""
        sample.require_ok()
        with _naming(sample, self.path):
            found = images_of(sample, self.images, sample.images_before(turn + 1))
            names = [image.name for image in sample.images]
            return self.encode_turns(sample.turns[: turn + 1], found, names, sample.system)

    def encode_turns(
        self, turns: Sequence[tuple[str, str]], images: Sequence[bytes], names: Sequence[str], system: str = ""
    ) -> Prompt:
        """Encode turns up to where the last one's answer begins.

        Args:
            turns: (question, answer) pairs; the last answer is ignored.
            images: image files' bytes; they stand at the markers of the questions, or before the first one if there are none.
            names: their names in errors. system: a system prompt.

        Raises:
            BadSample: too long, no text, or an unusable image.
        """
        markers = sum(text.count(IMAGE_MARKER) for text, _ in turns)
        placed = bool(markers) and markers == len(images)
        *before, (question, _) = turns
        self._require_plain([*(text for turn in before for text in turn), question], system, placed)
        try:
            segments = self.template.prompt(turns, 0 if placed else len(images), self.tokenizer.eos_token, system)
        except (TemplateNotInvertible, NoPlaceForSystem) as error:
            raise BadSample(Status.BAD_TURN, f"template {self.template.name}: {error}") from None
        media = self._read(images, names).media if images else None
        ids = self.words.prompt(segments, self._texts_of(media, len(images)))
        self._require_fit(ids)
        if not len(ids):
            raise BadSample(Status.NO_CONVERSATION, f"nothing stands before the answer of turn {len(turns) - 1}")
        return Prompt(ids, None if media is None else media.columns)

    def _require_plain(self, said: Sequence[str], system: str, placed: bool) -> None:
        """Raise BadSample if a text spells out a special token; markers at which images stand are none."""
        said = [text.replace(IMAGE_MARKER, " ") for text in said] if placed else said
        self.words.require_no_control_tokens([system, *said])

    def _texts_of(self, media: Media | None, count: int) -> list[str]:
        """Return the texts of `count` images; without media, of images that were not read."""
        if media is None:
            image = (
                self.reader.probe.texts[0] if self.reader.is_variable else self.words.image_token * self.image_tokens
            )
            texts = [image] * count
        else:
            texts = media.texts
        return [self.reader.text_of(text, isinstance(self.template, ChatTemplate)) for text in texts]

    def placeholder(self) -> tuple[NDArray[np.int32], Mapping[str, Tensor]]:
        """Return the ids [L] of an image without further text, and its media; a Llava's is blank, of others a made-up one."""
        if not self.reader.is_variable:
            ids = np.full(self.image_tokens, self.image_token_id, np.int32)
            return ids, {"pixel_values": blank_image(self.config)}
        return self.words([(IMAGE_MARKER, False)], self._texts_of(None, 1)).ids, self.reader.probe.columns

    def _require_fit(self, ids: NDArray[np.int32]) -> None:
        if len(ids) > self.max_length:
            raise BadSample(Status.TOO_LONG, f"{len(ids)} tokens, the limit is {self.max_length}", len(ids))
        if (largest := int(ids.max(initial=0))) >= self.embedding_rows:
            raise CheckpointError(
                f"token {self.tokenizer.convert_ids_to_tokens(largest)!r} of {self.path} has id {largest}, and the embedding has "
                f"{self.embedding_rows} rows: take the tokenizer that belongs to the checkpoint"
            )

    def _read(self, images: Sequence[bytes], names: Sequence[str]) -> "_Images":
        hashes = [hashlib.blake2b(data, digest_size=16).digest() for data in images]
        if (known := self._media_cache.get(key := b"".join(hashes))) is not None:
            return known
        converted = [decode(data, name, self.max_image_pixels) for data, name in zip(images, names, strict=False)]
        for one, name in zip(converted, names, strict=False):
            check_enlarged(one.image, self.reader.image_processor, name, self.max_image_pixels)
        media = self.reader.read([blurred(one.image, self.blur) for one in converted])
        found = _Images(media, any(one.changed for one in converted))
        if found.nbytes <= PIXEL_CACHE_BYTES:
            self._media_cache[key] = found
        return found


def _joined(images: Sequence[bytes]) -> bytes | None:
    """Return what a sample's digest is made of: one image's bytes, or those of several with their lengths; None without one."""
    if len(images) < 2:
        return images[0] if images else None
    return b"".join(len(data).to_bytes(8, "little") + data for data in images)


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


class _Images(NamedTuple):
    """The processed images of a sample."""

    media: Media
    changed: bool  # see `Converted.changed`

    @property
    def nbytes(self) -> int:
        """Bytes of the media."""
        return self.media.nbytes


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
