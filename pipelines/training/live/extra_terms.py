"""Loss terms that compare more than logits at the positions: what the baselines' objectives have in common.

An `ExtraTerms` is given to the trainer, which queries it for the rows to keep of a batch, adds its terms to the loss, and logs
them. The terms are means over the images of the global batch; like all other losses, they are exact under accumulation and with
any number of processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
    Seen,
    capture_visual_tokens,
    use_eager_attention,
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

    def prepare(
        self,
        samples: Any,
        collate: Callable[[Any], dict[str, Any]],
        device: torch.device,
        recorded: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Set what depends on the data, with the teacher on its device; called in every process before the first step.

        Args:
            samples: of the run, the same in every process and when the run is resumed. collate: makes a batch's columns of some.
            recorded: the record of the run that is resumed, whose choice is taken again; empty for a new one.

        Returns:
            What was chosen, for the run's record: name → YAML value.
        """
        return {}

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


class VisualLogitTerms(ExtraTerms):
    """Terms on the logits at visual tokens."""

    def kept_rows(self, student: LlavaForConditionalGeneration, batch: Batch, rows: Tensor) -> Tensor:
        """See `ExtraTerms.kept_rows`: also the visual tokens."""
        return rows | is_image_of(student, batch)

    def of_logits(
        self,
        student: Any,
        batch: Batch,
        states: Tensor,
        kept: Tensor,
        of_image: Callable[..., Tensor],
        *beside: Sequence[Tensor],
    ) -> Tensor:
        """Return the terms of every image, [images, terms]; logits of one image at a time, made again for the backward pass.

        Args:
            states, kept: see `add_to`.
            of_image: takes the student's and the teacher's logits at an image's tokens, [n, N] each, and the tensors of `beside`
                that belong to the image; returns its terms, [terms].
        """
        assert self.source.states is not None
        is_image, rows = is_image_of(student, batch), self.source.vocab_rows
        heads = student.lm_head.weight[:rows], self.source.teacher.lm_head.weight[:rows]
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else heads[0].dtype
        tokens = is_image.sum(-1)[batch.has_image].tolist()
        of_student = states[is_image[kept]].split(tokens)  # [n, d_S] each
        of_teacher = self.source.states[is_image].split(tokens)

        def terms(mine: Tensor, theirs: Tensor, *more: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = float32_logits(theirs, heads[1])
            return of_image(float32_logits(mine.to(dtype), heads[0].to(dtype)), wanted, *more)

        images = zip(of_student, of_teacher, *beside, strict=True)
        return torch.stack([checkpoint(terms, *image, use_reentrant=False) for image in images])


def depth_of(model: LlavaForConditionalGeneration) -> int:
    """Return the number of layers of a model's LLM."""
    depth: int = model.config.text_config.num_hidden_layers
    return depth


def is_image_of(model: LlavaForConditionalGeneration, batch: Batch) -> Tensor:
    """Mark the visual tokens of a batch, [B, L] bool."""
    found: Tensor = batch.input_ids == model.config.image_token_id
    return found


def after_image(batch: Batch, is_image: Tensor) -> Tensor:
    """Mark the text tokens that attend to the image, those after its last visual token, [B, L] bool."""
    return (is_image.flip(-1).cumsum(-1).flip(-1) == 0) & batch.attention_mask.bool()
