"""States of attention: keys and values of the tokens that were read, and where they are stored.

Keys and values are [h k s], with the slots last, which is how the products of a token's attention
read them. `KVCache` has a slot for each token; a windowed layer has one for each token of its
window (`WindowCache`): position p of a document is in slot p mod window, so the row's position says
what each slot holds.

The layers of a state are stacked [n b ...] in a trained model, and a tuple of [b ...] in a model
for decoding.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from retnet_jax.parallel.mesh import backend
from retnet_jax.shapes import Array, Bool, Float, Int


class KeysValues(NamedTuple):
    """Keys and values of s slots, for one layer or, with the dimension n, for several."""

    keys: Float[Array, "*n b h k s"]
    values: Float[Array, "*n b h k s"]


class WindowKeysValues(NamedTuple):
    """Keys and values of the last w tokens of a row's document, as `KeysValues`."""

    keys: Float[Array, "*n b h k w"]
    values: Float[Array, "*n b h k w"]


class ConvolvedCache(NamedTuple):
    """The cache of layers with short convolutions, and the last inputs of each convolution.

    The last inputs are those of `ConvolvedState`.
    """

    cache: KeysValues | WindowKeysValues
    q: Float[Array, "*n b last h k"]
    k: Float[Array, "*n b last g k"]
    v: Float[Array, "*n b last g k"]


LayerCache = KeysValues | WindowKeysValues | ConvolvedCache


def with_cache_dtype(state: Any, dtype: str) -> Any:
    """The state of a layer with keys and values of tokens in a dtype; all else is unchanged."""
    if isinstance(state, ConvolvedCache):
        return state._replace(cache=with_cache_dtype(state.cache, dtype))
    if isinstance(state, KeysValues | WindowKeysValues):
        return type(state)(*(x.astype(dtype) for x in state))
    return state


class NewKeysValues(NamedTuple):
    """Keys and values of the tokens of a call, which are written when all layers have run."""

    keys: Float[Array, "*n b t h k"]
    values: Float[Array, "*n b t h k"]
    # 0, or 1 for an output that is NaN; computed from the output of a layer that has read a cache
    after_reading: Int[Array, "*n"] | None
    last: tuple[Array, ...] = ()  # last inputs of the convolutions of q, k and v after the tokens


class KVCache(NamedTuple):
    """The state of a Transformer: keys and values of the tokens it has read, in s slots per row.

    A call on a cache with too few slots enlarges it to just enough. Inside `jax.jit`, where shapes
    cannot depend on values, the slots must exist before (`init_state` with the capacity); if they
    do not, all outputs are NaN.
    """

    layers: LayerCache | tuple[LayerCache, ...] | None  # a tuple: of a model for decoding
    visible: Bool[Array, "b s"]  # slots with tokens of the document that the row ended in
    length: Int[Array, " b"]  # slots in use, padding included; a call writes after the largest
    position: Int[Array, " b"]  # position of the next token in its document

    def take(self, rows: Int[Array, " r"]) -> "KVCache":
        """The caches of some rows; a row may occur several times."""
        return KVCache(take_rows(self.layers, rows), *(x[rows] for x in self[1:]))

    def put(self, rows: Int[Array, " r"], cache: "KVCache") -> "KVCache":
        """This cache with the rows `rows` replaced by those of a cache with equally many slots."""
        rest = zip(self[1:], cache[1:], strict=True)
        layers = put_rows(self.layers, rows, cache.layers)
        return KVCache(layers, *(x.at[rows].set(new) for x, new in rest))

    def with_room(self, tokens: int) -> "KVCache":
        """The same cache with slots for `tokens` more tokens."""
        if isinstance(self.length, Tracer):
            return self
        return self.with_capacity(int(self.length.max()) + tokens)

    def with_capacity(self, tokens: int) -> "KVCache":
        """The same cache with at least `tokens` slots."""
        missing = max(0, tokens - self.visible.shape[1])
        return self._replace(
            layers=with_slots(self.layers, missing),
            visible=jnp.pad(self.visible, ((0, 0), (0, missing))),
        )


class WindowCache(NamedTuple):
    """The state of a Transformer with a window. Its size is fixed, as that of a RetNet."""

    layers: LayerCache | tuple[LayerCache, ...] | None
    position: Int[Array, " b"]  # position of the next token in its document

    def take(self, rows: Int[Array, " r"]) -> "WindowCache":
        """The caches of some rows; a row may occur several times."""
        return WindowCache(take_rows(self.layers, rows), self.position[rows])

    def put(self, rows: Int[Array, " r"], cache: "WindowCache") -> "WindowCache":
        """This cache with the rows `rows` replaced by those of another cache."""
        layers = put_rows(self.layers, rows, cache.layers)
        return WindowCache(layers, self.position.at[rows].set(cache.position))

    def with_room(self, tokens: int) -> "WindowCache":
        """This cache, whose size is fixed."""
        return self

    def with_capacity(self, tokens: int) -> "WindowCache":
        """This cache, whose size is fixed."""
        return self


def is_stacked(layers: Any) -> bool:
    """Whether the layers of a state are stacked: a tuple has those of a model for decoding."""
    return type(layers) is not tuple


def short_conv_of(layers: Any) -> int | None:
    """The width of the convolutions whose last inputs a state's layers have; None: they have none.

    Args:
      layers: States of a model's layers, of any kinds.
    """
    each = jax.tree.leaves(layers, is_leaf=lambda x: hasattr(x, "q"))
    return next((x.q.shape[-3] + 1 for x in each if hasattr(x, "q")), None)


def take_rows(layers: Any, rows: Int[Array, " r"]) -> Any:
    """The states of some rows in all layers."""
    if is_stacked(layers):
        return jax.tree.map(lambda x: x[:, rows], layers)
    return jax.tree.map(lambda x: x[rows], layers)


def put_rows(layers: Any, rows: Int[Array, " r"], new: Any) -> Any:
    """The states of all layers with the rows `rows` replaced by `new`."""
    if is_stacked(layers):
        return jax.tree.map(lambda x, y: x.at[:, rows].set(y), layers, new)
    return jax.tree.map(lambda x, y: x.at[rows].set(y), layers, new)


def with_slots(layers: Any, missing: int) -> Any:
    """The states of layers with `missing` more slots in each `KeysValues`; others are unchanged."""

    def enlarged(x):
        if not isinstance(x, KeysValues):
            return x
        return jax.tree.map(lambda y: jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, missing)]), x)

    return jax.tree.map(enlarged, layers, is_leaf=lambda x: isinstance(x, KeysValues))


def write_slots(cache: KeysValues, new: NewKeysValues, start: Int[Array, ""]) -> KeysValues:
    """A cache with the new keys and values in the slots from `start` on."""
    start = _after(new, start, cache.keys.shape[-1])

    def put(old, x):  # [*n b h k s], [*n b t h k]
        x = jnp.moveaxis(x, -3, -1).astype(old.dtype)
        if old.dtype == jnp.bfloat16 and backend() == "cpu":
            # XLA would convert the whole cache to write a part of it.
            old, x = (jax.lax.bitcast_convert_type(y, jnp.uint16) for y in (old, x))
            return jax.lax.bitcast_convert_type(updated(old, x), jnp.bfloat16)
        return updated(old, x)

    def updated(old, x):
        return jax.lax.dynamic_update_slice_in_dim(old, x, start, axis=old.ndim - 1)

    return KeysValues(put(cache.keys, new.keys), put(cache.values, new.values))


def write_window(
    cache: WindowKeysValues, new: NewKeysValues, slots: Int[Array, "b t"]
) -> WindowKeysValues:
    """A cache with the new keys and values in the slots `slots`; slot w means: not stored."""
    slots = _after(new, slots, cache.keys.shape[-1])

    def put_row(old, x, slots):  # [h k w], [t h k], [t]
        return old.at[..., slots].set(jnp.moveaxis(x, 0, -1).astype(old.dtype), mode="drop")

    put = jax.vmap(put_row)
    if cache.keys.ndim == 5:
        put = jax.vmap(put, in_axes=(0, 0, None))
    return WindowKeysValues(put(cache.keys, new.keys, slots), put(cache.values, new.values, slots))


def _after(new: NewKeysValues, slots: Int[Array, "..."], most: int) -> Int[Array, "..."]:
    """`slots`, computed in a way that XLA must run after the layers have read the cache.

    Then XLA writes into the cache. Without this order it would copy the cache of every layer for
    each token. Slots are at most `most`, so the minimum changes nothing.
    """
    if new.after_reading is None:
        return slots
    return jnp.minimum(slots, most + new.after_reading.max())
