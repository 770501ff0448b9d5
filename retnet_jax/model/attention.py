"""Causal softmax attention with rotary positions: the mixer of the Transformer twin.

It has the interface of multi-scale retention, so that one Block, one trainer and one generator
serve both. Its state is a cache of all keys and values so far, which grows with the text, unlike
retention's. Whole rows use flash attention where there is a kernel (`flash_attention.py`). The
attention here, with all scores at once, is the reference, and is used in all other cases.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer

from retnet_jax.config import ModelConfig
from retnet_jax.model.layers import Linear, split_heads
from retnet_jax.model.mixer import Mixer
from retnet_jax.ops import flash_attention
from retnet_jax.ops.retention import number_documents, positions
from retnet_jax.ops.rotation import Rotation, rotate, rotation
from retnet_jax.parallel.sharding import constrain
from retnet_jax.shapes import Activations, Array, Bool, Float, Int, SegmentIds


class KeysValues(NamedTuple):
    """Keys and values of s slots, for one layer or, with the dimension n, for all."""

    keys: Float[Array, "*n b s h k"]
    values: Float[Array, "*n b s h v"]


class KVCache(NamedTuple):
    """The state of a Transformer: keys and values of the tokens it has read, in s slots per row.

    A call on a cache with too few slots enlarges it to just enough. Inside `jax.jit`, where shapes
    cannot depend on values, the slots must exist before (`init_state` with the capacity); if they
    do not, all outputs are NaN.
    """

    layers: KeysValues | tuple[KeysValues, ...] | None  # a tuple: of a model for decoding
    visible: Bool[Array, "b s"]  # slots with tokens of the document that the row ended in
    length: Int[Array, " b"]  # slots in use, padding included; a call writes after the largest
    position: Int[Array, " b"]  # position of the next token in its document

    def take(self, rows: Int[Array, " r"]) -> "KVCache":
        """The caches of some rows; a row may occur several times."""
        layers = jax.tree.map(lambda x: x[..., rows, :, :, :], self.layers)
        return KVCache(layers, self.visible[rows], self.length[rows], self.position[rows])

    def put(self, rows: Int[Array, " r"], cache: "KVCache") -> "KVCache":
        """This cache with the rows `rows` replaced by those of a cache with equally many slots."""
        layers = jax.tree.map(
            lambda x, new: x.at[..., rows, :, :, :].set(new), self.layers, cache.layers
        )
        rest = zip(self[1:], cache[1:], strict=True)
        return KVCache(layers, *(x.at[rows].set(new) for x, new in rest))

    def with_room(self, tokens: int) -> "KVCache":
        """The same cache with slots for `tokens` more tokens."""
        if isinstance(self.length, Tracer):
            return self
        return self.with_capacity(int(self.length.max()) + tokens)

    def with_capacity(self, tokens: int) -> "KVCache":
        """The same cache with at least `tokens` slots."""
        missing = max(0, tokens - self.visible.shape[1])
        pad = [(0, 0), (0, missing), (0, 0), (0, 0)]
        return self._replace(
            layers=jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 4) + pad), self.layers),
            visible=jnp.pad(self.visible, pad[:2]),
        )


class AttentionContext(NamedTuple):
    """Arrays that all layers share, and the state after the batch without its layers."""

    turn: Rotation
    start: Int[Array, ""]  # slot of the first token
    attend: Callable  # (q, k, v) -> y, named "retention" for jax.checkpoint
    visible: Bool[Array, "b s"]  # these three as in `KVCache`, after the batch
    length: Int[Array, " b"]
    position: Int[Array, " b"]

    def state(self, layers) -> KVCache:
        """The state after the batch, from the keys and values of each layer."""
        return KVCache(layers, self.visible, self.length, self.position)


class Attention(Mixer):
    """Softmax attention with its projections."""

    inputs = ("q", "k", "v")  # the Linears that are applied to the input

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, value_scale: float, out_scale: float
    ):
        width, bias = config.d_model, config.mixer_bias
        self.q = Linear(width, config.q_width, rngs=rngs, bias=bias)
        self.k = Linear(width, config.q_width, rngs=rngs, bias=bias)
        self.v = Linear(width, config.v_width, rngs=rngs, scale=value_scale, bias=bias)
        self.out = Linear(config.v_width, width, rngs=rngs, scale=out_scale, bias=bias)
        self.config = config

    def __call__(
        self,
        x: Activations,
        state: KeysValues | None,
        context: AttentionContext,
        form: str,
    ) -> tuple[Activations, KeysValues]:
        """Attention has only one form: `form` may be the name of any and makes no difference."""
        config = self.config
        q, k, v = (split_heads(y, config.n_heads) for y in self.project(x))  # [b t h k] each
        q = rotate(q, context.turn, config.rotation, q.shape[-1] ** -0.5)
        k = rotate(k, context.turn, config.rotation)
        # Where positions are split, each device needs the keys and values of all positions.
        new = KeysValues(constrain(k, "bshk"), constrain(v, "bshv"))
        if state is not None:
            new = jax.tree.map(
                lambda old, x: jax.lax.dynamic_update_slice_in_dim(
                    old, x.astype(old.dtype), context.start, axis=1
                ),
                state,
                new,
            )
        y = constrain(context.attend(q, *new), "bthv")
        return self.out(y.reshape(*x.shape[:2], -1)), new

    @staticmethod
    def implementation(
        config: ModelConfig, shape: tuple[int, int], one_document: bool = False
    ) -> str:
        """The implementation that training uses for a batch of tokens [b t], as a sentence.

        To be called with the mesh set. `one_document`: the batch has no segment ids.
        """
        return flash_attention.explain_choice(_queries(config, shape), one_document)

    @staticmethod
    def init_state(config: ModelConfig, batch_size: int, capacity: int) -> KVCache:
        """An empty cache with `capacity` slots per row, in the activations' dtype."""
        shape = (config.n_layers, batch_size, capacity, config.n_heads)
        return KVCache(
            layers=KeysValues(
                jnp.zeros((*shape, config.q_width // config.n_heads), config.dtype),
                jnp.zeros((*shape, config.v_width // config.n_heads), config.dtype),
            ),
            visible=jnp.zeros((batch_size, capacity), bool),
            length=jnp.zeros(batch_size, jnp.int32),
            position=jnp.zeros(batch_size, jnp.int32),
        )

    @staticmethod
    def prepare(
        config: ModelConfig,
        state: KVCache | None,
        shape: tuple[int, int],
        segment_ids: SegmentIds | None,
    ) -> tuple[AttentionContext, Any]:
        """The context of a batch of tokens [b t], and the cache of each layer before them."""
        batch_size, length = shape
        fresh, one_document = state is None, segment_ids is None
        if state is None:
            state = Attention.init_state(config, batch_size, length)._replace(layers=None)
        state = state.with_room(length)
        if segment_ids is None:
            segment_ids = jnp.ones(shape, jnp.int32)
        place, after = positions(segment_ids, state.position)
        turn = rotation(
            place,
            config.q_width // config.n_heads,
            config.rotation,
            config.accumulation_dtype,
            longest=length if fresh else None,
        )
        start = state.length.max()
        # Without the NaN a write beyond the last slot would silently be moved to earlier slots.
        overflows = start + length > state.visible.shape[1]
        turn = turn._replace(cos=jnp.where(overflows, jnp.nan, turn.cos))
        # The document of each slot: 0 for the one that the row opens with, -1: not visible.
        real, _, index = number_documents(segment_ids)
        slot_document = jax.lax.dynamic_update_slice_in_dim(
            jnp.where(state.visible, jnp.int32(0), -1),
            jnp.where(real, index, -1),
            start,
            axis=1,
        )
        queries = _queries(config, shape)
        kernel = flash_attention.best(queries, one_document) if fresh else None
        if kernel is not None:
            attend = partial(
                flash_attention.flash_attention,
                document=None if one_document else slot_document,
                implementation=kernel,
            )
        else:
            mask = None if fresh and one_document else _mask(slot_document, index, start)
            attend = partial(attend_to_all, mask=mask)
        context = AttentionContext(
            turn,
            start,
            attend,
            visible=slot_document == index[:, -1:],
            length=jnp.full_like(state.length, start + length),
            position=after,
        )
        return context, state.layers


def _queries(config: ModelConfig, shape: tuple[int, int]) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a batch's queries."""
    width = config.q_width // config.n_heads
    return jax.ShapeDtypeStruct((*shape, config.n_heads, width), config.dtype)


def attend_to_all(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s h k"],
    v: Float[Array, "b s h k"],
    mask: Bool[Array, "b 1 t s"] | None,
) -> Float[Array, "b t h k"]:
    """Attention with all scores at once. `mask=None`: each token sees itself and all before it.

    Queries have been scaled by k^-1/2.
    """
    y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None, scale=1.0)
    return checkpoint_name(y, "retention")


def _mask(
    slot_document: Int[Array, "b s"], document: Int[Array, "b t"], start: Int[Array, ""]
) -> Bool[Array, "b 1 t s"]:
    """Whether each token, in slots from `start` on, sees a slot of its document up to its own."""
    places = start + jnp.arange(document.shape[1])
    slots = jnp.arange(slot_document.shape[1])
    seen = (slots[None] <= places[:, None])[None] & (
        slot_document[:, None, :] == document[:, :, None]
    )
    return seen[:, None]
