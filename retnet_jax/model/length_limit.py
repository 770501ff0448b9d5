"""Models for texts up to a length, whose states keep their size.

A Transformer without a window has a cache that grows, and all rows of a batch write to the same
slots. Texts of at most n tokens need neither: attention to all tokens before is then attention in a
window of n tokens, whose cache has one size, and whose rows each have a position of their own
(`WindowCache`). So rows can come and go in one compiled program.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from retnet_jax.config import ModelConfig
from retnet_jax.model.hybrid import HybridState
from retnet_jax.model.kv_cache import KeysValues, KVCache, WindowCache, WindowKeysValues, is_stacked
from retnet_jax.model.lm import LanguageModel, State
from retnet_jax.shapes import Array, Bool, Int


def grows(config: ModelConfig) -> bool:
    """Whether the states of a model grow with the text: those of attention without a window."""
    if config.mixer == "attention":
        return config.window is None
    return any(entry.window is None for entry in config.attention_layers)


def with_length_limit(model: LanguageModel, tokens: int) -> LanguageModel:
    """The same model for texts of at most `tokens` tokens, with states of a fixed size.

    Beyond that length attention forgets the first tokens. A model whose states do not grow is
    returned as it is.
    """
    config = model.config
    if not grows(config):
        return model
    if config.mixer == "attention":
        limited = dataclasses.replace(config, window=tokens)
    else:
        entries = (
            dataclasses.replace(entry, window=tokens) if entry.window is None else entry
            for entry in config.attention_layers
        )
        limited = dataclasses.replace(config, attention_layers=tuple(entries))
    copy = jax.tree.map(lambda x: x, model)
    copy.config = limited
    return copy


def limited_state(state: State, tokens: int) -> Any:
    """A state after at most `tokens` tokens as a state of `with_length_limit(model, tokens)`.

    States that do not grow are returned as they are.
    """
    if isinstance(state, KVCache):
        layers = _limited_layers(state.layers, state.visible, state.position, tokens)
        return WindowCache(layers, state.position)
    if isinstance(state, HybridState) and state.visible is not None:
        layers = _limited_layers(state.layers, state.visible, state.position, tokens)
        return HybridState(layers, None, None, state.position)
    return state


def _limited_layers(
    layers: Any, visible: Bool[Array, "b s"], position: Int[Array, " b"], tokens: int
) -> Any:
    """The caches of layers with the visible slots moved to the slots of their tokens' positions."""
    assert not is_stacked(layers), "only states of models for decoding are converted"
    # The visible slots have the row's document up to `position`, in order.
    place = position[:, None] - visible.sum(1, keepdims=True) + jnp.cumsum(visible, axis=1) - 1
    slots = jnp.where(visible, place, tokens)  # beyond the last: not stored

    def moved(cache):
        if not isinstance(cache, KeysValues):
            return cache

        def put_row(x, slots):  # [h k s], [s]
            empty = jnp.zeros((*x.shape[:2], tokens), x.dtype)
            return empty.at[..., slots].set(x, mode="drop")

        return WindowKeysValues(*(jax.vmap(put_row)(x, slots) for x in cache))

    return jax.tree.map(moved, layers, is_leaf=lambda x: isinstance(x, KeysValues))
