"""Tokenizes a conversation as one text, and finds the supervised tokens by the characters that they stand for.

The ids are the tokenizer's own for the whole text. Pieces that are tokenized one by one have other ids than the model was trained
on: some tokenizers write a space before the first word of a text, some only after a special token, some add BOS, and most join a
space with the word behind it. The supervised mask comes from the offsets of the tokens in the text, whose supervised characters are
known by construction.

A token that stands for characters on both sides of a border would be in training what generation never meets: the prompt that ends
at the border is tokenized without the other side. `check_template` finds templates and tokenizers that do so, when they are opened.
Spaces before an answer are the exception: they are the answer's, since nearly all tokenizers join them with its first word.
"""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from switchkd.counting import counted
from switchkd.data.chat_template import TemplateNotInvertible
from switchkd.data.status import BadSample, Status
from switchkd.data.templates import IMAGE_MARKER, ConversationFormat
from switchkd.errors import CheckpointError, ConfigError

Segments = Sequence[tuple[str, bool]]  # (text, supervised)

# Special tokens by which models name places and objects in an image; answers hold them on purpose.
_GROUNDING = re.compile(r"box|quad|ref|point|loc\d|seg\d|coord", re.IGNORECASE)
# Beginnings of answers that tokenizers treat in different ways: a word, a digit, punctuation, another script, a line break inside.
_PROBE = [("What is it?", "Red."), ("How many, 3?", "12 of them"), ("Where\nand why?", "(left)\nfar"), ("Et?", "Été")]


class Tokens(NamedTuple):
    """The tokens of a conversation."""

    ids: NDArray[np.int32]  # [L]
    supervised: NDArray[np.bool_]  # [L]
    # [number of supervised tokens], where each begins in the answers: the number of its answer · 2³² + characters of it before the
    # token. Equal numbers for two tokenizers mean that the preceding text is the same, except for the text that ends an answer.
    starts: NDArray[np.int64]
    straddling: list[int]  # tokens, before images are expanded, that stand for characters on both sides of a border


class ConversationTokenizer:
    """Tokenizes segments of one conversation format with one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers. image_token_id: the token that an image's features replace.
        special: whether the tokenizer's post-processor adds its tokens, such as BOS. It does not for chat templates, which write
            them, as in `apply_chat_template`.

    Raises:
        CheckpointError: the image token is not one that the tokenizer finds in a text.
    """

    def __init__(self, tokenizer: Any, image_token_id: int, special: bool) -> None:
        self.tokenizer, self.image_token_id, self.special = tokenizer, image_token_id, special
        self.image_token = str(tokenizer.convert_ids_to_tokens(image_token_id))
        self._runs_of_images = re.compile(f"(?:{re.escape(self.image_token)})+")
        self._control = _control_tokens(tokenizer)
        if tokenizer.added_tokens_decoder.get(image_token_id) is None:
            known = f"is {self.image_token!r}, an ordinary word of it" if self.image_token != "None" else "is not in it"
            raise CheckpointError(
                f"image token id {image_token_id} is no added token of the tokenizer {tokenizer.name_or_path}, it {known}; correct "
                "image_token_id in config.json, or add a token such as '<image>' to the tokenizer"
            )

    def require_no_control_tokens(self, texts: Sequence[str]) -> None:
        """Raise BadSample if a question or an answer spells out a special token, which would become one."""
        if self._control is None:
            return
        for text in texts:
            if found := self._control.search(text):
                what = "the image token" if found[0] == self.image_token else f"the control token {found[0]!r}"
                status = Status.MARKER_WITHOUT_IMAGE if found[0] == self.image_token else Status.BAD_TURN
                raise BadSample(status, f"the text spells out {what}")

    def __call__(self, segments: Segments, images: Sequence[str] = ()) -> Tokens:
        """Tokenize a conversation.

        Args:
            segments: its texts; unsupervised ones hold an `IMAGE_MARKER` for every image.
            images: what replaces each marker, with one image token for every row of features.

        Raises:
            BadSample: the text holds further image tokens.
        """
        text, spans, counts = self._text_of(segments, images)
        found = self.tokenizer(
            text,
            add_special_tokens=self.special,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids = np.array(found["input_ids"], np.int32)
        own = np.array(found["special_tokens_mask"], np.bool_)  # the post-processor's, which stand for no text
        offsets = np.array(found["offset_mapping"], np.int64).reshape(-1, 2)
        supervised, straddling = _supervised(offsets, own, spans, len(text))
        starts = _starts(offsets, own, supervised, spans)
        is_image = ids == self.image_token_id
        if int(is_image.sum()) != len(counts):  # no image feature would correspond to it
            raise BadSample(Status.MARKER_WITHOUT_IMAGE, "the text spells out the image token")
        if counts:
            repeats = np.ones(len(ids), np.int64)
            repeats[is_image] = counts
            ids, supervised = np.repeat(ids, repeats), np.repeat(supervised, repeats)
        return Tokens(ids, supervised, starts, straddling)

    def prompt(self, segments: Segments, images: Sequence[str] = ()) -> NDArray[np.int32]:
        """Tokenize what stands before an answer: the ids [L] that training has there. Raises BadSample as calling does."""
        *before, (last, _) = segments or [("", False)]
        found = self([*before, (last.rstrip(" "), False)], images)
        ids = found.ids
        return ids[: len(ids) - self._appended] if self.special else ids

    @cached_property
    def _appended(self) -> int:
        """How many tokens, such as EOS, the post-processor writes after a text."""
        mask = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        return next((number for number, is_own in enumerate(reversed(mask)) if not is_own), len(mask))

    def _text_of(self, segments: Segments, images: Sequence[str]) -> tuple[str, list[tuple[int, int]], list[int]]:
        """Return the text, the (begin, end) of its supervised spans, and how many image tokens each token of a run stands for.

        Image tokens of a run are tokenized as one, since an image may have thousands.
        """
        replacements = iter(images)
        counts: list[int] = []
        pieces: list[str] = []
        spans: list[tuple[int, int]] = []
        place = 0
        for text, supervised in _with_spaces_moved(segments):
            if not supervised and images:
                head, *rest = text.split(IMAGE_MARKER)
                for piece in rest:
                    image = next(replacements, None)
                    if image is None:
                        raise BadSample(
                            Status.MARKER_WITHOUT_IMAGE, f"more than {len(images)} {IMAGE_MARKER} in the text"
                        )
                    counts += [len(run[0]) // len(self.image_token) for run in self._runs_of_images.finditer(image)]
                    head += self._runs_of_images.sub(lambda _: self.image_token, image) + piece
                text = head
            if supervised and text:
                if spans and spans[-1][1] == place:
                    spans[-1] = (spans[-1][0], place + len(text))
                else:
                    spans.append((place, place + len(text)))
            pieces.append(text)
            place += len(text)
        if next(replacements, None) is not None:
            raise BadSample(Status.BAD_TURN, f"{counted(len(images), 'image')}, but the text has a place for fewer")
        return "".join(pieces), spans, counts


def _with_spaces_moved(segments: Segments) -> Iterator[tuple[str, bool]]:
    """Yield segments in which the spaces before an answer are the answer's."""
    spaces = ""
    for number, (text, supervised) in enumerate(segments):
        before_answer = not supervised and number + 1 < len(segments) and segments[number + 1][1]
        kept = text.rstrip(" ") if before_answer else text
        yield spaces + kept, supervised
        spaces = text[len(kept) :]


def _supervised(
    offsets: NDArray[np.int64], own: NDArray[np.bool_], spans: list[tuple[int, int]], length: int
) -> tuple[NDArray[np.bool_], list[int]]:
    """Return which tokens stand for a supervised character, [L], and the numbers of those that also stand for others.

    A token of no character (such as a lone "▁") belongs to the character behind it.

    Args:
        offsets: [L, 2], the (begin, end) characters of each token. own: [L], tokens of the post-processor. length: of the text.
    """
    characters = np.zeros(length + 1, np.int64)
    for begin, end in spans:
        characters[begin:end] = 1
    before = np.concatenate([[0], np.cumsum(characters)])
    begins, ends = offsets[:, 0], offsets[:, 1]
    empty = ends <= begins
    inside = np.where(empty, characters[begins], before[np.maximum(ends, begins)] - before[begins])
    supervised = (inside > 0) & ~own
    straddling = np.flatnonzero(supervised & ~empty & (inside < ends - begins))
    return supervised, straddling.tolist()


def _starts(
    offsets: NDArray[np.int64], own: NDArray[np.bool_], supervised: NDArray[np.bool_], spans: list[tuple[int, int]]
) -> NDArray[np.int64]:
    """Return `Tokens.starts`. A token begins where the one before it ends: its own offset may leave out a space."""
    if not spans:
        return np.empty(0, np.int64)
    ends = np.maximum.accumulate(np.where(own, 0, offsets[:, 1]))
    begins = np.minimum(offsets[:, 0], np.concatenate([[0], ends[:-1]]))[supervised]
    firsts = np.array([begin for begin, _ in spans], np.int64)
    number = np.maximum(np.searchsorted(firsts, offsets[supervised, 0], side="right") - 1, 0)
    starts: NDArray[np.int64] = (number << 32) + np.maximum(begins - firsts[number], 0)
    return starts


def _control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Return a pattern of the special tokens that no question or answer may spell out."""
    tokens = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special and token.content.strip() and not _GROUNDING.search(token.content)
    }
    ordered = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def check_template(words: ConversationTokenizer, template: ConversationFormat, image: str) -> None:
    """Check that a template and a tokenizer give training and generation the same ids before an answer.

    Conversations with answers of several kinds are tokenized whole and up to an answer.

    Args:
        image: what replaces an image's marker.

    Raises:
        ConfigError: names the text and the rule of the tokenizer.
    """
    tokenizer = words.tokenizer
    name = f"template {template.name!r} and the tokenizer ({type(tokenizer.backend_tokenizer.model).__name__})"
    for turns in ([_PROBE[0]], *([turn] for turn in _PROBE[1:]), _PROBE):
        for has_image in (True, False):
            images = [image] if has_image else []
            try:
                segments = template.render(turns, has_image, tokenizer.eos_token)
                prompt = words.prompt(template.prompt(turns, has_image, tokenizer.eos_token), images)
            except TemplateNotInvertible:
                return  # of a sample, whose status it becomes
            whole = words(segments, images)
            _require_one_bos(words, segments, name)
            _require_no_straddling(words, segments, images, whole, name)
            count = len(prompt)
            last = max(number for number, (_, supervised) in enumerate(segments) if supervised)
            if last and segments[last - 1][1]:
                continue  # no prompt ends here: the answer before it goes on into this one
            if prompt.tolist() != whole.ids[:count].tolist() or not whole.supervised[count]:
                raise ConfigError(
                    f"{name} do not go together: before the answer {turns[-1][1]!r}, the whole text has the tokens "
                    f"{_pieces(tokenizer, whole.ids[: count + 1])}, and the prompt that ends there "
                    f"{_pieces(tokenizer, prompt)}. So a trained model would be asked in other tokens than it learned with; "
                    "choose another --template, or end its 'assistant' with a special token or a line break"
                )


def _require_one_bos(words: ConversationTokenizer, segments: Segments, name: str) -> None:
    bos = words.tokenizer.bos_token
    if words.special and bos and "".join(text for text, _ in segments).startswith(bos):
        with_bos = words.tokenizer("a")["input_ids"][:1] == [words.tokenizer.bos_token_id]
        if with_bos:
            raise ConfigError(f"{name} both write {bos!r} at the beginning; leave it out of the template's 'system'")


def _require_no_straddling(
    words: ConversationTokenizer, segments: Segments, images: Sequence[str], whole: Tokens, name: str
) -> None:
    if not whole.straddling:
        return
    text, _, _ = words._text_of(segments, images)
    offsets = words.tokenizer(text, add_special_tokens=words.special, return_offsets_mapping=True)["offset_mapping"]
    begin, end = offsets[whole.straddling[0]]
    raise ConfigError(
        f"{name} do not go together: the tokenizer makes one token of {text[begin:end]!r}, which stands on the border of "
        f"an answer in {text[max(0, begin - 20) : end + 10]!r}. Let the template "
        "write a special token, a line break or a space there"
    )


def _pieces(tokenizer: Any, ids: NDArray[np.int32]) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(ids[-6:].tolist()))
