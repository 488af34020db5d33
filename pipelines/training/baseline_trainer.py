"""Training with the objective of LLaVA-KD or Align-KD: the terms of `losses.baselines` beside CE and KL, from the live teacher.

The terms are means over the images of the global batch, exact under accumulation and over processes like everything else.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
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
    use_eager_attention,
)
from switchkd.losses.objective import FusedLoss
from switchkd.losses.signals import TeacherSignal
from switchkd.models.vlm import capture_vision_features, replace_lm_head
from switchkd.pipelines.batch import Batch
from switchkd.pipelines.training.options import TrainOptions
from switchkd.pipelines.training.teacher_source import LiveTeacher
from switchkd.pipelines.training.trainer import SwitchTrainer
from switchkd.positions import predicting_rows


class BaselineTeacher(LiveTeacher):
    """The live teacher, which also shows what it makes of the images; one forward pass serves both."""

    def __init__(self, teacher: LlavaForConditionalGeneration, vocab_rows: int, attention: bool) -> None:
        super().__init__(teacher, vocab_rows)
        self.attention = attention
        self.seen = Seen()
        self.states: Tensor | None = None  # final hidden states of the last batch, [B, L, d_T]

    @torch.no_grad()
    def signal(self, batch: Batch) -> TeacherSignal:
        """See `TeacherSource.signal`; keeps what was seen on the way."""
        language = self.teacher.model.language_model
        hook = language.register_forward_hook(lambda _module, _inputs, output: self._keep(output[0]))
        try:
            with capture_visual_tokens(self.teacher, self.attention) as self.seen:
                return super().signal(batch)
        finally:
            hook.remove()

    def _keep(self, states: Tensor) -> None:
        self.states = states


def make_baseline(
    options: TrainOptions,
    student: LlavaForConditionalGeneration,
    teacher: LlavaForConditionalGeneration,
    vocab_rows: int,
) -> BaselineTeacher:
    """Prepare both models for a baseline's objective: eager attention and, as a submodule of the student, adapters that train."""
    align = options.objective == "align-kd"
    if align:
        texts = teacher.config.text_config, student.config.text_config
        torch.manual_seed(options.seed)
        widths = (texts[0].hidden_size, texts[1].hidden_size)
        adapters = AlignAdapters(widths, (texts[0].num_attention_heads, texts[1].num_attention_heads))
        student.add_module(ADAPTERS, adapters)
        for model in (student, teacher):
            use_eager_attention(model)
    return BaselineTeacher(teacher, vocab_rows, attention=align)


class BaselineTrainer(SwitchTrainer):
    """Minimises CE + λ1·KL + the terms of a baseline, each with its weight of `baselines.TERM_WEIGHTS`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.terms = BASELINES[self.objective.name]
        self._terms_logged = torch.zeros(
            len(self.terms) + 1, dtype=torch.float64
        )  # sums since the last log, and images
        self._items_per_image = torch.ones(())

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Also count the images of the step, since the terms are means over them."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        images = sum(
            (Batch.of(batch).has_image.sum() for batch in batches), start=torch.zeros((), dtype=torch.long)
        ).to(device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            images = self.accelerator.gather(images).sum()
        self._items_per_image = torch.as_tensor(count, device=device) / images.clamp_min(1)
        return batches, count

    def loss_terms(self, model: nn.Module, batch: Batch) -> FusedLoss:
        """Run student, teacher and objective over one batch; the total holds the terms, scaled to the objective's count."""
        student = self.accelerator.unwrap_model(model)
        rows = predicting_rows(batch.labels)
        is_image = batch.input_ids == student.config.image_token_id
        align = self.objective.name == "align-kd"
        kept = rows if align else rows | is_image
        pixels = batch.pixel_values
        found: list[FusedLoss] = []

        def loss_of_states(states: Tensor) -> Tensor:  # [kept, d]
            result = self._loss_of_states(student, states[rows[kept]], features, batch, rows)
            total = result.total
            if pixels is None:
                total = (
                    total + 0.0 * sum(p.sum() for p in student.get_submodule(ADAPTERS).parameters()) if align else total
                )
            else:
                terms = (
                    self._align_kd(student, seen, batch, is_image)
                    if align
                    else self._llava_kd(student, states, kept, is_image)
                )
                self._record_terms(terms)
                weights = torch.tensor([TERM_WEIGHTS[name] for name in self.terms], device=terms.device)
                total = total + (terms.sum(0) * weights).sum() * self._items_per_image.to(terms.device)
            found.append(FusedLoss(total, result.terms))
            return total

        with (
            capture_vision_features(student) as features,
            capture_visual_tokens(student, attention=align) as seen,
            replace_lm_head(student, loss_of_states),
        ):
            total = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                pixel_values=None if pixels is None else pixels.to(student.dtype),
                logits_to_keep=kept,
                use_cache=False,
            ).logits
        return FusedLoss(total, found[0].terms)

    def _llava_kd(self, student: Any, states: Tensor, kept: Tensor, is_image: Tensor) -> Tensor:
        """Terms of every image of the batch, [images, 2]; logits of one image at a time, made again for the backward pass."""
        assert isinstance(self.source, BaselineTeacher) and self.source.states is not None
        rows = self.source.vocab_rows
        heads = student.lm_head.weight[:rows], self.source.teacher.lm_head.weight[:rows]
        images = int(is_image.any(-1).sum())
        of_student = states[is_image[kept]].reshape(images, -1, states.shape[-1])  # [images, n, d_S]
        of_teacher = self.source.states[is_image].reshape(images, -1, self.source.states.shape[-1])

        def terms(mine: Tensor, theirs: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = F.linear(theirs, heads[1])
            return llava_kd_terms(F.linear(mine, heads[0]), wanted)

        pairs = zip(of_student, of_teacher, strict=True)
        return torch.stack([checkpoint(terms, *pair, use_reentrant=False) for pair in pairs])

    def _align_kd(self, student: Any, seen: Seen, batch: Batch, is_image: Tensor) -> Tensor:
        """Terms of every image of the batch, [images, 3]."""
        assert isinstance(self.source, BaselineTeacher)
        shown = self.source.seen
        adapters = student.get_submodule(ADAPTERS)
        # Text that sees the image: what stands after its last token.
        after = is_image.flip(-1).cumsum(-1).flip(-1) == 0
        text = after & batch.attention_mask.bool()
        out = []
        for image, sample in enumerate(batch.has_image.nonzero().flatten().tolist()):
            columns, queries = is_image[sample], text[sample]
            mine, theirs = (found.attention[0][sample][:, queries][:, :, columns].float() for found in (seen, shown))
            tokens = seen.tokens[0][image].float(), shown.tokens[0][image].float()
            out.append(align_kd_terms(tokens, (mine, theirs), adapters))
        return torch.stack(out)

    def _record_terms(self, terms: Tensor) -> None:
        self._terms_logged = self._terms_logged.to(terms.device)
        images = torch.tensor([len(terms)], dtype=torch.float64, device=terms.device)
        self._terms_logged += torch.cat([terms.detach().sum(0).double(), images])

    def more_losses(self) -> dict[str, tuple[float, float]]:
        """See `SwitchTrainer.more_losses`."""
        *sums, images = self.accelerator.reduce(self._terms_logged.to(self.args.device), reduction="sum").tolist()
        self._terms_logged.zero_()
        return {
            name: (value / max(images, 1), TERM_WEIGHTS[name]) for name, value in zip(self.terms, sums, strict=True)
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a checkpoint with the adapters, the finished student without."""
        student = self.accelerator.unwrap_model(self.model)
        if not _internal_call and hasattr(student, ADAPTERS):
            delattr(student, ADAPTERS)
        super().save_model(output_dir, _internal_call)
