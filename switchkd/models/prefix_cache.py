"""Caches the keys and values of a batch's shared prefix for the frozen teacher on the switch pathway."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class SharedPrefixCache:
    """Keys and values of the shared prefix of a batch's rows: system prompt and user role name, in the usual templates.

    In a causal language model they do not depend on later tokens, so no gradient flows through them. They are computed for one row,
    without a graph, and kept until a batch has another prefix. Results equal those of the whole forward pass.
    """

    def __init__(self) -> None:
        self.length = 0  # length of the last batch's shared prefix, which was not run again, tokens
        self._ids: Tensor | None = None
        self._layers: list[DynamicLayer] = []

    def before(self, language: nn.Module, embeds: Tensor, ids: Tensor, stop: Tensor) -> tuple[int, dict[str, Any]]:
        """Return (length of the shared prefix, arguments of `language` that replace it).

        Args:
            language: a frozen language model. With a sliding window, recurrent state or bidirectional attention, all tokens run.
            embeds: [B, L, d], of `ids` [B, L]. stop: [B, L] bool, tokens that must run.
        """
        alike = (ids == ids[:1]).all(0) & ~stop.any(0)
        self.length = int(alike.long().cumprod(0).sum()) if getattr(language.config, "is_causal", True) else 0
        if not self.length:
            return 0, {}
        # The argument was renamed in transformers 5.24
        names = inspect.signature(type(language).forward).parameters
        name = "cache" if "cache" in names else "past_key_values"
        if self._ids is None or not torch.equal(self._ids, ids[0, : self.length]):
            fresh = DynamicCache(config=language.config)
            with torch.no_grad():
                language(inputs_embeds=embeds[:1, : self.length].detach(), use_cache=True, **{name: fresh})
            self._ids = ids[0, : self.length].clone()
            plain = all(type(layer) is DynamicLayer for layer in fresh.layers)
            self._layers = [_SharedPrefixLayer(layer.keys, layer.values) for layer in fresh.layers] if plain else []
        if not self._layers:
            self.length = 0
            return 0, {}
        return self.length, {name: Cache(layers=self._layers)}


class _SharedPrefixLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one row, [1, heads, tokens, width]; new ones are not kept, so that a layer can be rerun."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return all keys and values of a batch: the shared prefix, then the new tokens."""
        keys, values = (
            torch.cat([old.expand(len(new), -1, -1, -1), new], dim=-2)
            for old, new in ((self.keys, key_states), (self.values, value_states))
        )
        return keys, values
