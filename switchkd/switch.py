"""The visual-switch pathway (paper, section 3.1, eq. 5): the student's eyes, the teacher's brain."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from switchkd.packing import into_rows, out_of_rows, positions_in_rows


def switch_states(
    teacher: LlavaForConditionalGeneration,
    features: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    rows: Tensor,
    packing: Tensor | None = None,
    known: "KnownText | None" = None,
) -> Tensor:
    """Return the final hidden states behind z_switch = L_T(P_T(V_S(x)), text) at the rows asked for.

    The teacher is frozen, its activations are not: the gradient flows through L_T and P_T into `features` and on into the
    student's vision tower.

    Args:
        teacher: the frozen teacher; its vision tower is not used and need not exist.
        features: V_S(x), [B, n, d_v], with graph.
        input_ids: [B, L], as many image tokens a sample as the projector makes of its features. attention_mask: [B, L].
        rows: [B, L] bool, the rows that predict supervised tokens (`positions.predicting_rows`).
        packing: how the samples share rows, see `packing.layout`; None gives each its own.
        known: what is kept of the text before the image; None, and packed rows, run all text in every batch, with gradient.

    Returns:
        [P, d], in row-major order of `rows`; the teacher's LM head turns them into z_switch.

    Raises:
        ValueError: the number of image tokens is not that of the projected features.
    """
    embeds = teacher.get_input_embeddings()(input_ids)
    is_image = input_ids == teacher.config.image_token_id
    image_embeds = teacher.model.multi_modal_projector(features.to(embeds.dtype))  # P_T(V_S(x)), [B, tokens, d]
    if int(is_image.sum()) != image_embeds.shape[0] * image_embeds.shape[1]:
        raise ValueError(f"{int(is_image.sum())} image tokens for projected features of {tuple(image_embeds.shape)}")
    # Autocast leaves embeddings in float32 and projects in bfloat16.
    embeds = embeds.masked_scatter(is_image.unsqueeze(-1), image_embeds.to(embeds.dtype))
    language = teacher.model.language_model
    if packing is not None:
        states = language(
            inputs_embeds=into_rows(embeds, packing),
            position_ids=positions_in_rows(attention_mask, packing),
            use_cache=False,
        ).last_hidden_state
        return out_of_rows(states, packing, rows)
    start, cache = (
        (0, {}) if known is None else known.before(language, embeds, input_ids, is_image | rows | (attention_mask == 0))
    )
    states = language(inputs_embeds=embeds[:, start:], attention_mask=attention_mask, use_cache=False, **cache)
    found: Tensor = states.last_hidden_state[rows[:, start:]]
    return found


class KnownText:
    """Keys and values of the text with which every row of a batch begins: system prompt and user's name, in the usual templates.

    In a causal language model they depend on nothing that follows, so no gradient goes through them. They are computed for one row,
    without a graph, and kept until a batch begins otherwise. Results are those of the whole forward pass.
    """

    def __init__(self) -> None:
        self.length = 0  # tokens of each row that the last batch did not run
        self._ids: Tensor | None = None
        self._layers: list[DynamicLayer] = []

    def before(self, language: nn.Module, embeds: Tensor, ids: Tensor, stop: Tensor) -> tuple[int, dict[str, Any]]:
        """Return (number of leading tokens that need not run, arguments of `language` that stand for them).

        Args:
            language: a frozen language model. One with a sliding window, a state or attention to both sides runs everything.
            embeds: [B, L, d], of `ids` [B, L]. stop: [B, L] bool, tokens that must run.
        """
        alike = (ids == ids[:1]).all(0) & ~stop.any(0)
        self.length = int(alike.long().cumprod(0).sum()) if getattr(language.config, "is_causal", True) else 0
        if not self.length:
            return 0, {}
        # The argument's name before and after transformers 5.24
        names = inspect.signature(type(language).forward).parameters
        name = "cache" if "cache" in names else "past_key_values"
        if self._ids is None or not torch.equal(self._ids, ids[0, : self.length]):
            fresh = DynamicCache(config=language.config)
            with torch.no_grad():
                language(inputs_embeds=embeds[:1, : self.length].detach(), use_cache=True, **{name: fresh})
            self._ids = ids[0, : self.length].clone()
            plain = all(type(layer) is DynamicLayer for layer in fresh.layers)
            self._layers = [_KnownLayer(layer.keys, layer.values) for layer in fresh.layers] if plain else []
        if not self._layers:
            self.length = 0
            return 0, {}
        return self.length, {name: Cache(layers=self._layers)}


class _KnownLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one row, [1, heads, tokens, width]; new ones are not kept, so that a layer can be run again."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return all keys and values of a batch: the known ones before the new ones."""
        keys, values = (
            torch.cat([old.expand(len(new), -1, -1, -1), new], dim=-2)
            for old, new in ((self.keys, key_states), (self.values, value_states))
        )
        return keys, values
