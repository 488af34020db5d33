"""By how much the student itself looks while it trains: its visual advantage on a few held-out samples."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from switchkd.data.encoded import EncodedSample, collate
from switchkd.data.samples import BadSample
from switchkd.models.block_attention import without_block_attention
from switchkd.models.components import language_model_of, lm_head_of, replace_lm_head
from switchkd.models.features import media_for, media_of, text_arguments
from switchkd.pipelines.training.held_out.inputs import HeldOut, spread
from switchkd.pipelines.visual_advantage import Measured, SharpAndBlurred, log_probs_of_states, summarise
from switchkd.positions import predicting_rows, targets

NAME = "visual_advantage"
SAMPLES = 16  # of an evaluation


class StudentAdvantage:
    """Measures log p(answer | image) − log p(answer | blurred image) of a student on `SAMPLES` held-out samples with an image.

    The samples are evenly spaced over those whose losses are computed, and are the same in every evaluation. Every process
    computes all of them, so that they may gather sharded layers together; the results are equal.

    Args:
        held_out: the samples. pad_id: of the student's tokenizer. batch_size: samples in a forward pass.
    """

    def __init__(self, held_out: HeldOut, pad_id: int, batch_size: int) -> None:
        self.held_out, self.pad_id, self.batch_size = held_out, pad_id, batch_size

    @cached_property
    def _samples(self) -> list[EncodedSample]:
        """The samples, read once, of similar length side by side; those whose image cannot be used are left out."""
        samples = self.held_out.samples
        encode = SharpAndBlurred(samples.encoder)
        shown = [item for item in self.held_out.chosen if samples.has_image[item]]
        found = []
        for place in spread(len(shown), SAMPLES):
            sample = samples.samples[int(samples.usable[shown[place]])]
            with suppress(BadSample):
                found.append(encode(sample))
        return sorted(found, key=lambda one: len(one.input_ids))

    @torch.no_grad()
    def measure(self, trainer: Any, model: Any) -> dict[str, float]:
        """Return the mean in nats a sample, its standard error and the number of samples, by name; nothing without an image.

        Args:
            trainer: a `SwitchTrainer` within a run. model: its student, in evaluation mode.
        """
        sharp = self._samples
        if not sharp:
            return {}
        passes: list[Tensor] = []
        with without_block_attention(language_model_of(model)):
            for side in (sharp, [replace(one, media=one.blurred) for one in sharp]):
                begins = range(0, len(side), self.batch_size)
                found = [self._log_probs(trainer, model, side[at : at + self.batch_size]) for at in begins]
                passes.append(torch.cat(found))
        every = summarise(Measured([""] * len(sharp), [one.positions for one in sharp], *passes)).every
        assert every is not None
        return {NAME: every.mean, f"{NAME}_error": every.error, f"{NAME}_samples": every.samples}

    def _log_probs(self, trainer: Any, model: Any, samples: Sequence[EncodedSample]) -> Tensor:
        """Return log p of the supervised tokens over all rows of the LM head, [P] float64, nats; inside the forward pass."""
        student, device = trainer.accelerator.unwrap_model(model), trainer.args.device
        batch = {name: value.to(device) for name, value in collate(samples, self.pad_id).items()}
        labels, media = batch["labels"], media_for(student, media_of(batch))
        found: list[Tensor] = []

        def at_states(states: Tensor) -> Tensor:  # [P, d]
            found.append(log_probs_of_states(states, lm_head_of(student), targets(labels)))
            return states

        with trainer.compute_loss_context_manager(), replace_lm_head(student, at_states):
            model(
                **text_arguments(student, batch["input_ids"], batch["attention_mask"], labels, media, None),
                **media,
                logits_to_keep=predicting_rows(labels),
                use_cache=False,
            )
        return found[0]
