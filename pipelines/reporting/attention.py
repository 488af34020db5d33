"""Attention maps: attention from the answer's tokens to the image's tokens, as a map over the patches (paper, Fig. 3).

The paper shows such maps without defining how they are computed; this is the definition used here. A[l, h, q, j] is the attention
weight of the LLM's layer l and head h from row q to key j, a softmax over all keys visible to q, so Σ_j A[l, h, q, j] = 1. Q are
the rows that predict the answer's tokens, its end included (the label shift of positions.py), H the heads, S the chosen layers. For
the token of patch j

    mass_j = 1/(|S|·|H|·|Q|) · Σ_{l in S} Σ_{h in H} Σ_{q in Q} A[l, h, q, j]

Σ_j mass_j over the image is the *share*: the fraction of the answer's attention that goes to the image, 0 … 1. The *map* is
mass / share, so that every map sums to 1 and models can be compared; *overlap* of two maps p and q is Σ_j min(p_j, q_j).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from switchkd.data.encoded import collate, pad_id_of
from switchkd.data.encoding import SampleEncoder
from switchkd.data.samples import BadSample, Sample, Status
from switchkd.errors import ConfigError, RunError
from switchkd.models.checkpoint import open_checkpoint
from switchkd.models.families import family_of
from switchkd.models.features import media_for, media_of, text_arguments
from switchkd.models.vlm import load_model
from switchkd.pipelines.evaluation.generation import GreedyGenerator
from switchkd.pipelines.model_template import template_of_model
from switchkd.pipelines.reporting.token_grid import grid_of_image, patch_grid, seen_image
from switchkd.positions import predicting_rows
from switchkd.printable import printable


@dataclass(frozen=True)
class AttentionMap:
    """The attention of one model to one image."""

    answer: str
    share: float  # of the answer's attention that goes to the image, 0 … 1
    map: NDArray[
        np.float64
    ]  # [rows, columns] of patches, of the overview of an image in tiles; sums to 1; NaN where a patch has no token
    seen: NDArray[np.float64]  # [H, W, 3], 0 … 1: the image after the model's processor


class AttentionProbe:
    """A model whose attention is read.

    Args:
        model: checkpoint folder. template: of the prompt. layers: of the LLM, from 0, negative ones from the end; empty: all.

    Raises:
        CheckpointError, ConfigError: the model cannot be opened, has no such layer, or is a Llava whose image tokens form no
            grid.
    """

    def __init__(
        self,
        model: Path,
        template: str | None,
        layers: Sequence[int] = (),
        max_new_tokens: int = 32,
        device: str = "cpu",
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        self.checkpoint = open_checkpoint(model, trust_remote_code)
        if family_of(self.checkpoint.config).is_llava:
            patch_grid(self.checkpoint)  # a Llava whose tokens form no square is refused before its weights are read
        self._attending = attending_layers(self.checkpoint.config)
        self.layers = _chosen(model, self.checkpoint.config, layers, self._attending)
        self._template, self._max_new_tokens = template_of_model(self.checkpoint, template), max_new_tokens
        self._model = load_model(self.checkpoint, dtype=dtype).to(device)
        self._model.set_attn_implementation("eager")  # the only attention implementation that returns its weights

    def map_of(self, image: Path, question: str, answer: str | None = None) -> AttentionMap:
        """Run a question about an image, and compute the attention map of the answer.

        Args:
            answer: the answer whose attention is measured; None: the model's own, decoded greedily.

        Raises:
            BadSample: the image cannot be used.
            CheckpointError: the image's tokens form no grid.
        """
        if not image.is_file():
            raise BadSample(Status.IMAGE_MISSING, f"no image {printable(image)}")
        encoder = SampleEncoder(self.checkpoint, self._template, image.parent, max_length=1 << 20)
        if answer is None:
            answer = self._answer(encoder, image, question)
        encoded = encoder.encode(_sample(image, question, answer))
        batch = collate([encoded], pad_id_of(self.checkpoint.tokenizer))
        rows, media = predicting_rows(batch["labels"])[0], media_of(batch)
        on_image = batch["input_ids"][0] == self.checkpoint.image_token_id
        grid = grid_of_image(self.checkpoint, media, int(on_image.sum()))
        ids, mask, labels = (batch[name].to(self._model.device) for name in ("input_ids", "attention_mask", "labels"))
        given = media_for(self._model, media)
        with torch.inference_mode():
            attentions = self._model(
                **text_arguments(self._model, ids, mask, labels, given),
                **given,
                output_attentions=True,
                use_cache=False,
            ).attentions
        of_layer = dict(zip(self._attending, attentions, strict=True))
        chosen = torch.stack([of_layer[layer][0].float().cpu() for layer in self.layers])
        mass = answer_to_image(chosen, rows, on_image)[grid.extra :]
        share = float(mass.sum())
        if not share > 0:
            raise RunError(f"{self.checkpoint.path} pays the image no attention at all in layers {self.layers}")
        return AttentionMap(answer, share, grid.place(mass.numpy()), seen_image(self.checkpoint, media))

    def _answer(self, encoder: SampleEncoder, image: Path, question: str) -> str:
        answerer = GreedyGenerator(self._model, encoder, self._template, self._max_new_tokens)
        (found,) = answerer.answer([encoder.encode_prompt(_sample(image, question, ""), 0)])
        if isinstance(found, BadSample):
            raise found
        return found


def answer_to_image(attention: Tensor, rows: Tensor, on_image: Tensor) -> Tensor:
    """Return mass_j (module docstring), [n] float64.

    Args:
        attention: [layers, heads, L, L], rows sum to 1. rows: [L] bool, Q. on_image: [L] bool, the image's n tokens.
    """
    return attention.double()[:, :, rows][..., on_image].mean(dim=(0, 1, 2))


def overlap(one: NDArray[np.float64], other: NDArray[np.float64]) -> float | None:
    """Return Σ min(p, q) of two maps, 0 (disjoint) … 1 (equal); None if their grids differ."""
    return float(np.nansum(np.minimum(one, other))) if one.shape == other.shape else None


def attending_layers(config: Any) -> list[int]:
    """Return the layers of a model's LLM that have attention weights: all, but those of linear attention."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return [layer for layer, kind in enumerate(kinds) if kind != "linear_attention"]


def _chosen(model: Path, config: Any, layers: Sequence[int], attending: list[int]) -> list[int]:
    """Return the layers that are read, from 0. Raises ConfigError."""
    count = config.get_text_config().num_hidden_layers
    if bad := [layer for layer in layers if not -count <= layer < count]:
        raise ConfigError(f"{model} has layers 0 … {count - 1} (or -{count} … -1), asked for {bad[0]}")
    chosen = sorted({layer % count for layer in layers}) or attending
    if bad := [layer for layer in chosen if layer not in attending]:
        raise ConfigError(
            f"layer {bad[0]} of {model} has linear attention, which gives no weights: pass --layer with some of "
            f"{', '.join(map(str, attending))}, or leave it out"
        )
    return chosen


def _sample(image: Path, question: str, answer: str) -> Sample:
    return Sample(0, "question", image.name, [(question, answer)], "", Status.OK, "")
