"""Real tokenizers and chat templates: ids are those of `apply_chat_template` and of the tokenizer, for whole conversations.

They are fetched by `make test-tokenizers`; without them these tests are skipped.
"""

import os
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from switchkd.data.chat_template import open_chat_template
from switchkd.data.templates import TEMPLATES
from switchkd.data.tokenization import ConversationTokenizer, check_template
from switchkd.errors import ConfigError

FOLDER = Path(os.environ.get("SWITCHKD_TOKENIZERS", "/nonexistent"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="real tokenizers are fetched by `make test-tokenizers`")
# The token that stands for an image; Llama's text models have none, so one that they do not use.
IMAGE = {
    "qwen3": "<|image_pad|>",
    "llama2": "<image>",
    "llama3_1": "<|reserved_special_token_0|>",
    "gemma3": "<image_soft_token>",
}
CONVERSATIONS = {
    "one turn": [("What is <b>it</b>?", "Red, 3.")],
    "several turns": [("What is it?", "A cat."), ("And 12?", "漢字 🧿 Été"), ("Why?", "(because)\n- it is")],
    "white space": [(" What? ", " Red 3. "), ("And?", "\nfar")],
}
COUNT = 5


def opened(name):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / name)
    if name == "llama2":  # whose file lacks them
        tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    return tokenizer, IMAGE[name]


@pytest.mark.parametrize("has_image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma3"])
def test_chat_templates_give_the_ids_of_apply_chat_template(name, case, has_image):
    tokenizer, image = opened(name)
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    ends = [token.content for token in tokenizer.added_tokens_decoder.values()]
    template = open_chat_template(tokenizer.chat_template, special, image, ends)
    words = ConversationTokenizer(tokenizer, tokenizer.convert_tokens_to_ids(image), special=False)
    check_template(words, template, image * COUNT)
    turns = CONVERSATIONS[case]
    messages = []
    for number, (question, answer) in enumerate(turns):
        shown = image * COUNT + "\n" if has_image and number == 0 else ""
        messages += [{"role": "user", "content": shown + question}, {"role": "assistant", "content": answer}]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    if template.parts and has_image:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = words(template.render(turns, has_image, None), [image * COUNT] if has_image else [])
    if not (template.parts and has_image):  # such a template places the image itself
        assert tokens.ids.tolist() == expected
    said = tokenizer.decode(tokens.ids[tokens.supervised])
    assert said.count(template.end) == len(turns)
    for _, answer in turns:
        assert answer.strip() in said
    assert "<think>" not in said
    if case != "white space":
        prompt = words.prompt(template.prompt(turns, has_image, None), [image * COUNT] if has_image else [])
        assert prompt.tolist() == tokens.ids[: len(prompt)].tolist()


def test_the_empty_thinking_block_is_part_of_the_prompt():
    tokenizer, image = opened("qwen3")
    template = open_chat_template(tokenizer.chat_template, {}, image, ["<|im_end|>"])
    *_, (text, supervised) = template.prompt([("What?", "")], False, None)
    assert not supervised
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    ours = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What?"}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert text == ours


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", IMAGE)
def test_our_templates_give_the_ids_of_the_whole_text(name, template):
    tokenizer, image = opened(name)
    words = ConversationTokenizer(tokenizer, tokenizer.convert_tokens_to_ids(image), special=True)
    if (name, template) == ("llama3_1", "qwen2_instruct"):  # which writes no special tokens for this tokenizer
        with pytest.raises(ConfigError, match="makes one token of '>\\\\n'"):
            check_template(words, TEMPLATES[template], image * COUNT)
        return
    check_template(words, TEMPLATES[template], image * COUNT)
    for turns in CONVERSATIONS.values():
        segments = TEMPLATES[template].render(turns, True, tokenizer.eos_token)
        text = "".join(piece for piece, _ in segments).replace("<image>", image * COUNT)
        assert words(segments, [image * COUNT]).ids.tolist() == tokenizer(text)["input_ids"]
        assert (words(segments, [image * COUNT]).ids[0] == tokenizer.bos_token_id) == (name != "qwen3")
