"""Extra loss terms of the baseline objectives LLaVA-KD, Align-KD and CompoDistill, computed with the live teacher.

These terms compare more than logits. An `ExtraTerms` is given to the trainer, which queries it for the rows to keep of a batch,
adds its terms to the loss, and logs them. The terms are means over the images of the global batch; like all other losses, they are
exact under accumulation and with any number of processes. To add an objective of this kind, write its terms in `losses.baselines`
and a class here, and name the class in `KINDS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlavaForConditionalGeneration

from switchkd.losses.baselines import (
    ADAPTERS,
    BASELINES,
    TERM_WEIGHTS,
    AlignAdapters,
    Seen,
    align_kd_terms,
    capture_visual_tokens,
    llava_kd_terms,
    middle_layers,
    use_eager_attention,
    visual_attention_loss,
)
from switchkd.losses.lm_head import float32_logits
from switchkd.losses.signals import TeacherSignal
from switchkd.models.components import language_model_of
from switchkd.pipelines.batch import Batch
from switchkd.pipelines.training.live.teacher_source import LiveTeacher


class BaselineTeacher(LiveTeacher):
    """The live teacher, which also returns its visual tokens and attention maps; all come from one forward pass."""

    def __init__(
        self, teacher: LlavaForConditionalGeneration, vocab_rows: int, attention_layers: Sequence[int] = ()
    ) -> None:
        super().__init__(teacher, vocab_rows)
        self.attention_layers = attention_layers
        self.seen = Seen()
        self.states: Tensor | None = None  # final hidden states of the last batch, [B, L, d_T]

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        """See `TeacherSource.signal`; keeps the final states, visual tokens and attention that were computed on the way."""
        language = language_model_of(self.teacher)
        hook = language.register_forward_hook(lambda _module, _inputs, output: self._keep(output[0]))
        try:
            with capture_visual_tokens(self.teacher, self.attention_layers) as self.seen:
                return super().signal(batch)
        finally:
            hook.remove()

    def _keep(self, states: Tensor) -> None:
        self.states = states


class ExtraTerms(ABC):
    """Loss terms in addition to CE and Align; each has one value per image.

    Args:
        source: the live teacher, which keeps its visual tokens and attention maps.
        attention_layers: of the student, whose attention maps are read.
    """

    name: ClassVar[str]  # of the objective

    def __init__(self, source: BaselineTeacher, attention_layers: Sequence[int] = ()) -> None:
        self.source, self.attention_layers = source, attention_layers
        self.names = BASELINES[self.name]
        self._sums = torch.zeros(len(self.names) + 1, dtype=torch.float64)  # since the last log: terms, and images
        self._items_per_image = torch.ones(())

    @classmethod
    def attention_layers_of(cls, student_depth: int, teacher_depth: int) -> tuple[Sequence[int], Sequence[int]]:
        """Return the layers whose attention maps are read, of student and teacher; the numbers of their LLMs' layers are given."""
        return (), ()

    def attach(self, student: LlavaForConditionalGeneration, seed: int) -> None:
        """Prepare both models, and attach to the student the adapters that are trained with it."""
        adapters = self.adapters_for(student, seed)
        if adapters is not None:
            student.add_module(ADAPTERS, adapters)
        if self.attention_layers:
            for model in (student, self.source.teacher):
                use_eager_attention(model)

    def adapters_for(self, student: LlavaForConditionalGeneration, seed: int) -> nn.Module | None:
        """Create the adapters of this objective, with weights drawn from `seed`; None if it has none."""
        return None

    def detach(self, student: LlavaForConditionalGeneration) -> None:
        """Remove the adapters from the student, which is saved without them; a second call does nothing."""
        if hasattr(student, ADAPTERS):
            delattr(student, ADAPTERS)

    def kept_rows(self, student: LlavaForConditionalGeneration, batch: Batch, rows: Tensor) -> Tensor:
        """Return the rows whose final states the terms read, [B, L] bool; they include `rows`, the rows that predict a position."""
        return rows

    def watch(self, student: LlavaForConditionalGeneration) -> AbstractContextManager[Seen]:
        """Collect the visual tokens and attention of the student's forward pass inside the `with` block."""
        return capture_visual_tokens(student, self.attention_layers)

    def begin_step(self, items: Tensor | int | None, images: Tensor) -> None:
        """Record the divisor of the objective's mean and the number of images, both of the global batch.

        Args:
            images: scalar int64, on the device of the step.
        """
        self._items_per_image = torch.as_tensor(items, device=images.device) / images.clamp_min(1)

    def add_to(self, total: Tensor, student: Any, batch: Batch, states: Tensor, kept: Tensor, seen: Seen) -> Tensor:
        """Return the loss of a micro-batch plus the terms, scaled to the objective's count, and record them for the log.

        Args:
            total: scalar. states: the student's final states at the kept rows, [kept, d_S]. kept: see `kept_rows`.
            seen: what `watch` collected.
        """
        if batch.pixel_values is None:
            return self.without_images(total, student)
        terms = self.of_images(student, batch, states, kept, seen)
        self._record(terms)
        weights = torch.tensor([TERM_WEIGHTS[name] for name in self.names], device=terms.device)
        return total + (terms.sum(0) * weights).sum() * self._items_per_image.to(terms.device)

    @abstractmethod
    def of_images(self, student: Any, batch: Batch, states: Tensor, kept: Tensor, seen: Seen) -> Tensor:
        """Return the terms of every image of a batch, [images, terms]; see `add_to`."""

    def without_images(self, total: Tensor, student: Any) -> Tensor:
        """Return the loss of a text-only batch; its graph must contain every trainable parameter."""
        return total

    def take(self, accelerator: Accelerator) -> dict[str, tuple[float, float]]:
        """Return the terms since the last call, over all processes: name → (mean over images, weight). Every process calls it."""
        *sums, images = accelerator.reduce(self._sums.to(accelerator.device), reduction="sum").tolist()
        self._sums.zero_()
        return {
            name: (value / max(images, 1), TERM_WEIGHTS[name]) for name, value in zip(self.names, sums, strict=True)
        }

    def _record(self, terms: Tensor) -> None:
        self._sums = self._sums.to(terms.device)
        images = torch.tensor([len(terms)], dtype=torch.float64, device=terms.device)
        self._sums += torch.cat([terms.detach().sum(0).double(), images])


class LlavaKDTerms(ExtraTerms):
    """The terms of LLaVA-KD: logits at visual tokens, and the relations between them."""

    name = "llava-kd"

    def kept_rows(self, student: LlavaForConditionalGeneration, batch: Batch, rows: Tensor) -> Tensor:
        """See `ExtraTerms.kept_rows`: also the visual tokens."""
        return rows | _is_image(student, batch)

    def of_images(self, student: Any, batch: Batch, states: Tensor, kept: Tensor, seen: Seen) -> Tensor:
        """See `ExtraTerms.of_images`, [images, 2]; logits of one image at a time, made again for the backward pass."""
        assert self.source.states is not None
        is_image, rows = _is_image(student, batch), self.source.vocab_rows
        heads = student.lm_head.weight[:rows], self.source.teacher.lm_head.weight[:rows]
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else heads[0].dtype
        images = int(is_image.any(-1).sum())
        of_student = states[is_image[kept]].reshape(images, -1, states.shape[-1])  # [images, n, d_S]
        of_teacher = self.source.states[is_image].reshape(images, -1, self.source.states.shape[-1])

        def terms(mine: Tensor, theirs: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = float32_logits(theirs, heads[1])
            return llava_kd_terms(float32_logits(mine.to(dtype), heads[0].to(dtype)), wanted)

        pairs = zip(of_student, of_teacher, strict=True)
        return torch.stack([checkpoint(terms, *pair, use_reentrant=False) for pair in pairs])


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
        is_image, shown = _is_image(student, batch), self.source.seen
        adapters = student.get_submodule(ADAPTERS)
        # Text tokens that attend to the image: those after its last visual token.
        after = is_image.flip(-1).cumsum(-1).flip(-1) == 0
        text = after & batch.attention_mask.bool()
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
        is_image, shown = _is_image(student, batch), self.source.seen
        place = {layer: index for index, layer in enumerate(self.source.attention_layers)}
        groups = middle_layers(*(_depth(model) for model in (student, self.source.teacher))).teacher
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
KINDS: dict[str, type[ExtraTerms]] = {kind.name: kind for kind in (LlavaKDTerms, AlignKDTerms, CompoDistillTerms)}


def make_extra_terms(name: str, student: LlavaForConditionalGeneration, live: LiveTeacher, seed: int) -> ExtraTerms:
    """Create the terms of the objective `name`, one of `KINDS`, and prepare both models for it; `source` is the teacher to use.

    Raises:
        CheckpointError: a model does not return what the terms compare; raised in the first step.
    """
    kind = KINDS[name]
    mine, theirs = kind.attention_layers_of(_depth(student), _depth(live.teacher))
    terms = kind(BaselineTeacher(live.teacher, live.vocab_rows, theirs), mine)
    terms.attach(student, seed)
    return terms


def _depth(model: LlavaForConditionalGeneration) -> int:
    """Number of layers of a model's LLM."""
    depth: int = model.config.text_config.num_hidden_layers
    return depth


def _is_image(student: LlavaForConditionalGeneration, batch: Batch) -> Tensor:
    """Mark the visual tokens of a batch, [B, L] bool."""
    found: Tensor = batch.input_ids == student.config.image_token_id
    return found
