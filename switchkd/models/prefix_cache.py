"""Keys and values of the text that all rows of a batch begin with, computed once for the frozen teacher on the switch pathway."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer


class SharedPrefixCache:
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
            self._layers = [_SharedPrefixLayer(layer.keys, layer.values) for layer in fresh.layers] if plain else []
        if not self._layers:
            self.length = 0
            return 0, {}
        return self.length, {name: Cache(layers=self._layers)}


class _SharedPrefixLayer(DynamicLayer):  # type: ignore[misc]
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
