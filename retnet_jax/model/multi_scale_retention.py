"""Multi-scale retention: the mixer of a RetNet (arXiv 2307.08621, Eq. 8)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from retnet_jax.config import ModelConfig
from retnet_jax.model.layers import Linear, normalize, rotate, rotation, split_heads
from retnet_jax.retention import log_decay, positions, retention, row_normalizer
from retnet_jax.shapes import Array, Float, Int


class RetentionState(NamedTuple):
    """What a RetNet remembers: as many numbers after ten tokens as after a million."""

    layers: Float[Array, "n b h k v"] | None  # S of each layer, float32; None: nothing read yet
    position: Int[Array, " b"]  # of the next token in its document


class RetentionContext(NamedTuple):
    """What all layers share: functions of positions and documents alone."""

    cos: Float[Array, "b t i"]
    sin: Float[Array, "b t i"]
    row_scale: Float[Array, "b t h"]
    segment_ids: Int[Array, "b t"] | None


class MultiScaleRetention(nnx.Module):
    """Retention with its projections, normalisers and gate."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, out_scale: float):
        self.q = Linear(config.d_model, config.q_width, rngs=rngs)
        self.k = Linear(config.d_model, config.q_width, rngs=rngs)
        self.v = Linear(config.d_model, config.v_width, rngs=rngs)
        self.gate = Linear(config.d_model, config.v_width, rngs=rngs)
        self.out = Linear(config.v_width, config.d_model, rngs=rngs, scale=out_scale)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: Float[Array, "b h k v"] | None,
        context: RetentionContext,
        form: str,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b h k v"]]:
        config = self.config
        q, k, v = (split_heads(f(x), config.n_heads) for f in (self.q, self.k, self.v))
        q = rotate(q, context.cos, context.sin) * q.shape[-1] ** -0.5
        k = rotate(k, context.cos, context.sin)
        y, state = retention(
            q,
            k,
            v,
            log_decay(config.decay, config.n_heads, config.decay_range),
            state,
            context.segment_ids,
            form=form,
            chunk_size=config.chunk_size if form == "chunkwise" else None,
        )
        y = normalize(y * context.row_scale[..., None], config.norm, config.norm_epsilon)
        y = y.astype(x.dtype).reshape(*x.shape[:2], -1)
        return self.out(jax.nn.silu(self.gate(x)) * y), state

    @staticmethod
    def init_state(config: ModelConfig, batch_size: int, capacity: int) -> RetentionState:
        """The state of a model that has read nothing; it is of one size for any capacity."""
        heads = config.n_heads
        widths = (config.q_width // heads, config.v_width // heads)
        return RetentionState(
            layers=jnp.zeros((config.n_layers, batch_size, heads, *widths), jnp.float32),
            position=jnp.zeros(batch_size, jnp.int32),
        )

    @staticmethod
    def prepare(
        config: ModelConfig,
        state: RetentionState | None,
        shape: tuple[int, int],
        segment_ids: Int[Array, "b t"] | None,
    ) -> tuple[RetentionContext, RetentionState]:
        """The context of a batch of tokens [b t], and the state advanced but for its layers."""
        if state is None:
            state = RetentionState(layers=None, position=jnp.zeros(shape[0], jnp.int32))
        if segment_ids is None:
            place = state.position[:, None] + jnp.arange(shape[1], dtype=jnp.int32)
            after = state.position + shape[1]
        else:
            place, after = positions(segment_ids, state.position)
        cos, sin = rotation(place, config.q_width // config.n_heads)
        decay = log_decay(config.decay, config.n_heads, config.decay_range)
        context = RetentionContext(cos, sin, row_normalizer(decay, place), segment_ids)
        return context, state._replace(position=after)
