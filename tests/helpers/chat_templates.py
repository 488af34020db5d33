"""A checkpoint with a chat template of its own."""

import pytest
import tiny
from transformers import AutoTokenizer

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def with_chat(teacher, tmp_path_factory):
    """The tiny teacher with a chat template and the tokens that it needs."""
    folder = tiny.checkpoint(
        tmp_path_factory.mktemp("chat") / "ckpt", seed=0, words=[*tiny.WORDS, "<|im_start|>", "<|im_end|>"]
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(
        {"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder
