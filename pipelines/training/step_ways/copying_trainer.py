"""A Trainer whose batches reach the device without a wait, and whose student may compute with bfloat16 copies of its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from switchkd.pipelines.training.step_ways.half_copies import HalfCopies
from switchkd.pipelines.training.step_ways.transfers import on_device


class CopyingTrainer(Trainer):  # type: ignore[misc]
    """Runs the passes of every micro-batch with the copies in place, if `uses_half_copies` is set."""

    uses_half_copies = False
    half_copies: HalfCopies | None = None  # made in the first step, when the model has its device and its weights

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run forward and backward passes of one micro-batch; both read the copies of the weights, where there are copies."""
        with self.reading_copies():
            loss: Tensor = super().training_step(model, on_device(inputs, self.args.device), num_items_in_batch)
        return loss

    @contextmanager
    def reading_copies(self) -> Iterator[None]:
        """Let the student compute with the copies inside the block; nothing may be saved there."""
        if not self.uses_half_copies:
            yield
            return
        if self.half_copies is None:
            self.half_copies = HalfCopies(self.model, self.optimizer.optimizer)  # unwrap accelerate's wrapper
        with self.half_copies.in_place():
            yield
