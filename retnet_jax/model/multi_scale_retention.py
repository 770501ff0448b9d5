"""Multi-scale retention: the mixer of a RetNet (arXiv 2307.08621, Eq. 8)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from retnet_jax.config import ModelConfig
from retnet_jax.model.layers import Linear, RMSNorm, split_heads
from retnet_jax.model.mixer import Mixer, RetentionState
from retnet_jax.ops.gated_norm import gated_norm
from retnet_jax.ops.retention import (
    SplitDocuments,
    explain_choice,
    log_decay,
    positions,
    retention,
    row_normalizer,
    score_clamp,
    split_documents,
)
from retnet_jax.ops.rotation import Rotation, rotate, rotation
from retnet_jax.shapes import (
    Activations,
    Array,
    Float,
    Int,
    LogDecay,
    RetentionMatrix,
    SegmentIds,
)


class RetentionContext(NamedTuple):
    """Arrays that all layers share: they depend only on positions and documents."""

    turn: Rotation
    log_decay: LogDecay
    row_scale: Float[Array, "b t h"] | None  # None: outputs are not scaled by position
    documents: SplitDocuments | None  # None: each row is one document
    position: Int[Array, " b"]  # position of the token after the batch

    def state(self, layers) -> RetentionState:
        """The state after the batch, from that of each layer."""
        return RetentionState(layers, self.position)


class MultiScaleRetention(Mixer):
    """Retention with its projections, normalisers and gate."""

    inputs = ("q", "k", "v", "gate")  # the Linears that are applied to the input

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, value_scale: float, out_scale: float
    ):
        width, bias = config.d_model, config.mixer_bias
        self.q = Linear(width, config.q_width, rngs=rngs, bias=bias)
        self.k = Linear(width, config.q_width, rngs=rngs, bias=bias)
        self.v = Linear(width, config.v_width, rngs=rngs, scale=value_scale, bias=bias)
        self.gate = Linear(width, config.v_width, rngs=rngs, bias=bias)
        self.out = Linear(config.v_width, width, rngs=rngs, scale=out_scale, bias=bias)
        if config.head_norm_scale:
            self.head_norm = RMSNorm(config.v_width // config.n_heads, config.norm_epsilon)
        self.config = config

    def __call__(
        self,
        x: Activations,
        state: RetentionMatrix | None,
        context: RetentionContext,
        form: str,
    ) -> tuple[Activations, RetentionMatrix]:
        config = self.config
        q, k, v, gate = self.project(x)
        q, k, v, gate = (split_heads(y, config.n_heads) for y in (q, k, v, gate))  # [b t h k or v]
        scale = q.shape[-1] ** -0.5
        q_scale, k_scale = (scale, 1.0) if config.rotation == "rope" else (1.0, scale)
        q = rotate(q, context.turn, config.rotation, q_scale)
        k = rotate(k, context.turn, config.rotation, k_scale)
        y, new_state = retention(
            q,
            k,
            v,
            context.log_decay,
            state,
            context.documents,
            form=form,
            chunk_size=config.chunk_size if form == "chunkwise" else None,
            finite_decay=True,
        )
        # The stored activation is [b t (h v)], as matrix products take it: a TPU would copy y to
        # store [b t h v].
        y = checkpoint_name(y.reshape(*x.shape[:2], -1), "retention").reshape(y.shape)
        if config.score_clamp is not None:
            y = y * self._score_scale(config.score_clamp, q, k, state, context, form)[..., None]
        kind = "rms" if config.head_norm_scale else config.norm
        y = gated_norm(y, gate, context.row_scale, kind, config.norm_epsilon)
        y = y.reshape(*x.shape[:2], -1)
        if config.head_norm_scale:
            scale = jnp.tile(self.head_norm.scale[...], config.n_heads)
            y = y * scale.astype(y.dtype)[None, None]
        return self.out(y), new_state

    def _score_scale(self, rule: str, q, k, state, context, form) -> Float[Array, "b t h"]:
        if form != "parallel" or state is not None:
            raise ValueError(
                f"score_clamp={rule!r} needs all scores of a document, which only form='parallel' "
                f"without a state computes, not form={form!r} "
                f"with{'out' if state is None else ''} a state; set score_clamp=None"
            )
        return score_clamp(
            q,
            k,
            context.log_decay,
            context.row_scale,
            None if context.documents is None else context.documents.documents,
            rule,
        )

    @staticmethod
    def implementation(
        config: ModelConfig, shape: tuple[int, int], one_document: bool = False
    ) -> str:
        """The implementation that training uses for a batch of tokens [b t], as a sentence.

        To be called with the mesh set. `one_document` makes no difference here.
        """
        heads = config.n_heads
        q, v = (
            jax.ShapeDtypeStruct((*shape, heads, width // heads), config.dtype)
            for width in (config.q_width, config.v_width)
        )
        return explain_choice(q, q, v, config.chunk_size)

    @staticmethod
    def init_state(config: ModelConfig, batch_size: int, capacity: int) -> RetentionState:
        """The state of a model that has read nothing; its size does not depend on `capacity`."""
        heads = config.n_heads
        widths = (config.q_width // heads, config.v_width // heads)
        return RetentionState(
            layers=jnp.zeros((config.n_layers, batch_size, heads, *widths), config.state_dtype),
            position=jnp.zeros(batch_size, jnp.int32),
        )

    @staticmethod
    def prepare(
        config: ModelConfig,
        state: RetentionState | None,
        shape: tuple[int, int],
        segment_ids: SegmentIds | None,
    ) -> tuple[RetentionContext, Any]:
        """The context of a batch of tokens [b t], and the state of each layer before them."""
        fresh = state is None
        if fresh:
            state = RetentionState(layers=None, position=jnp.zeros(shape[0], jnp.int32))
        if segment_ids is None:
            place = state.position[:, None] + jnp.arange(shape[1], dtype=jnp.int32)[None]
            after = state.position + shape[1]
        else:
            place, after = positions(segment_ids, state.position)
        decay = log_decay(
            config.decay, config.n_heads, config.decay_range, config.accumulation_dtype
        )
        context = RetentionContext(
            turn=rotation(
                place,
                config.q_width // config.n_heads,
                config.rotation,
                config.accumulation_dtype,
                longest=shape[1] if fresh else None,
            ),
            log_decay=decay,
            row_scale=row_normalizer(decay, place) if config.row_normalizer else None,
            documents=None if segment_ids is None else split_documents(segment_ids),
            position=after,
        )
        return context, state.layers
