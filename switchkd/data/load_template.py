"""Loads a conversation template by name, from a JSON file, from a checkpoint or from a store's manifest."""

import json
import logging
from dataclasses import fields
from pathlib import Path

from switchkd.data.chat_template import ChatTemplate, chat_template_of, open_chat_template
from switchkd.data.media import MediaReader
from switchkd.data.templates import IMAGE_MARKER, TEMPLATES, ConversationFormat, Template
from switchkd.errors import ConfigError
from switchkd.models.checkpoint import Checkpoint
from switchkd.models.families import family_of

log = logging.getLogger(__name__)
CHECKPOINT_TEMPLATE = "chat"  # the checkpoint's own chat template
LLAVA_TEMPLATE = "qwen2_base"


def load_template(name_or_path: str | None, checkpoint: Checkpoint | None = None) -> ConversationFormat:
    """Return a template by name, or read one from a JSON file with the fields of `Template`.

    Args:
        name_or_path: one of `TEMPLATES`, a file, or "chat", the chat template of `checkpoint`. None: the default, which is
            qwen2_base for a LLaVA checkpoint, since there the data decides and not the checkpoint, and "chat" for other families.

    Raises:
        ConfigError: neither a known name nor a readable template file; a chat template whose answers cannot be found.
        CheckpointError: a chat template is asked for, and the checkpoint's processor cannot be opened.
    """
    if name_or_path is None:
        return _default_template(checkpoint)
    if name_or_path == CHECKPOINT_TEMPLATE and checkpoint is not None:
        tokenizer = checkpoint.tokenizer
        return open_chat_template(
            chat_template_of(checkpoint.path, tokenizer),
            {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
            MediaReader(checkpoint).marker,
            [token.content for token in tokenizer.added_tokens_decoder.values()],
        )
    if name_or_path in TEMPLATES:
        if checkpoint is not None and not family_of(checkpoint.config).is_llava and checkpoint.tokenizer.chat_template:
            log.warning(
                "template %s: %s, a %s, has a chat template of its own, which it was most likely trained with: --template %s",
                name_or_path, checkpoint.path, checkpoint.config.model_type, CHECKPOINT_TEMPLATE,
            )  # fmt: skip
        return TEMPLATES[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(
            f"no template {name_or_path!r}: pass one of {', '.join((*TEMPLATES, CHECKPOINT_TEMPLATE))}, or a JSON file"
        )
    try:
        return template_from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"template file {path} is not JSON: {error}") from error


def _default_template(checkpoint: Checkpoint | None) -> ConversationFormat:
    if checkpoint is None or family_of(checkpoint.config).is_llava:
        return TEMPLATES[LLAVA_TEMPLATE]
    try:
        return load_template(CHECKPOINT_TEMPLATE, checkpoint)
    except ConfigError as error:
        raise ConfigError(
            f"{checkpoint.path}, a {checkpoint.config.model_type}: its conversation template is not known: pass --template "
            f"({error})"
        ) from None


def template_from_dict(data: object) -> ConversationFormat:
    """Create a template from plain data. Raises ConfigError, which names fields that are missing, unknown or not strings."""
    if isinstance(data, dict) and "chat_template" in data:
        tokens = json.loads(data["special_tokens"])
        return ChatTemplate(data["chat_template"], tokens, data["image_token"], data["content"] == "parts", data["end"])
    known = {field.name for field in fields(Template)}
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise ConfigError(f"a template is an object of strings with the keys {', '.join(sorted(known))}")
    required = known - {"after", "image"}
    if missing := required - data.keys():
        raise ConfigError(f"template lacks {', '.join(sorted(missing))}")
    if unknown := data.keys() - known:
        raise ConfigError(f"template has unknown keys {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
    template = Template(**data)
    _require_sound(template)
    return template


def _require_sound(template: Template) -> None:
    """Raise ConfigError if this template cannot produce valid samples."""
    if "{text}" not in template.answer:
        raise ConfigError(f"template {template.name!r}: 'answer' must hold {{text}}, or every answer would be the same")
    if "{image}" not in template.user:
        raise ConfigError(f"template {template.name!r}: 'user' must hold {{image}}, where the image goes")
    if template.image.count(IMAGE_MARKER) != 1:
        raise ConfigError(f"template {template.name!r}: 'image' must hold {IMAGE_MARKER} exactly once")
    for name in ("system", "user", "assistant", "answer", "after"):
        if IMAGE_MARKER in getattr(template, name):
            raise ConfigError(f"template {template.name!r}: {IMAGE_MARKER} belongs into 'image', not into {name!r}")
