"""Extra loss terms of the baselines LLaVA-KD, Align-KD (paper, Tables 1 and 2), CompoDistill and Align-TI, beside CE and KL.

LLaVA-KD (arXiv 2410.16236): KL on the logits at the visual tokens, and a cosine distance between the two models' Gram matrices of
these logits.
Align-KD (arXiv 2412.01282): mean squared errors on the visual tokens (over all of them, and over those that the text attends to
most) and on the first layer's attention from text to vision. Learned adapters map the teacher's widths to the student's.
CompoDistill (arXiv 2510.12184): cosine distance of the attention among visual tokens in the middle layers, without its peaks.
Align-TI (arXiv 2602.09483), its first part alone (instruction-aware vision alignment, IVA): KL on the logits at the visual tokens,
weighted by the teacher's attention from the instruction. See docs/ablations.md for what of it is followed and what is chosen here.
Each function here computes the loss of one image.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchkd.errors import CheckpointError
from switchkd.losses.kl import kl_loss
from switchkd.losses.reduction import at_least_float32

BASELINES: dict[str, tuple[str, ...]] = {
    "llava-kd": ("visual", "relation"),
    "align-kd": ("tokens", "focus", "attention"),
    "compodistill": ("visual_attention",),
    "align-ti-iva": ("iva",),
}
"""Objective → the names of its terms beside CE and Align."""

FOCUS_TOKENS = 16  # Align-KD: visual tokens that the text attends to most
# LLaVA-KD and CompoDistill weight their terms equally. Align-KD's weight of the most attended tokens is that of its released code.
TERM_WEIGHTS = {
    "visual": 1.0,
    "relation": 1.0,
    "tokens": 1.0,
    "focus": 0.1,
    "attention": 1.0,
    "visual_attention": 1.0,
    "iva": 1.0,
}
ATTENTION_GROUPS = 7  # CompoDistill: pairs of a student's layer and a group of the teacher's
TEACHER_GROUP = {24: 2, 28: 3, 32: 3, 40: 5}  # CompoDistill's released code: depth of the teacher → layers in a group
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


class MiddleLayers(NamedTuple):
    """The layers whose attention CompoDistill compares, pair by pair."""

    student: tuple[int, ...]
    teacher: tuple[tuple[int, ...], ...]  # a group of consecutive layers for each of the student's


def middle_layers(student_depth: int, teacher_depth: int) -> MiddleLayers:
    """Choose the middle layers of two LLMs, which begin after a third of the depth.

    Seven layers of the student, each with a group of the teacher's; the groups overlap, one layer apart. For the depths that
    CompoDistill's released code lists (24, 28, 32 and 40 layers) layers and groups are its own. For other depths there are at most
    as many pairs as the middle third of either model has layers, and the groups span the teacher's middle third.
    """
    thirds = [max(1, round(depth / 3)) for depth in (student_depth, teacher_depth)]
    starts = [min(round(depth / 3), depth - 1) for depth in (student_depth, teacher_depth)]
    pairs = min(ATTENTION_GROUPS, *thirds)
    size = TEACHER_GROUP.get(teacher_depth, max(1, thirds[1] - pairs + 1))
    groups = [range(starts[1] + pair, min(starts[1] + pair + size, teacher_depth)) for pair in range(pairs)]
    return MiddleLayers(tuple(starts[0] + pair for pair in range(pairs)), tuple(map(tuple, groups)))


def visual_attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over layers of 1 - cosine between the attention that each visual token of an image receives from the others.

    Peaks (entries above mean + standard deviation of their map, in either map) and the entries that causal attention leaves at 0
    are removed from both maps; the rest is averaged over the n queries, and the two vectors of n values are compared. So does
    CompoDistill's released code.

    Args:
        student, teacher: attention among an image's tokens, mean over heads (and over the teacher's group), [layers, n, n]; rows
            are queries.

    Returns:
        Scalar, 0 … layers.
    """
    kept = _without_peaks(student) & _without_peaks(teacher) & (teacher != 0)
    count = kept.sum(-2).clamp_min(1)
    mine, theirs = ((each * kept).sum(-2) / count for each in (student, teacher))  # [layers, n]
    return (1 - F.cosine_similarity(mine, theirs, dim=-1)).sum()


def _without_peaks(maps: Tensor) -> Tensor:
    """Mark the entries up to mean + standard deviation of their map, [layers, n, n] bool."""
    entries = maps.detach().flatten(1)
    spread = entries.std(-1, correction=min(1, entries.shape[-1] - 1))
    found: Tensor = maps.detach() <= (entries.mean(-1) + spread)[:, None, None]
    return found


def instruction_focus(attention: Tensor) -> Tensor:
    """Return the weight of each visual token: its share of the attention that the instruction pays to the image (Align-TI, IVA).

    Args:
        attention: of one layer of the teacher, from the t tokens of the instruction to the n of the image, [h, t, n].

    Returns:
        [n], at least float32, the sum over heads and instruction tokens, divided by its sum over the image. Where nothing attends
        to the image (no instruction, or a layer whose window does not reach back to it), all tokens weigh the same.
    """
    paid = at_least_float32(attention).sum((0, 1))
    paid = torch.where(paid.sum() > 0, paid, torch.ones_like(paid))
    return paid / paid.sum()


def iva_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """KL(teacher ‖ student) of the next-token distributions at an image's n tokens, weighted (Align-TI, IVA).

    Args:
        student, teacher: [n, N] logits. weights: [n], see `instruction_focus`; equal ones make it `visual_kl`.

    Returns:
        Scalar, nats.
    """
    return (kl_loss(student, teacher, reduction="none") * weights).sum()


def instruction_relevance(first: Tensor, second: Tensor) -> Tensor:
    """Return Align-TI's instruction-relevance score of each layer: 1 - mean cosine of its focus under two instructions.

    Args:
        first, second: the focus on one image under one instruction and under another, [layers, pairs, n] each.

    Returns:
        [layers], 0 … 1: 0 for a layer that attends to an image in the same way whatever is asked.
    """
    return 1 - F.cosine_similarity(first, second, dim=-1).mean(-1)


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
    """Values captured from a model's forward pass: visual tokens, and the attention of the requested layers."""

    tokens: list[Tensor] = field(default_factory=list)  # [images, n, d], one per forward pass
    attention: list[Tensor] = field(default_factory=list)  # [B, h, L, L] of each requested layer, in order


@contextmanager
def capture_visual_tokens(
    model: nn.Module, layers: Sequence[int] = (), keep: Callable[[Tensor], Tensor] = lambda maps: maps
) -> Iterator[Seen]:
    """Capture the visual tokens and the attention of `layers` of `model`'s forward passes inside the block, with graph; see `Seen`.

    Attention maps need the LLM's eager attention, see `use_eager_attention`.

    Args:
        keep: returns what is kept of a layer's maps [B, h, L, L], for callers that read many layers.
    """
    seen = Seen()
    projector = model.get_submodule("model.multi_modal_projector")
    hooks = [projector.register_forward_hook(lambda _module, _inputs, output: seen.tokens.append(output))]
    for layer in layers:
        module = attention_of(model, layer)
        hooks.append(
            module.register_forward_hook(lambda _module, _inputs, output: seen.attention.append(keep(output[1])))
        )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def layers_with_attention(model: nn.Module) -> list[int]:
    """Return the numbers of those layers of the LLM that have self-attention; some hybrids have it in a few of them."""
    layers = model.get_submodule("model.language_model.layers").named_children()
    return [int(number) for number, layer in layers if hasattr(layer, "self_attn")]


def attention_of(model: nn.Module, layer: int) -> nn.Module:
    """Return the self-attention of a layer of the LLM. Raises CheckpointError if it is not at Llama's module path."""
    try:
        return model.get_submodule(f"model.language_model.layers.{layer}.self_attn")
    except AttributeError:
        kind = type(model.get_submodule("model.language_model")).__name__
        raise CheckpointError(
            f"the objective reads layers.{layer}.self_attn of the LLM, which {kind} does not have"
        ) from None


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
