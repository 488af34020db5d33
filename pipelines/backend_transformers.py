"""Capture with plain transformers: a teacher-forced forward pass, the LM head at supervised positions only."""

from collections.abc import Sequence

import torch

from switchkd.encoding import EncodedSample, collate, pad_id_of
from switchkd.errors import RunError
from switchkd.pipelines.capture import Packed, pack_topk
from switchkd.positions import predicting_rows
from switchkd.vlm import Checkpoint, freeze, load_model

LOGIT_ROWS = 1024  # rows of [rows, V] logits that exist at a time


class TransformersBackend:
    """A teacher on one device.

    Args:
        device: "cpu", "cuda", "cuda:1", … . dtype: "float32", "bfloat16" or "float16".

    Raises:
        CheckpointError: the weights cannot be loaded.
    """

    name = "transformers"

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: str) -> None:
        self.model = load_model(checkpoint, dtype=dtype).to(device)
        freeze(self.model)
        self.device = device
        self.vocab_rows = checkpoint.vocab_rows
        self.pad_id = pad_id_of(checkpoint.tokenizer)

    @torch.inference_mode()
    def capture(self, samples: Sequence[EncodedSample], top_k: int) -> list[Packed]:
        """Run the teacher over a batch and pack each sample's positions.

        Raises:
            RunError: logits of a sample are not finite.
        """
        batch = collate(samples, self.pad_id)
        has_image = batch.pop("has_image")
        rows = predicting_rows(batch.pop("labels"))
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        if has_image.any():
            batch["pixel_values"] = batch["pixel_values"].to(self.model.dtype)
        states = self.model.model(**batch, use_cache=False).last_hidden_state[rows.to(self.device)]  # [P, d]
        pieces = [
            pack_topk(self.model.lm_head(chunk)[:, : self.vocab_rows], top_k) for chunk in states.split(LOGIT_ROWS)
        ]
        return Packed.concatenate(pieces, top_k).split([sample.positions for sample in samples])

    def capture_each(self, samples: Sequence[EncodedSample], top_k: int) -> list[Packed | RunError]:
        """Like `capture`, sample by sample: used to find the one that fails."""
        found: list[Packed | RunError] = []
        for sample in samples:
            try:
                found += self.capture([sample], top_k)
            except RunError as error:
                found.append(error)
        return found
