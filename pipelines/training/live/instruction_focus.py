"""Align-TI's instruction-aware vision alignment (IVA), with the live teacher: its loss term and the choice of its layer."""

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from switchkd.counting import counted
from switchkd.errors import CheckpointError, ConfigError
from switchkd.losses.baselines import (
    Seen,
    capture_visual_tokens,
    instruction_focus,
    instruction_relevance,
    iva_loss,
    layers_with_attention,
    use_eager_attention,
)
from switchkd.models.features import final_states
from switchkd.pipelines.batch import Batch
from switchkd.pipelines.preflight.left_out import Unusable
from switchkd.pipelines.training.lifecycle.together import from_first_process
from switchkd.pipelines.training.live.extra_terms import VisualLogitTerms, after_image, depth_of, is_image_of
from switchkd.positions import IGNORED

SCORED_IMAGES, SCORED_AT_ONCE = 32, 4  # by which the layer is chosen, and in one forward pass
CHOSEN = "chosen_attention_layer"  # of the run's record
log = logging.getLogger(__name__)


class InstructionFocusTerms(VisualLogitTerms):
    """Align-TI's instruction-aware vision alignment: logits at visual tokens, weighted by the teacher's attention to them."""

    name = "align-ti-iva"

    def attach(self, student: LlavaForConditionalGeneration, seed: int) -> None:
        """See `ExtraTerms.attach`; attention is read of the teacher alone."""
        use_eager_attention(self.source.teacher)

    def prepare(
        self,
        samples: Any,
        collate: Callable[[Any], dict[str, Any]],
        device: torch.device,
        recorded: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Choose the teacher's layer with the highest instruction-relevance score, if none was given; see `ExtraTerms.prepare`.

        The score compares how a layer attends to an image under its own instruction and under that of another sample. The first
        process's choice is taken by all, and again when the run is resumed, so that rounding cannot part them.

        Raises:
            CheckpointError: the teacher's LLM has no self-attention.
            ConfigError: no two samples have an image and different instructions.
        """
        if self.source.attention_layers:
            return {}
        if CHOSEN in recorded:
            self.source.attention_layers = (recorded[CHOSEN],)
            return {CHOSEN: recorded[CHOSEN]}
        teacher, encoded = self.source.teacher, _some_with_image(samples, SCORED_IMAGES)
        layers = layers_with_attention(teacher)
        if not layers:
            raise CheckpointError(
                f"objective {self.name} reads the attention of the teacher's LLM, which has no self_attn in any layer"
            )
        pairs: list[tuple[Tensor, Tensor]] = []  # the focus on one image under two instructions, [layers, n] each
        for first in range(0, len(encoded), SCORED_AT_ONCE):
            columns = collate(encoded[first : first + SCORED_AT_ONCE])
            batch = Batch.of({name: _on(device, value) for name, value in columns.items()})
            pairs += self._under_two_instructions(batch, layers)
        if not pairs:
            raise ConfigError(
                f"objective {self.name} takes the teacher's layer whose attention to an image depends most on the instruction, "
                f"but {counted(len(encoded), 'sample')} with an image gave no two instructions to compare: name a "
                "layer, --attention-layer N"
            )
        scores = instruction_relevance(*(torch.stack(side, 1) for side in zip(*pairs, strict=True)))
        best = from_first_process(lambda: int(scores.argmax()))
        self.source.attention_layers = (layers[best],)
        log.info(
            "%s: layer %d of %d of the teacher's LLM weighs the visual tokens, with the highest instruction-relevance score, %.3f "
            "(lowest %.3f, mean %.3f; %s, two instructions each)",
            self.name, layers[best], depth_of(teacher), scores[best], scores.min(), scores.mean(), counted(len(pairs), "image"),
        )  # fmt: skip
        return {CHOSEN: layers[best]}

    def of_images(self, student: Any, batch: Batch, states: Tensor, kept: Tensor, seen: Seen) -> Tensor:
        """See `ExtraTerms.of_images`, [images, 1]."""
        (maps,) = self.source.seen.attention

        def of_image(mine: Tensor, theirs: Tensor, weights: Tensor) -> Tensor:
            return iva_loss(mine, theirs, weights)[None]

        return self.of_logits(student, batch, states, kept, of_image, _focus(maps, batch, is_image_of(student, batch)))

    @torch.no_grad()
    def _under_two_instructions(self, batch: Batch, layers: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Return the focus of all layers on each image under its own and its neighbour's instruction, where they differ."""
        teacher, media, found = self.source.teacher, batch.media_of_teacher, []
        is_image = is_image_of(teacher, batch)
        asked = [batch.input_ids[i][mask].tolist() for i, mask in enumerate(instruction_tokens(batch, is_image))]
        # Rolled by one, the image of a sample stands beside the instruction of the next.
        for pixels in (media["pixel_values"], media["pixel_values"].roll(1, 0)):
            with capture_visual_tokens(
                teacher, layers, lambda maps: torch.stack(_focus(maps, batch, is_image))
            ) as seen:
                final_states(
                    teacher,
                    batch.input_ids,
                    batch.attention_mask,
                    batch.labels,
                    media | {"pixel_values": pixels},
                    None,
                )
            found.append(torch.stack(seen.attention))  # [layers, B, n]
        own, rolled = found
        pairs = [(i, (i + 1) % len(asked)) for i in range(len(asked))]
        return [(own[:, i], rolled[:, j]) for i, j in pairs if asked[i] and asked[j] and asked[i] != asked[j]]


def instruction_tokens(batch: Batch, is_image: Tensor) -> Tensor:
    """Mark the instruction of each sample, [B, L] bool: text after the image, not supervised, with an answer still to come."""
    supervised = batch.labels != IGNORED
    return after_image(batch, is_image) & ~supervised & (supervised.flip(-1).cumsum(-1).flip(-1) > 0)


def _focus(maps: Tensor, batch: Batch, is_image: Tensor) -> list[Tensor]:
    """Return the weights of the visual tokens of every sample with an image, [n] each, from attention maps [B, h, L, L]."""
    asked = instruction_tokens(batch, is_image)
    shown = batch.has_image.nonzero().flatten().tolist()
    return [instruction_focus(maps[i][:, asked[i]][:, :, is_image[i]]) for i in shown]


def _some_with_image(samples: Any, count: int) -> list[Any]:
    """Return up to `count` samples that have one image, in an order drawn with a fixed seed from four times as many."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))[: 4 * count].tolist()
    read = (samples[number] for number in order)
    usable = (item for item in read if not isinstance(item, Unusable) and len(item[0].image_tokens) == 1)
    return list(islice(usable, count))


def _on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
