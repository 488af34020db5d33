"""Extra loss terms of the baselines LLaVA-KD and Align-KD (paper, Tables 1 and 2), beside CE and KL on the response.

LLaVA-KD (arXiv 2410.16236): KL on the logits at the visual tokens, and a cosine distance between the two models' Gram matrices of
these logits.
Align-KD (arXiv 2412.01282): mean squared errors on the visual tokens (over all of them, and over those that the text attends to
most) and on the first layer's attention from text to vision. Learned adapters map the teacher's widths to the student's.
Each function here computes the loss of one image.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchkd.errors import CheckpointError
from switchkd.losses.kl import kl_loss
from switchkd.losses.reduction import at_least_float32

BASELINES: dict[str, tuple[str, ...]] = {
    "llava-kd": ("visual", "relation"),
    "align-kd": ("tokens", "focus", "attention"),
}
"""Objective → the names of its terms beside CE and Align."""

FOCUS_TOKENS = 16  # Align-KD: visual tokens that the text attends to most
# LLaVA-KD weights its terms equally. Align-KD's weight of the most attended tokens is that of its released code.
TERM_WEIGHTS = {"visual": 1.0, "relation": 1.0, "tokens": 1.0, "focus": 0.1, "attention": 1.0}
ADAPTERS = "peer_adapters"  # attribute of a student in training; the adapters are not saved with the student


def visual_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) of the next-token distributions at an image's n tokens; [n, N] each → scalar, nats."""
    return kl_loss(student, teacher)


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine between the Gram matrices z zᵀ of the logits at an image's tokens, each flattened; [n, N] each → scalar."""
    of_student, of_teacher = (at_least_float32(z) @ at_least_float32(z).T for z in (student, teacher))
    return 1 - F.cosine_similarity(of_student.flatten(), of_teacher.flatten(), dim=0)


def token_losses(student: Tensor, adapted: Tensor, focus: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared differences between visual tokens: (over all n, over those named in `focus`).

    Args:
        student: the student's visual tokens (input of its LLM), [n, d_S]. adapted: the teacher's, after the adapter, [n, d_S].
        focus: ids of the most attended tokens, [k].
    """
    return F.mse_loss(student, adapted), F.mse_loss(student[focus], adapted[focus])


def attention_loss(student: Tensor, adapted: Tensor) -> Tensor:
    """Mean squared difference of the first layer's attention from text to vision, over heads, text tokens and visual tokens.

    Args:
        student: [h_S, t, n]. adapted: the teacher's, its heads mapped by the adapter, [h_S, t, n].
    """
    return F.mse_loss(student, adapted)


def most_attended(attention: Tensor, count: int = FOCUS_TOKENS) -> Tensor:
    """Return the visual tokens with the most attention from the text, mean over heads: [h, t, n] → [min(count, n)] int64."""
    return attention.mean(0).sum(0).topk(min(count, attention.shape[-1])).indices


class AlignAdapters(nn.Module):
    """Align-KD's learned maps from the teacher's visual tokens and attention heads to the student's.

    Args:
        widths, heads: (of the teacher, of the student).
    """

    def __init__(self, widths: tuple[int, int], heads: tuple[int, int]) -> None:
        super().__init__()
        self.tokens = nn.Linear(*widths)
        self.heads = nn.Linear(*heads)

    def adapt_tokens(self, tokens: Tensor) -> Tensor:
        """Map [n, d_T] → [n, d_S]."""
        mapped: Tensor = self.tokens(tokens)
        return mapped

    def adapt_attention(self, attention: Tensor) -> Tensor:
        """Mix heads: [h_T, t, n] → [h_S, t, n]."""
        mapped: Tensor = self.heads(attention.movedim(0, -1))
        return mapped.movedim(-1, 0)


@dataclass
class Seen:
    """Values captured from a model's forward pass: visual tokens, and the first layer's attention if requested."""

    tokens: list[Tensor] = field(default_factory=list)  # [images, n, d], one per forward pass
    attention: list[Tensor] = field(default_factory=list)  # [B, h, L, L]


@contextmanager
def capture_visual_tokens(model: nn.Module, attention: bool) -> Iterator[Seen]:
    """Capture the visual tokens (and attention) of `model`'s forward passes inside the block, with graph; see `Seen`.

    Attention maps need the LLM's eager attention, see `use_eager_attention`.
    """
    seen = Seen()
    projector = model.get_submodule("model.multi_modal_projector")
    hooks = [projector.register_forward_hook(lambda _module, _inputs, output: seen.tokens.append(output))]
    if attention:
        first = first_attention(model)
        hooks.append(first.register_forward_hook(lambda _module, _inputs, output: seen.attention.append(output[1])))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def first_attention(model: nn.Module) -> nn.Module:
    """Return the self-attention of the LLM's first layer. Raises CheckpointError if it is not at Llama's module path."""
    try:
        return model.get_submodule("model.language_model.layers.0.self_attn")
    except AttributeError:
        kind = type(model.get_submodule("model.language_model")).__name__
        raise CheckpointError(f"align-kd reads layers.0.self_attn of the LLM, which {kind} does not have") from None


def use_eager_attention(model: nn.Module) -> None:
    """Switch the LLM to eager attention, which returns the full attention maps; fused kernels do not."""
    model.get_submodule("model.language_model").set_attn_implementation("eager")  # type: ignore[operator]


def llava_kd_terms(student: Tensor, teacher: Tensor) -> Tensor:
    """Return (visual_kl, relation_loss) of one image, [2]; logits at its tokens [n, N] each."""
    return torch.stack([visual_kl(student, teacher), relation_loss(student, teacher)])


def align_kd_terms(tokens: tuple[Tensor, Tensor], attention: tuple[Tensor, Tensor], adapters: AlignAdapters) -> Tensor:
    """Return (tokens, focus, attention) losses of one image, [3].

    Args:
        tokens: (student's [n, d_S], teacher's [n, d_T]). attention: (student's [h_S, t, n], teacher's [h_T, t, n]), from the t
            text tokens that attend to the image; the focus tokens are chosen by the teacher's attention.
    """
    focus = most_attended(attention[1])
    every, focused = token_losses(tokens[0], adapters.adapt_tokens(tokens[1]), focus)
    return torch.stack([every, focused, attention_loss(attention[0], adapters.adapt_attention(attention[1]))])
