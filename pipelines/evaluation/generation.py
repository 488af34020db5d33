"""Greedy decoding in batches, and the file of predictions, from which an interrupted evaluation resumes."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import GenerationConfig, TextStreamer

from switchkd.data.encoded import Prompt, pad_id_of
from switchkd.data.encoding import SampleEncoder
from switchkd.data.media import collate_media
from switchkd.data.samples import BadSample
from switchkd.data.templates import ConversationFormat
from switchkd.models.features import media_for, type_ids
from switchkd.pipelines.cores import workers_beside
from switchkd.pipelines.run_folder import write_atomically

T = TypeVar("T")


class _Prompts(Dataset[Prompt | BadSample], Generic[T]):
    def __init__(self, items: Sequence[T], encode: Callable[[T], Prompt]) -> None:
        self.items, self.encode = items, encode

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Prompt | BadSample:
        try:
            return self.encode(self.items[index])
        except BadSample as bad:
            return bad


def encoded_batches(
    items: Sequence[T], encode: Callable[[T], Prompt], batch_size: int, workers: int | None
) -> Iterator[tuple[Sequence[T], list[Prompt | BadSample]]]:
    """Yield batches of items in order, each item with its prompt, or with the reason why it cannot be used.

    Args:
        encode: raises BadSample. workers: processes that encode ahead; 0 encodes in this process, when a batch is needed; None
            chooses by the cores there are.
    """
    if workers is None:
        workers = workers_beside(1)
    loader = DataLoader(_Prompts(items, encode), batch_size, num_workers=workers, collate_fn=list)
    for number, prompts in enumerate(loader):
        yield items[number * batch_size : (number + 1) * batch_size], prompts


class GreedyGenerator:
    """Greedy decoding of batches.

    A checkpoint's own generation settings are not used: those of an instruct model usually include a repetition penalty, which
    changes greedy answers too.

    Args:
        model: on its device; its generation settings are cleared. encoder: has the tokenizer. template: defines an answer's end.
        max_new_tokens: limit of an answer's length; longer answers are truncated.
    """

    def __init__(
        self,
        model: Any,
        encoder: SampleEncoder,
        template: ConversationFormat,
        max_new_tokens: int,
    ) -> None:
        model.generation_config = GenerationConfig()
        self.model, self.max_new_tokens = model, max_new_tokens
        self.tokenizer = encoder.tokenizer
        self.pad_id = pad_id_of(self.tokenizer)
        self.stop_ids = stop_ids_of(template, self.tokenizer)

    @torch.no_grad()  # not inference mode: a student that goes on training is asked, too
    def answer(self, prompts: Sequence[Prompt | BadSample]) -> list[str | BadSample]:
        """Return the answer to each prompt; an entry that could not be encoded is returned unchanged."""
        results: list[str | BadSample] = [prompt if isinstance(prompt, BadSample) else "" for prompt in prompts]
        rows = [(place, prompt) for place, prompt in enumerate(prompts) if not isinstance(prompt, BadSample)]
        if not rows:
            return results
        length = max(len(prompt.ids) for _, prompt in rows)
        input_ids = torch.full((len(rows), length), self.pad_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, (_, prompt) in enumerate(rows):  # padded on the left, since generation appends on the right
            input_ids[row, length - len(prompt.ids) :] = torch.from_numpy(prompt.ids).long()
            attention_mask[row, length - len(prompt.ids) :] = 1
        media = collate_media([prompt.media for _, prompt in rows if prompt.media is not None])
        generated = self.model.generate(
            **self._inputs(input_ids, attention_mask, media),
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.pad_id,
        )
        for (place, _), ids in zip(rows, generated[:, length:].tolist(), strict=True):
            cut = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
            results[place] = self.tokenizer.decode(ids[:cut], skip_special_tokens=True).strip()
        return results

    def _inputs(self, input_ids: Tensor, attention_mask: Tensor, media: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the arguments of `generate`: the prompts, their type ids by the family's rule, and their images."""
        text = {"input_ids": input_ids, "attention_mask": attention_mask} | type_ids(self.model.config, input_ids, None)
        return {name: tensor.to(self.model.device) for name, tensor in text.items()} | media_for(self.model, media)

    @torch.inference_mode()
    def say(self, prompt: Prompt, heard: Callable[[str], None]) -> str:
        """Return the answer to one prompt, and stream its words while they are generated.

        Args:
            heard: is called with each piece of text; the pieces, joined and stripped, are the answer.
        """
        ids = torch.from_numpy(prompt.ids).long()[None]
        inputs = self._inputs(ids, torch.ones_like(ids), prompt.media or {})
        pieces: list[str] = []

        def hear(piece: str) -> None:
            pieces.append(piece)
            heard(piece)

        self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.stop_ids,
            pad_token_id=self.pad_id,
            streamer=_Streamer(self.tokenizer, self.stop_ids, hear),
        )
        return "".join(pieces).strip()


class _Streamer(TextStreamer):
    """Streams text as soon as its tokens form whole words; the ids that end an answer are left out."""

    def __init__(self, tokenizer: Any, stop_ids: list[int], heard: Callable[[str], Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop_ids, self.heard = stop_ids, heard

    def put(self, value: Tensor) -> None:
        """Receive the prompt, then one token per call."""
        if self.next_tokens_are_prompt or int(value.flatten()[0]) not in self.stop_ids:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass text on."""
        if text:
            self.heard(text)


def stop_ids_of(template: ConversationFormat, tokenizer: Any) -> list[int]:
    """Return the ids that end an answer: the tokenizer's end token, and the first id of the template's suffix."""
    end = template.answer_end(tokenizer.eos_token)
    ids = tokenizer.encode(end, add_special_tokens=False) if end else []
    return sorted({*ids[:1], *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def read_lines(path: Path, *key: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Read the rows of an earlier run by the fields `key`; an incomplete last line is removed from the file."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    found, whole = parse_lines(text, *key)
    if (kept := "".join(line + "\n" for line in whole)) != text:
        write_atomically(path, kept)
    return found


def parse_lines(text: str, *key: str) -> tuple[dict[tuple[Any, ...], dict[str, Any]], list[str]]:
    """Return the rows of JSON Lines by the fields `key`, and the lines that hold them; an incomplete line is left out."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    whole = []
    for line in filter(None, text.split("\n")):
        try:
            content = json.loads(line)
            found[tuple(content[name] for name in key)] = content
        except (ValueError, KeyError, TypeError):
            continue
        whole.append(line)
    return found, whole
