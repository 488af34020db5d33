"""Exports a `Template` as a chat template, so that other programs build the same prompts as training."""

import json
from dataclasses import replace

from switchkd.data.templates import IMAGE_MARKER, ConversationFormat, Template

# Content may be a text or a list of content parts; {text} becomes the texts in order.
_TEXT = (
    "{%- if message['content'] is string -%}{%- set text = message['content'] -%}{%- else -%}{%- set text = message['content']"
    " | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}{%- endif -%}"
)


def chat_template_source(template: ConversationFormat, eos: str | None, image: str = IMAGE_MARKER) -> str:
    """Return a format as Jinja source for transformers' chat templates.

    Images are content parts of type "image" in a user's message and are placed as the format defines. System messages are not
    supported.

    Args:
        eos: the tokenizer's end token, written into the source where the format uses it.
        image: what the source writes for an image, and the processor replaces.
    """
    if not isinstance(template, Template):
        return template.as_dict()["chat_template"]
    template = replace(template, image=template.image.replace(IMAGE_MARKER, image))
    # Spaces before an answer are the answer's, see `tokenization`: a generation prompt ends without them.
    before, opening = template.user, template.assistant.rstrip(" ")
    if not opening:
        before = before.rstrip(" ")
    spaces = (template.user + template.assistant)[len(before + opening) :]
    user, assistant = _output(before, template, eos), _output(opening, template, eos)
    answer = _output(spaces + template.answer + template.after, template, eos)
    return (
        f"{_output(template.system, template, eos)}{{%- for message in messages -%}}{_TEXT}"
        f"{{%- if message['role'] == 'user' -%}}{user}"
        f"{{%- elif message['role'] == 'assistant' -%}}{assistant}{answer}"
        "{%- else -%}{{- raise_exception('only user and assistant speak here, not ' + message['role']) -}}{%- endif -%}"
        f"{{%- endfor -%}}{{%- if add_generation_prompt -%}}{assistant}{{%- endif -%}}"
    )


def _output(pattern: str, template: Template, eos: str | None) -> str:
    """Return the Jinja statements that output a pattern of a template."""
    statements = []
    for number, between in enumerate(pattern.replace("{eos}", eos or "").split("{text}")):
        if number:
            statements.append("{{- text -}}")
        for place, literal in enumerate(between.split("{image}")):
            if place:
                image = json.dumps(template.image)
                statements.append(
                    "{%- if message['content'] is not string -%}{%- for part in message['content'] | "
                    f"selectattr('type', 'equalto', 'image') -%}}{{{{- {image} -}}}}{{%- endfor -%}}{{%- endif -%}}"
                )
            if literal:
                statements.append(f"{{{{- {json.dumps(literal)} -}}}}")
    return "".join(statements)
