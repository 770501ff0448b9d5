"""Hybrids: a RetNet with attention in some layers (`config.attention_layers`).

Kinds of layers repeat with a period of p layers, the smallest that fits (`config.layer_period`).
The parameters are a list of p Blocks, `layers/0` to `layers/<p-1>`: Block i is stacked [n/p ...]
and has the layers i, i + p, i + 2p, ... One scan runs over the n/p periods, so the program does not
grow with the depth. Kinds without a period have p = n: the layers are unrolled.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from retnet_jax.config import ModelConfig
from retnet_jax.model.attention import (
    Attention,
    AttentionContext,
    AttentionSettings,
    attention_context,
    explain_choice,
)
from retnet_jax.model.kv_cache import is_stacked, put_rows, take_rows, with_slots
from retnet_jax.model.mixer import RetentionState
from retnet_jax.model.multi_scale_retention import MultiScaleRetention, RetentionContext
from retnet_jax.model.places import Slots, find_places, find_slots
from retnet_jax.shapes import Array, Bool, Int, SegmentIds


class PeriodStates(NamedTuple):
    """The layers' states in a trained model: one for each place in a period, stacked [n/p ...]."""

    places: tuple[Any, ...]


class HybridState(NamedTuple):
    """The state of a hybrid: S of its retention layers, and caches of its attention layers.

    Its size is fixed if all attention layers have a window. Without one, a layer has a slot for
    each token, as in a `KVCache`.
    """

    layers: (
        PeriodStates | tuple[Any, ...] | None
    )  # a tuple with each layer: of a model for decoding
    # Of the layers without a window, as in `KVCache`; None: all have one.
    visible: Bool[Array, "b s"] | None
    length: Int[Array, " b"] | None
    position: Int[Array, " b"]  # position of the next token in its document

    def take(self, rows: Int[Array, " r"]) -> "HybridState":
        """The states of some rows; a row may occur several times."""
        rest = jax.tree.map(lambda x: x[rows], self[1:])
        return HybridState(take_rows(self.layers, rows), *rest)

    def put(self, rows: Int[Array, " r"], state: "HybridState") -> "HybridState":
        """This state with the rows `rows` replaced by those of one with equally many slots."""
        rest = jax.tree.map(lambda x, new: x.at[rows].set(new), self[1:], state[1:])
        return HybridState(put_rows(self.layers, rows, state.layers), *rest)

    def with_room(self, tokens: int) -> "HybridState":
        """The same state with slots for `tokens` more tokens."""
        if self.length is None or isinstance(self.length, Tracer):
            return self
        return self.with_capacity(int(self.length.max()) + tokens)

    def with_capacity(self, tokens: int) -> "HybridState":
        """The same state with at least `tokens` slots."""
        if self.visible is None:
            return self
        missing = max(0, tokens - self.visible.shape[1])
        return self._replace(
            layers=with_slots(self.layers, missing),
            visible=jnp.pad(self.visible, ((0, 0), (0, missing))),
        )


class HybridContext(NamedTuple):
    """The contexts of the kinds of layers."""

    kinds: tuple[int | None, ...]  # of the layers in a period, as in `config.layer_kinds`
    retention: RetentionContext
    attention: tuple[AttentionContext, ...]  # one for each entry of `config.attention_layers`
    slots: Slots | None
    before: Any  # the state of each layer before the batch; None: nothing was read
    position: Int[Array, " b"]  # position of the token after the batch

    def of(self, layer: int) -> RetentionContext | AttentionContext:
        """The context of a layer, or of a place in the period."""
        kind = self.kinds[layer % len(self.kinds)]
        return self.retention if kind is None else self.attention[kind]

    def state(self, layers) -> HybridState:
        """The state after the batch, from what each layer returns."""
        new = _each(layers)
        before = (None,) * len(new) if self.before is None else _each(self.before)
        after = []
        for i, (old, each) in enumerate(zip(before, new, strict=True)):
            context = self.of(i)
            attends = isinstance(context, AttentionContext)
            after.append(context.write(old, each) if attends else each)
        slots = self.slots
        return HybridState(
            PeriodStates(tuple(after)) if isinstance(layers, PeriodStates) else tuple(after),
            None if slots is None else slots.visible,
            None if slots is None else slots.length,
            self.position,
        )


def _each(layers: PeriodStates | tuple[Any, ...]) -> tuple[Any, ...]:
    return layers.places if isinstance(layers, PeriodStates) else layers


class HybridMixers:
    """Prepares the batches of a hybrid, and makes its states, as a `Mixer` does for its model."""

    @staticmethod
    def implementation(
        config: ModelConfig, shape: tuple[int, int], one_document: bool = False
    ) -> str:
        """The implementations that training uses for a batch of tokens [b t], as a sentence."""
        said = [MultiScaleRetention.implementation(config, shape, one_document)]
        for entry in config.attention_layers:
            settings = AttentionSettings.of_layers(config, entry)
            each = explain_choice(settings, config.dtype, shape, one_document)
            if each not in said:
                said.append(each)
        return "; ".join(said)

    @staticmethod
    def init_state(config: ModelConfig, batch_size: int, capacity: int) -> HybridState:
        """The state of a model that has read nothing; `capacity` as in `KVCache`."""
        repeats = config.n_layers // config.layer_period
        retention = MultiScaleRetention.init_state(
            dataclasses.replace(config, n_layers=repeats, attention_layers=()), batch_size, capacity
        )
        places = []
        for kind in config.layer_kinds[: config.layer_period]:
            if kind is None:
                places.append(retention.layers)
            else:
                settings = AttentionSettings.of_layers(config, config.attention_layers[kind])
                places.append(settings.init_layers(batch_size, capacity, config.dtype, repeats))
        unlimited = any(entry.window is None for entry in config.attention_layers)
        return HybridState(
            layers=PeriodStates(tuple(places)),
            visible=jnp.zeros((batch_size, capacity), bool) if unlimited else None,
            length=jnp.zeros(batch_size, jnp.int32) if unlimited else None,
            position=jnp.zeros(batch_size, jnp.int32),
        )

    @staticmethod
    def prepare(
        config: ModelConfig,
        state: HybridState | None,
        shape: tuple[int, int],
        segment_ids: SegmentIds | None,
    ) -> tuple[HybridContext, Any]:
        """The contexts of a batch of tokens [b t], and the state of each layer before them."""
        fresh = state is None
        if state is None:
            state = HybridMixers.init_state(config, *shape)._replace(layers=None)
        state = state.with_room(shape[1])
        kinds = config.layer_kinds[: config.layer_period]
        before = None
        if state.layers is not None:  # one layer's state is enough, to be checked
            each = zip(kinds, _each(state.layers), strict=False)
            first = tuple(layer for kind, layer in each if kind is None)[:1]
            before = RetentionState(layers=first or None, position=state.position)
        retention, _ = MultiScaleRetention.prepare(config, before, shape, segment_ids)
        places = find_places(state.position, shape, segment_ids, fresh)
        slots = None
        if state.visible is not None and state.length is not None:
            slots = find_slots(state.visible, state.length, places)
        separate = state.layers is not None and not is_stacked(state.layers)
        attention = tuple(
            attention_context(
                AttentionSettings.of_layers(config, entry),
                config,
                places,
                slots if entry.window is None else None,
                separate,
            )
            for entry in config.attention_layers
        )
        context = HybridContext(kinds, retention, attention, slots, state.layers, places.after)
        return context, state.layers


def layer_mixer(config: ModelConfig, layer: int):
    """The class, or function, that makes the mixer of a hybrid's layer."""
    kind = config.layer_kinds[layer]
    if kind is None:
        return MultiScaleRetention
    entry = config.attention_layers[kind]
    return lambda *args, **options: Attention(*args, **options, entry=entry)
