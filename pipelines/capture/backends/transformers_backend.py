"""Capture with plain transformers: a teacher-forced forward pass, the LM head at supervised positions only."""

from collections.abc import Sequence

import torch

from switchkd.data.encoding import EncodedSample, collate, pad_id_of
from switchkd.models.checkpoint import Checkpoint
from switchkd.models.vlm import freeze, load_model
from switchkd.pipelines.capture.backends.base import Backend
from switchkd.pipelines.capture.backends.packed_rows import pack, unpack
from switchkd.positions import predicting_rows
from switchkd.stores import Manifest, Payload


class TransformersBackend(Backend):
    """A teacher on one device.

    Args:
        device: "cpu", "cuda", "cuda:1", … . dtype: "float32", "bfloat16" or "float16".

    Raises:
        CheckpointError: the weights cannot be loaded.
    """

    def __init__(self, checkpoint: Checkpoint, device: str, dtype: str) -> None:
        self.model = load_model(checkpoint, dtype=dtype).to(device)
        freeze(self.model)
        self.device = device
        self.pad_id = pad_id_of(checkpoint.tokenizer)

    @torch.inference_mode()
    def capture(self, samples: Sequence[EncodedSample], manifest: Manifest) -> list[Payload]:
        """Run the teacher over a batch and pack each sample's positions as the manifest asks.

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
        packed = pack(states, self.model.lm_head, manifest.vocab_rows, manifest.top_k, manifest.has_hidden)
        return unpack(packed, manifest.top_k).split([sample.positions for sample in samples])
