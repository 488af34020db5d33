"""Packed rows in any family: refused where samples of a row would mix, tested on rows that hold an image."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from switchkd.errors import ConfigError
from switchkd.models.block_attention import attention_ways, check_layers, enable_packing, tolerance_of
from switchkd.models.components import language_model_of
from switchkd.models.families import family_of
from switchkd.models.features import final_states, image_outputs, media_for, tensors_in
from switchkd.models.packing import layout, out_of_rows

BEFORE, AFTER = (3, 2), (4, 7)  # text tokens before and after the image of the two samples


def check_packing(config: Any, name: str) -> None:
    """Refuse a model that cannot keep the samples of a row apart, before any weights are loaded.

    Args:
        config: of the model. name: of the model, for the error.

    Raises:
        ConfigError: a family that does not pack, or layers that mix samples.
    """
    check_layers(config.get_text_config(), name)
    if not family_of(config).packs:
        raise ConfigError(
            f"--packing: a {config.model_type} ({name}) does not keep samples of one row apart, since its layers "
            "mix tokens by other rules than position ids (image tokens that see each other, linear attention); leave --packing out"
        )


def enable_packing_in(model: Any, name: str, media: Mapping[str, Tensor] | None = None, varlen: bool = False) -> None:
    """Prepare a model for packed rows, and test that it keeps the samples of a row separate.

    Two short samples with an image each are run alone, and in one row in either order. Of a Llava, only the language model is
    tested, see `block_attention.enable_packing`.

    Args:
        model: with weights; hollow or whole. name: of the model, for the error.
        media: of one image, as the checkpoint's processor makes it; a Llava needs none.
        varlen: see `block_attention.enable_packing`.

    Raises:
        ConfigError: the model mixes the samples of a row.
    """
    check_packing(model.config, name)
    language, family = language_model_of(model), family_of(model.config)
    if family.is_llava:
        enable_packing(language, name, varlen)
        return
    assert media is not None
    training = model.training
    model.eval()
    change = 0.0
    with torch.no_grad():
        probe = _Probe(model, media)
        for way in attention_ways(language.config, varlen, family.causal):
            language.set_attn_implementation(way)
            change = probe.influence()
            if change <= tolerance_of(model.dtype):
                break
        else:
            raise ConfigError(
                f"--packing: {name} ({family.model_type}) does not keep samples of one row apart: their states change by "
                f"{change:.1%}. All layers must heed position ids; leave --packing out"
            )
    model.train(training)


class _Probe:
    """Two samples with an image each, and their states alone."""

    def __init__(self, model: Any, media: Mapping[str, Tensor]) -> None:
        self.model, one = model, media_for(model, media)
        self.media = {name: torch.cat([value, value]) for name, value in one.items()}
        tokens = sum(value.numel() // value.shape[-1] for value in tensors_in(image_outputs(model, one).pooler_output))
        lengths = [head + tokens + tail for head, tail in zip(BEFORE, AFTER, strict=True)]
        shape = (2, max(lengths) + 1)
        ordinary = [row for row in range(256) if row not in _special(model.config)]
        generator = torch.Generator().manual_seed(0)
        ids = torch.tensor(ordinary)[torch.randint(len(ordinary), shape, generator=generator)]
        mask, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        for sample, length in enumerate(lengths):
            ids[sample, BEFORE[sample] : BEFORE[sample] + tokens] = model.config.image_token_id
            mask[sample, :length] = 1
            labels[sample, length - 2 : length] = ids[sample, length - 2 : length]
        self.lengths, self.text = lengths, [each.to(model.device) for each in (ids, mask, labels)]
        alone = [
            self._states([each[sample : sample + 1, :length] for each in self.text], one)[0]
            for sample, length in enumerate(lengths)
        ]
        self.alone = torch.cat(alone)  # [tokens of both, d]

    def _states(self, text: list[Tensor], media: Mapping[str, Tensor], packing: Tensor | None = None) -> Tensor:
        ids, mask, labels = text
        return final_states(self.model, ids, mask, labels, media, packing)

    def influence(self) -> float:
        """Return how much samples of a row influence each other: the largest change of a token's state, relative to its norm."""
        wanted, largest = self.text[1].bool(), 0.0
        for order in ([0, 1], [1, 0]):
            packing = layout([order], self.lengths, wanted.shape[1]).to(self.model.device)
            # The images are equal, so they are in the order of the rows in both.
            states = out_of_rows(self._states(self.text, self.media, packing), packing, wanted)
            change = (states.float() - self.alone.float()).norm(dim=-1) / self.alone.float().norm(dim=-1)
            largest = max(largest, float(change.nan_to_num(torch.inf).max()))
        return largest


def _special(config: Any) -> set[int]:
    """Return the ids that a config names."""
    return {value for name, value in vars(config).items() if "token" in name and isinstance(value, int)}
