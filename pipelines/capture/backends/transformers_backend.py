"""Capture with plain transformers: a teacher-forced forward pass, the LM head at supervised positions only."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from switchkd.data.encoded import EncodedSample, collate, pad_id_of
from switchkd.errors import RunError
from switchkd.models.checkpoint import Checkpoint
from switchkd.models.components import lm_head_of
from switchkd.models.vlm import freeze, load_model, states_at_positions
from switchkd.pipelines.capture.backends.base import Backend
from switchkd.pipelines.capture.backends.packed_rows import pack, unpack
from switchkd.pipelines.visual_advantage import advantages
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
        self.pad_id = pad_id_of(checkpoint.tokenizer)

    @torch.inference_mode()
    def capture(self, samples: Sequence[EncodedSample], manifest: Manifest) -> list[Payload]:
        """Run the teacher over a batch and pack each sample's positions as the manifest specifies.

        For visual advantages it runs a second time, over the blurred images.

        Raises:
            RunError: logits of a sample are not finite.
        """
        states, head = states_at_positions(self.model, collate(samples, self.pad_id)), lm_head_of(self.model)  # [P, d]
        packed = pack(states, head.logits, manifest.vocab_rows, manifest.top_k, manifest.has_hidden)
        payload = unpack(packed, manifest.top_k)
        if manifest.visual_advantage:
            found = advantages(self.model, head.rows(manifest.vocab_rows), samples, states, self.pad_id)
            if not found.isfinite().all():
                raise RunError("the teacher's logits are not finite where the image is blurred")
            payload = replace(payload, visual_advantage=found.float().numpy())
        return payload.split([sample.positions for sample in samples])

    @torch.inference_mode()
    def run_only(self, samples: Sequence[EncodedSample]) -> None:
        """Run the teacher over samples to its final states, as a live teacher runs in training, and wait for it."""
        states_at_positions(self.model, collate(samples, self.pad_id)).sum().item()  # a device is waited for
