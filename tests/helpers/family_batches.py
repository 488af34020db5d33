"""Batches of `families` as a user passes them to the class, and what the class makes of them."""

import families as tiny
import torch

from switchkd.positions import predicting_rows


def own_inputs(family, columns):
    """A batch as a user would pass it to the class."""
    ids, labels = columns["input_ids"], columns["labels"]
    image = ids == tiny.tokenizer(family).convert_tokens_to_ids(tiny.SPECIAL[family].image)
    inputs = {name: value for name, value in columns.items() if name != "labels"}
    if family.startswith(("qwen", "glm4")):
        inputs["mm_token_type_ids"] = image.long()
    if family == "gemma3":
        inputs["token_type_ids"] = image.long()
    if family.startswith("paligemma"):
        inputs["token_type_ids"] = (labels != -100).long()
    return inputs


def own_logits(family, model, columns):
    with torch.no_grad():
        return model(**own_inputs(family, columns), use_cache=False).logits[predicting_rows(columns["labels"])]


def text_of(columns):
    return columns["input_ids"], columns["attention_mask"]


def with_room(columns):
    """A batch with a column of padding at its end."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return columns | {name: torch.nn.functional.pad(columns[name], (0, 1), value=value) for name, value in fill.items()}
