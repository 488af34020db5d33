"""Conversation templates as data: they define the text of turns and which segments of it are supervised.

The supervised mask is correct by construction: a conversation becomes segments, each supervised or not, whose characters are
followed through tokenization (`tokenization.py`). No search in the text is needed, so a pad token that equals the end token is
harmless.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Protocol

from switchkd.errors import ConfigError

IMAGE_MARKER = "<image>"


class NoPlaceForSystem(ConfigError):
    """A conversation with a system prompt, in a format that has none or a fixed one."""


class ConversationFormat(Protocol):
    """Converts conversations to text and supervised mask: a `Template`, or a checkpoint's own `ChatTemplate`."""

    @property
    def name(self) -> str:
        """The name by which options select it."""

    def render(
        self, turns: Iterable[tuple[str, str]], images: int, eos: str | None, system: str = ""
    ) -> list[tuple[str, bool]]:
        """Return the segments (text, supervised) of a conversation, see `Template.render`."""

    def prompt(
        self, turns: Iterable[tuple[str, str]], images: int, eos: str | None, system: str = ""
    ) -> list[tuple[str, bool]]:
        """Return the segments up to where the last turn's answer would begin."""

    def answer_end(self, eos: str | None) -> str:
        """Return what ends an answer, as the model writes it."""

    def as_dict(self) -> dict[str, str]:
        """Return it as plain data, as manifests keep it."""


@dataclass(frozen=True)
class Template:
    """One conversation format. `{text}` is a turn's text, `{eos}` the tokenizer's end token, `{image}` the image's position."""

    name: str
    system: str  # before the first turn
    user: str  # one user turn; without {text} the user's text is left out (pre-training on captions)
    assistant: str  # text before an answer; not supervised
    answer: str  # the supervised text
    after: str = ""  # after an answer; not supervised
    image: str = IMAGE_MARKER + "\n"  # replaces {image} in the first user turn of a sample with an image

    def render(
        self, turns: Iterable[tuple[str, str]], images: int, eos: str | None, system: str = ""
    ) -> list[tuple[str, bool]]:
        """Return the segments (text, supervised) of a conversation.

        Args:
            turns: (question, answer) pairs; questions may hold image markers.
            images: how many images go before the first question, apart from those markers.
            eos: the tokenizer's end token.
            system: the conversation's own system prompt.

        Raises:
            ConfigError: the template uses {eos} and the tokenizer has none.
            NoPlaceForSystem: there is a system prompt, and the template's own is fixed.
        """
        return [segment for segment in self._segments(turns, images, eos, system) if segment[0]]

    def prompt(
        self, turns: Iterable[tuple[str, str]], images: int, eos: str | None, system: str = ""
    ) -> list[tuple[str, bool]]:
        """Return the segments up to where the last turn's answer would begin."""
        *segments, _answer, _after = self._segments(turns, images, eos, system)
        return [segment for segment in segments if segment[0]]

    def _segments(
        self, turns: Iterable[tuple[str, str]], images: int, eos: str | None, system: str
    ) -> list[tuple[str, bool]]:
        if system:
            raise NoPlaceForSystem(
                f"template {self.name!r} has no place for a row's system prompt; --template chat writes it where the "
                "checkpoint's template does"
            )
        segments = [(self._fill(self.system, "", "", eos), False)]
        for number, (question, answer) in enumerate(turns):
            image = self.image * images if number == 0 else ""
            segments.append((self._fill(self.user + self.assistant, question, image, eos), False))
            segments.append((self._fill(self.answer, answer, "", eos), True))
            segments.append((self._fill(self.after, "", "", eos), False))
        return segments

    def _fill(self, pattern: str, text: str, image: str, eos: str | None) -> str:
        if "{eos}" in pattern:
            if eos is None:
                raise ConfigError(f"template {self.name!r} ends answers with the end token, but the tokenizer has none")
            pattern = pattern.replace("{eos}", eos)
        return text.join(part.replace("{image}", image) for part in pattern.split("{text}"))

    def answer_end(self, eos: str | None) -> str:
        """Return what ends an answer, as the model writes it."""
        return self.answer.split("{text}")[-1].replace("{eos}", eos or "")

    def as_dict(self) -> dict[str, str]:
        """Return the template as plain data, as manifests keep it."""
        return asdict(self)


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        # Only image and caption, the pre-training format of LLaVA.
        Template(name="plain", system="", user="{image}", assistant="", answer="{text}\n", image=IMAGE_MARKER),
        # TinyLLaVA's format for base Qwen2 models, after Vicuna's.
        Template(
            name="qwen2_base",
            system=_VICUNA_SYSTEM,
            user="USER: {image}{text} ",
            assistant="ASSISTANT:",
            answer=" {text}{eos}",
        ),
        # ChatML, the format of Qwen2 instruct models.
        Template(
            name="qwen2_instruct",
            system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
            user="<|im_start|>user\n{image}{text}<|im_end|>\n",
            assistant="<|im_start|>assistant\n",
            answer="{text}<|im_end|>",
            after="\n",
        ),
        # Question and answer without role names: for small models and quick experiments.
        Template(name="qa", system="", user="{image}{text} ", assistant="", answer="{text}{eos}"),
    )
}
