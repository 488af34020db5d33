"""Extra loss terms of the baseline objectives LLaVA-KD, Align-KD and CompoDistill, computed with the live teacher; `KINDS` has all.

To add an objective of this kind, write its terms in `losses.baselines` and a subclass of `ExtraTerms` here or in a module beside
this one, and name the class in `KINDS`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from switchkd.losses.baselines import (
    ADAPTERS,
    AlignAdapters,
    Seen,
    align_kd_terms,
    llava_kd_terms,
    middle_layers,
    visual_attention_loss,
)
from switchkd.pipelines.batch import Batch
from switchkd.pipelines.training.live.extra_terms import (
    BaselineTeacher,
    ExtraTerms,
    VisualLogitTerms,
    after_image,
    depth_of,
    is_image_of,
)
from switchkd.pipelines.training.live.instruction_focus import InstructionFocusTerms
from switchkd.pipelines.training.live.teacher_source import LiveTeacher


class LlavaKDTerms(VisualLogitTerms):
    """The terms of LLaVA-KD: logits at visual tokens, and the relations between them."""

    name = "llava-kd"

    def of_images(self, student: Any, batch: Batch, states: Tensor, kept: Tensor, seen: Seen) -> Tensor:
        """See `ExtraTerms.of_images`, [images, 2]."""
        return self.of_logits(student, batch, states, kept, llava_kd_terms)


class AlignKDTerms(ExtraTerms):
    """The terms of Align-KD: visual tokens and attention, through adapters that train as a submodule of the student."""

    name = "align-kd"

    @classmethod
    def attention_layers_of(cls, student_depth: int, teacher_depth: int) -> tuple[Sequence[int], Sequence[int]]:
        """See `ExtraTerms.attention_layers_of`: the first layer."""
        return (0,), (0,)

    def adapters_for(self, student: LlavaForConditionalGeneration, seed: int) -> nn.Module:
        """See `ExtraTerms.adapters_for`."""
        texts = self.source.teacher.config.text_config, student.config.text_config
        torch.manual_seed(seed)
        widths = (texts[0].hidden_size, texts[1].hidden_size)
        return AlignAdapters(widths, (texts[0].num_attention_heads, texts[1].num_attention_heads))

    def of_images(self, student: Any, batch: Batch, states: Tensor, kept: Tensor, seen: Seen) -> Tensor:
        """See `ExtraTerms.of_images`, [images, 3]."""
        is_image, shown = is_image_of(student, batch), self.source.seen
        adapters = student.get_submodule(ADAPTERS)
        text = after_image(batch, is_image)
        out = []
        for image, sample in enumerate(batch.has_image.nonzero().flatten().tolist()):
            columns, queries = is_image[sample], text[sample]
            mine, theirs = (found.attention[0][sample][:, queries][:, :, columns].float() for found in (seen, shown))
            tokens = seen.tokens[0][image].float(), shown.tokens[0][image].float()
            out.append(align_kd_terms(tokens, (mine, theirs), adapters))
        return torch.stack(out)

    def without_images(self, total: Tensor, student: Any) -> Tensor:
        """See `ExtraTerms.without_images`: the adapters, times 0."""
        with_graph: Tensor = total + 0.0 * sum(p.sum() for p in student.get_submodule(ADAPTERS).parameters())
        return with_graph


class CompoDistillTerms(ExtraTerms):
    """The term of CompoDistill: attention among visual tokens in the middle layers."""

    name = "compodistill"

    @classmethod
    def attention_layers_of(cls, student_depth: int, teacher_depth: int) -> tuple[Sequence[int], Sequence[int]]:
        """See `ExtraTerms.attention_layers_of`: the middle layers, `baselines.middle_layers`."""
        found = middle_layers(student_depth, teacher_depth)
        return found.student, sorted({layer for group in found.teacher for layer in group})

    def of_images(self, student: Any, batch: Batch, states: Tensor, kept: Tensor, seen: Seen) -> Tensor:
        """See `ExtraTerms.of_images`, [images, 1]."""
        is_image, shown = is_image_of(student, batch), self.source.seen
        place = {layer: index for index, layer in enumerate(self.source.attention_layers)}
        groups = middle_layers(*(depth_of(model) for model in (student, self.source.teacher))).teacher
        out = []
        for sample in batch.has_image.nonzero().flatten().tolist():
            columns = is_image[sample]

            def among(maps: Tensor, at: int = sample, visual: Tensor = columns) -> Tensor:  # [B, h, L, L] → [n, n]
                return maps[at].float().mean(0)[visual][:, visual]

            mine = torch.stack([among(maps) for maps in seen.attention])
            theirs = [among(maps) for maps in shown.attention]
            grouped = [torch.stack([theirs[place[layer]] for layer in group]).mean(0) for group in groups]
            out.append(visual_attention_loss(mine, torch.stack(grouped)))
        return torch.stack(out)[:, None]


# Objective → its terms; the keys are those of `losses.baselines.BASELINES`.
KINDS: dict[str, type[ExtraTerms]] = {
    kind.name: kind for kind in (LlavaKDTerms, AlignKDTerms, CompoDistillTerms, InstructionFocusTerms)
}


def make_extra_terms(
    name: str,
    student: LlavaForConditionalGeneration,
    live: LiveTeacher,
    seed: int,
    attention_layer: int | None = None,
) -> ExtraTerms:
    """Create the terms of the objective `name`, one of `KINDS`, and prepare both models for it; `source` is the teacher to use.

    Args:
        attention_layer: of the teacher, in place of those that the objective takes.

    Raises:
        CheckpointError: a model does not return what the terms compare; raised in the first step.
    """
    kind = KINDS[name]
    mine, theirs = kind.attention_layers_of(depth_of(student), depth_of(live.teacher))
    theirs = theirs if attention_layer is None else (attention_layer,)
    terms = kind(BaselineTeacher(live.teacher, live.vocab_rows, theirs), mine)
    terms.attach(student, seed)
    return terms
