"""Uses a checkpoint's own chat template as a conversation format, with supervised masks by construction.

A Jinja template defines the text of a conversation, but not which segments are the assistant's. Two methods find these without
searching the text: `{% generation %}` blocks, if the template has them; otherwise prefix rendering, which needs the text rendered
up to a question (with the generation prompt) and the text rendered up to its answer to be prefixes of the whole text. A template
that supports neither is refused.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchkd.data.bounded_render import RenderExceeded, RenderFailed, render
from switchkd.data.templates import IMAGE_MARKER
from switchkd.errors import ConfigError
from switchkd.library_errors import as_checkpoint_error

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
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

    def render(self, turns: Iterable[tuple[str, str]], has_image: bool, eos: str | None) -> list[tuple[str, bool]]:
        """Return the segments (text, supervised) of a conversation, see `Template.render`.

        Raises:
            TemplateNotInvertible: the supervised segments cannot be determined.
        """
        pairs = list(turns)
        messages = self._messages(pairs, has_image)
        whole, segments = self._segments(pairs, messages)
        if not whole.startswith(self._text(messages[:-1], prompt=True)):
            raise TemplateNotInvertible("the prompt before the last answer is no prefix of the whole conversation")
        return self._with_markers(segments, has_image)

    def prompt(self, turns: Iterable[tuple[str, str]], has_image: bool, eos: str | None) -> list[tuple[str, bool]]:
        """Return the segments before the last turn's answer; see `Template.prompt`."""
        pairs = list(turns)
        messages = self._messages(pairs, has_image)[:-1]
        text = self._text(messages, prompt=True)
        # Earlier answers are segments of their own, as in training.
        before, segments = self._segments(pairs[:-1], messages[:-1]) if messages[:-1] else ("", [])
        if not text.startswith(before):
            raise TemplateNotInvertible("earlier turns change when another follows")
        return self._with_markers([*segments, (text[len(before) :], False)], has_image)

    def _segments(
        self, pairs: Sequence[tuple[str, str]], messages: list[dict[str, Any]]
    ) -> tuple[str, list[tuple[str, bool]]]:
        """Return the whole text of a conversation, and its segments (text, supervised)."""
        whole, spans = self._spans(messages)
        segments: list[tuple[str, bool]] = []
        done = 0
        if len(spans) != len(pairs):
            raise TemplateNotInvertible(f"{len(pairs)} answers became {len(spans)} supervised spans")
        for (begin, end), (_, answer) in zip(spans, pairs, strict=True):
            if not whole[begin:end].lstrip().startswith(answer):
                raise TemplateNotInvertible(f"the answer {answer!r} became {whole[begin:end]!r}")
            segments += [(whole[done:begin], False), (whole[begin:end], True)]
            done = end
        return whole, [*segments, (whole[done:], False)]

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

    def _messages(self, turns: Sequence[tuple[str, str]], has_image: bool) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        for number, (question, answer) in enumerate(turns):
            image = has_image and number == 0
            messages.append({"role": "user", "content": self._content(question, image)})
            messages.append({"role": "assistant", "content": self._content(answer, image=False)})
        return messages

    def _content(self, text: str, image: bool) -> Any:
        if self.parts:
            return [*([{"type": "image"}] if image else []), {"type": "text", "text": text}]
        return (self.image_token + "\n" if image else "") + text

    def _spans(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """Return the whole text, and the (begin, end) offsets of the assistant's answers in it."""
        if _GENERATION.search(self.source):
            text, spans = self._jinja(messages, prompt=False, spans=True)
            return text, [(int(begin), int(end)) for begin, end in spans]
        whole = self._text(messages)
        found = []
        for number in range(0, len(messages), 2):
            before = self._text(messages[: number + 1], prompt=True)
            after = self._text(messages[: number + 2])
            if not (whole.startswith(after) and after.startswith(before)):
                raise TemplateNotInvertible(
                    f"turn {number // 2} up to its answer is no prefix of the whole conversation"
                )
            said = after[len(before) :]
            answer = messages[number + 1]["content"]
            answer = answer[0]["text"] if self.parts else answer
            lead, found_answer, tail = said.partition(answer) if answer else ("", "", said)
            if lead.strip():
                raise TemplateNotInvertible(f"{lead!r} stands between the generation prompt and the answer")
            if not tail.startswith(self.end):
                raise TemplateNotInvertible(f"an answer ends with {tail!r} instead of {self.end!r}")
            found.append((len(before), len(before) + len(lead + found_answer + self.end)))
        return whole, found

    def _text(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        return self._jinja(messages, prompt)[0]

    def _jinja(self, messages: list[dict[str, Any]], prompt: bool, spans: bool = False) -> tuple[str, list[Any]]:
        request = {
            "conversations": [messages],
            "chat_template": self.source,
            "add_generation_prompt": prompt,
            "return_assistant_tokens_mask": spans,
            **self.special_tokens,
        }
        try:
            return render(request)
        except RenderExceeded as error:
            raise TemplateExceeds(f"the checkpoint's chat template: {error}; choose another --template") from error
        except RenderFailed as error:
            raise TemplateNotInvertible(f"the template fails: {error}") from error

    def _with_markers(self, segments: list[tuple[str, bool]], has_image: bool) -> list[tuple[str, bool]]:
        """Replace the template's own image token by `IMAGE_MARKER`; the token must occur once if there is an image."""
        marked = [(text if said else text.replace(self.image_token, IMAGE_MARKER), said) for text, said in segments]
        count = sum(text.count(IMAGE_MARKER) for text, said in marked if not said)
        if count != has_image:
            raise TemplateNotInvertible(f"{int(has_image)} images became {count} image tokens {self.image_token!r}")
        return [segment for segment in marked if segment[0]]


def open_chat_template(
    source: str, special_tokens: dict[str, str], image_token: str, ends: Iterable[str]
) -> ChatTemplate:
    """Create a conversation format from a chat template, if its supervised masks can be determined.

    Args:
        source: Jinja. special_tokens: the variables that it may use. image_token: the checkpoint's. ends: the tokenizer's added
            tokens; the first of them after an answer ends it.

    Raises:
        ConfigError: neither generation blocks nor prefix rendering finds the answers, the text depends on the date, or the template
            does not end.
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
            for has_image in (True, False):
                _require_sound(template, has_image)
        except TemplateNotInvertible as error:
            reasons.append(f"content as {'parts' if parts else 'text'}: {error}")
            continue
        return template
    raise ConfigError(
        "the checkpoint's chat template does not tell which words are the assistant's: it has no {% generation %} blocks that hold "
        "the answers, and the beginnings of a conversation do not stay as they are when it goes on ("
        + "; ".join(reasons)
        + "); choose another --template"
    )


def _find_end(bare: ChatTemplate, ends: tuple[str, ...]) -> str:
    """Return the text after an answer through the first added token; without one, all of it but trailing whitespace."""
    _, answer = _PROBE[0]
    messages = bare._messages(_PROBE[:1], has_image=False)
    if _GENERATION.search(bare.source):
        text, spans = bare._jinja(messages, prompt=False, spans=True)
        tail = text[slice(*spans[0])].partition(answer)[2] if spans else ""
    else:
        tail = bare._text(messages).rpartition(answer)[2]
    places = [tail.index(end) + len(end) for end in ends if end and end in tail]
    return tail[: min(places)] if places else tail.rstrip()


def _require_sound(template: ChatTemplate, has_image: bool) -> None:
    segments = template.render(_PROBE, has_image, None)
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
