"""Uses a checkpoint's own chat template as a conversation format, with supervised masks by construction.

A Jinja template defines the text of a conversation, but not which segments are the assistant's. Two methods find these without
searching the text: `{% generation %}` blocks, if the template has them; otherwise the conversation is rendered twice, with its own
answers and with stand-ins, and the texts must differ in the answers alone. What the template writes around answers, such as an
empty thinking block, is then known to be its own. A template that supports neither is refused.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchkd.counting import counted
from switchkd.data.bounded_render import RenderExceeded, RenderFailed, render
from switchkd.data.templates import IMAGE_MARKER
from switchkd.errors import ConfigError
from switchkd.library_errors import as_checkpoint_error

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STAND_IN = "Xanswer{}X"  # an answer of letters only, in the place of a real one
_PROBE = [("Alpha what?", "Bravo."), ("Charlie who?", "Delta."), ("Echo when?", "Foxtrot.")]


class TemplateNotInvertible(ConfigError):
    """A conversation whose supervised mask cannot be derived from the template's output."""


class TemplateExceeds(ConfigError):
    """A chat template that takes more time or memory than any conversation needs."""


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template of transformers; the same interface as `templates.Template`.

    Args:
        source: Jinja.
        special_tokens: the variables that it may use: bos_token, eos_token, ….
        image_token: the text that it writes for an image.
        parts: whether message content is a list of content parts; otherwise it is text that contains the image token.
        end: text that ends an answer and is supervised with it.
    """

    source: str
    special_tokens: dict[str, str]
    image_token: str
    parts: bool
    end: str = ""
    name: str = "chat"

    def render(
        self, turns: Iterable[tuple[str, str]], images: int, eos: str | None, system: str = ""
    ) -> list[tuple[str, bool]]:
        """Return the segments (text, supervised) of a conversation, see `Template.render`.

        Raises:
            TemplateNotInvertible: the supervised segments cannot be determined.
        """
        pairs = list(turns)
        whole, spans = self._spans(pairs, images, system)
        return self._with_markers(_segments(whole, spans), _all_images(pairs, images))

    def prompt(
        self, turns: Iterable[tuple[str, str]], images: int, eos: str | None, system: str = ""
    ) -> list[tuple[str, bool]]:
        """Return the segments before the last turn's answer, as `render` gives them for a conversation that ends with it.

        What the template writes between its generation prompt and an answer, such as an empty thinking block, is part of the
        prompt, since answers are trained behind it.
        """
        pairs = list(turns)
        pairs[-1:] = [(question, _STAND_IN.format(len(pairs))) for question, _ in pairs[-1:]]
        whole, spans = self._spans(pairs, images, system)
        *earlier, (begin, _) = spans
        return self._with_markers(_segments(whole[:begin], earlier), _all_images(pairs, images))

    def answer_end(self, eos: str | None) -> str:
        """Return the text that ends an answer."""
        return self.end

    def as_dict(self) -> dict[str, str]:
        """Return the template as plain data, as manifests keep it."""
        return {
            "name": self.name,
            "chat_template": self.source,
            "special_tokens": json.dumps(self.special_tokens, sort_keys=True),
            "image_token": self.image_token,
            "content": "parts" if self.parts else "text",
            "end": self.end,
        }

    def _messages(self, turns: Sequence[tuple[str, str]], images: int, system: str = "") -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if system:
            messages.append({"role": "system", "content": self._content(system, 0)})
        for number, (question, answer) in enumerate(turns):
            messages.append({"role": "user", "content": self._content(question, 0 if number else images)})
            messages.append({"role": "assistant", "content": self._content(answer, 0)})
        return messages

    def _content(self, text: str, images: int) -> Any:
        """Return a message's content; images stand before the text, and where it has markers."""
        pieces = text.split(IMAGE_MARKER)
        if not self.parts:
            return (self.image_token + "\n") * images + self.image_token.join(pieces)
        parts: list[dict[str, str]] = [{"type": "image"}] * images
        for number, piece in enumerate(pieces):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": piece}] if piece or len(pieces) == 1 else []
        return parts

    def _spans(self, pairs: Sequence[tuple[str, str]], images: int, system: str) -> tuple[str, list[tuple[int, int]]]:
        """Return the whole text of a conversation, and the (begin, end) offsets of the supervised text of each turn.

        Generation blocks say where answers are. Without them, the conversation is rendered a second time with other answers:
        where the two texts differ in the answers alone, the text around the answers is the template's, whatever it is.
        """
        whole, found = self._jinja(self._messages(pairs, images, system))
        if _GENERATION.search(self.source):
            if len(found) != len(pairs):
                raise TemplateNotInvertible(
                    f"{counted(len(pairs), 'answer')} became {counted(len(found), 'supervised span')}"
                )
            for (begin, end), (_, answer) in zip(found, pairs, strict=True):
                if not whole[begin:end].lstrip().startswith(answer.strip()):
                    raise TemplateNotInvertible(f"the answer {answer!r} became {whole[begin:end]!r}")
            return whole, found
        around = self._around_answers([question for question, _ in pairs], images, system)
        if not whole.startswith(around[0]):
            raise TemplateNotInvertible("the text before the first answer depends on the answers")
        spans, place = [], len(around[0])
        for number, (_, answer) in enumerate(pairs):
            after = around[number + 1]
            is_last = number + 1 == len(pairs)
            for said in _trimmed(answer):
                rest = whole[place:]
                if rest == said + after if is_last else rest.startswith(said + after):
                    break
            else:
                raise TemplateNotInvertible(
                    f"the answer {answer!r} is not written as it is, or changes the text around it: {whole[place:][:200]!r}"
                )
            if not after.startswith(self.end):
                raise TemplateNotInvertible(f"an answer ends with {after!r} instead of {self.end!r}")
            spans.append((place, place + len(said) + len(self.end)))
            place += len(said) + len(after)
        return whole, spans

    def _around_answers(self, questions: Sequence[str], images: int, system: str = "") -> list[str]:
        """Return what the template writes before, between and after the answers to n questions: n + 1 pieces."""
        words = [_STAND_IN.format(number) for number in range(len(questions))]
        text, _ = self._jinja(self._messages(list(zip(questions, words, strict=True)), images, system))
        pieces = []
        for word in words:
            if text.count(word) != 1:
                raise TemplateNotInvertible(f"an answer stands {text.count(word)} times in the text")
            before, _, text = text.partition(word)
            pieces.append(before)
        return [*pieces, text]

    def _jinja(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """Render messages; returns the text and, of a template with generation blocks, their (begin, end) offsets."""
        request = {
            "conversations": [messages],
            "chat_template": self.source,
            "add_generation_prompt": False,
            "return_assistant_tokens_mask": bool(_GENERATION.search(self.source)),
            **self.special_tokens,
        }
        try:
            return render(request)
        except RenderExceeded as error:
            raise TemplateExceeds(f"the checkpoint's chat template: {error}; choose another --template") from error
        except RenderFailed as error:
            raise TemplateNotInvertible(f"the template fails: {error}") from error

    def _with_markers(self, segments: list[tuple[str, bool]], images: int) -> list[tuple[str, bool]]:
        """Replace the template's own image token by `IMAGE_MARKER`; the token must occur once for every image."""
        marked = [(text if said else text.replace(self.image_token, IMAGE_MARKER), said) for text, said in segments]
        count = sum(text.count(IMAGE_MARKER) for text, said in marked if not said)
        if count != images:
            raise TemplateNotInvertible(
                f"{counted(images, 'image')} became {counted(count, 'image token')} {self.image_token!r}"
            )
        return [segment for segment in marked if segment[0]]


def _all_images(pairs: Sequence[tuple[str, str]], images: int) -> int:
    """Return the number of images of a conversation: those before it, and one for every marker in a question."""
    return images + sum(question.count(IMAGE_MARKER) for question, _ in pairs)


def _segments(whole: str, spans: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """Divide a text into segments (text, supervised) at the borders of the supervised spans."""
    segments: list[tuple[str, bool]] = []
    done = 0
    for begin, end in spans:
        segments += [(whole[done:begin], False), (whole[begin:end], True)]
        done = end
    return [*segments, (whole[done:], False)]


def _trimmed(answer: str) -> Iterator[str]:
    """Yield an answer, then what is left of it if a template removes white space at its ends; the longest first."""
    core = answer.strip()
    before, after = (answer.partition(core)[0], answer.rpartition(core)[2]) if core else (answer, "")
    for lead in range(len(before) + 1):
        for trail in range(len(after), -1, -1):
            yield before[lead:] + core + after[:trail]


def open_chat_template(
    source: str, special_tokens: dict[str, str], image_token: str, ends: Iterable[str]
) -> ChatTemplate:
    """Create a conversation format from a chat template, if its supervised masks can be determined.

    Args:
        source: Jinja. special_tokens: the variables that it may use. image_token: the checkpoint's. ends: the tokenizer's added
            tokens; the first of them after an answer ends it.

    Raises:
        ConfigError: neither generation blocks nor rendering twice finds the answers, the text depends on the date, or the
            template does not end.
    """
    if "strftime_now" in source:
        raise ConfigError(
            "the checkpoint's chat template writes today's date, so a sample cached today would not be found tomorrow; "
            "choose another --template"
        )
    reasons = []
    for parts in (True, False):
        bare = ChatTemplate(source, special_tokens, image_token, parts)
        try:
            template = ChatTemplate(source, special_tokens, image_token, parts, _find_end(bare, tuple(ends)))
            for images in (1, 0):
                _require_sound(template, images)
        except TemplateNotInvertible as error:
            reasons.append(f"content as {'parts' if parts else 'text'}: {error}")
            continue
        return template
    raise ConfigError(
        "the checkpoint's chat template does not tell which words are the assistant's: it has no {% generation %} blocks that hold "
        "the answers, and does not write the answers as they are into a text that does not depend on them ("
        + "; ".join(reasons)
        + "); choose another --template"
    )


def _find_end(bare: ChatTemplate, ends: tuple[str, ...]) -> str:
    """Return the text after an answer through the first added token; without one, all of it but trailing whitespace."""
    if _GENERATION.search(bare.source):
        text, spans = bare._jinja(bare._messages(_PROBE[:1], images=0))
        tail = text[slice(*spans[0])].partition(_PROBE[0][1])[2] if spans else ""
    else:
        tail = bare._around_answers([_PROBE[0][0]], images=0)[1]
    places = [tail.index(end) + len(end) for end in ends if end and end in tail]
    return tail[: min(places)] if places else tail.rstrip()


def _require_sound(template: ChatTemplate, images: int) -> None:
    segments = template.render(_PROBE, images, None)
    text = "".join(text for text, _ in segments)
    for word in (word for turn in _PROBE for word in turn):
        if text.count(word) != 1:
            raise TemplateNotInvertible(f"{word!r} stands {text.count(word)} times in the text")
    if "'type'" in text:
        raise TemplateNotInvertible("parts are written out instead of read")


def chat_template_of(folder: Path, tokenizer: Any) -> str:
    """Return a checkpoint's chat template. Raises ConfigError if it has none, or several."""
    source = tokenizer.chat_template
    old = folder / "chat_template.json"  # where older processors saved the template
    if source is None and old.is_file():
        with as_checkpoint_error(old, "cannot read {}"):
            source = json.loads(old.read_text(encoding="utf-8")).get("chat_template")
    if isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str):
        raise ConfigError(f"{folder} has no chat template; choose another --template")
    return source
