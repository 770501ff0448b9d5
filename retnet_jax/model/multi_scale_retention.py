"""Multi-scale retention: the mixer of a RetNet (arXiv 2307.08621, Eq. 8)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from retnet_jax.config import ModelConfig
from retnet_jax.model.layers import Linear, RMSNorm, ShortConvolution, convolve, split_heads
from retnet_jax.model.mixer import ConvolvedState, LayerState, Mixer, RetentionState
from retnet_jax.ops.feature_map import feature_map, prelu, xielu
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
from retnet_jax.ops.storage_hints import named_output
from retnet_jax.shapes import (
    Activations,
    Array,
    Float,
    Int,
    LogDecay,
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
    """Retention with its projections, normalisers and gate.

    The order is that of flash-linear-attention: projections, convolutions of q, k and v with SiLU
    (`short_conv`), feature map of q and k (`feature_map`), rotation, repetition of the keys and
    values that heads share (`n_kv_heads`), retention, norm, gate (unless `output_gate=False`).
    `qk_norm`, which flash-linear-attention does not have, stands between feature map and rotation:
    retention reads normed queries and keys whatever comes before.

    The norm of the heads divides by almost 0 where all outputs of a head are small. At the first
    token of a document they are one score times v, and a score can be 0. Gradients there grow up to
    epsilon^(-1/2) times: in a run of the quickstart one row had a gradient norm of 92 with the
    epsilon 1e-6, and 1.7 with 0.01. `head_norm_epsilon` of 0.01 is a guard that all forms have. The
    outputs of trained heads have variances of 1000 and more, which it leaves as they are.

    Without the norm of the heads (`head_norm=False`) the row normaliser stays: it depends only on
    the position. Outputs for independent inputs then have the same variance at every position, up
    to a factor of 2, but their scale is that of q, k and v, and gradients reach it.

    Sharing g key heads among h heads saves parameters and products of the projections, but no
    memory traffic in retention, whose kernels take h heads: the repeated keys and values, b t h k
    and b t h v numbers, are written once, and read as often as if they were not shared.
    """

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, value_scale: float, out_scale: float
    ):
        width, bias = config.d_model, config.mixer_bias
        self.q = Linear(width, config.q_width, rngs=rngs, bias=bias)
        self.k = Linear(width, config.k_channels, rngs=rngs, bias=bias)
        self.v = Linear(width, config.v_channels, rngs=rngs, scale=value_scale, bias=bias)
        if config.output_gate:
            self.gate = Linear(width, config.v_width, rngs=rngs, bias=bias)
        self.out = Linear(config.v_width, width, rngs=rngs, scale=out_scale, bias=bias)
        if config.head_norm_scale:
            self.head_norm = RMSNorm(config.v_width // config.n_heads, config.norm_epsilon)
        if config.short_conv is not None:
            self.q_conv = ShortConvolution(config.q_width, config.short_conv, rngs=rngs)
            self.k_conv = ShortConvolution(config.k_channels, config.short_conv, rngs=rngs)
            self.v_conv = ShortConvolution(config.v_channels, config.short_conv, rngs=rngs)
        if config.feature_map is not None:
            self.feature_map = FeatureMap(config.feature_map)
        if config.qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(config.q_width // config.n_heads, config.norm_epsilon) for _ in range(2)
            )
        self.config = config

    @property
    def inputs(self) -> tuple[str, ...]:
        """The Linears that are applied to the input."""
        return ("q", "k", "v", "gate") if self.config.output_gate else ("q", "k", "v")

    def __call__(
        self,
        x: Activations,
        state: LayerState | None,
        context: RetentionContext,
        form: str,
    ) -> tuple[Activations, LayerState]:
        config = self.config
        q, k, v, *gates = self.project(x)
        q, k, v, last = self._convolve(q, k, v, state, context)
        matrix = state.matrix if isinstance(state, ConvolvedState) else state
        q = split_heads(q, config.n_heads)  # [b t h k]
        k, v = (split_heads(y, config.kv_heads) for y in (k, v))  # [b t h k or v]
        gate = split_heads(gates[0], config.n_heads) if gates else None
        if config.feature_map is not None:
            q, k = self.feature_map(q), self.feature_map(k)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        scale = q.shape[-1] ** -0.5
        q_scale, k_scale = (1.0, scale) if config.rotation == "torchscale" else (scale, 1.0)
        q = rotate(q, context.turn, config.rotation, q_scale)
        k = rotate(k, context.turn, config.rotation, k_scale)
        if config.kv_heads < config.n_heads:
            k, v = (jnp.repeat(y, config.n_heads // config.kv_heads, axis=2) for y in (k, v))
        y, matrix = retention(
            q,
            k,
            v,
            context.log_decay,
            matrix,
            context.documents,
            form=form,
            chunk_size=config.chunk_size if form == "chunkwise" else None,
            finite_decay=True,
        )
        # The stored activation is [b t (h v)], as matrix products take it: a TPU would copy y to
        # store [b t h v].
        y = named_output(y.reshape(*x.shape[:2], -1)).reshape(y.shape)
        if config.score_clamp is not None:
            y = y * self._score_scale(config.score_clamp, q, k, state, context, form)[..., None]
        kind = "rms" if config.head_norm_scale else config.norm
        kind = kind if config.head_norm else None
        y = gated_norm(y, gate, context.row_scale, kind, config.epsilon_of_heads)
        y = y.reshape(*x.shape[:2], -1)
        if config.head_norm_scale:
            scale = jnp.tile(self.head_norm.scale[...], config.n_heads)
            y = y * scale.astype(y.dtype)[None, None]
        return self.out(y), ConvolvedState(matrix, *last) if last else matrix

    def _convolve(
        self, q, k, v, state: LayerState | None, context: RetentionContext
    ) -> tuple[Array, Array, Array, tuple[Array, ...]]:
        """The convolutions of q, k and v [b t (h k)], and the new last inputs [b last h k] of each.

        Without convolutions: q, k and v themselves, and no last inputs.
        """
        if self.config.short_conv is None:
            return q, k, v, ()
        before = state[1:] if isinstance(state, ConvolvedState) else (None, None, None)
        heads = (self.config.n_heads, self.config.kv_heads, self.config.kv_heads)
        convolutions = (self.q_conv, self.k_conv, self.v_conv)
        (q, k, v), last = convolve(convolutions, (q, k, v), before, context.documents, heads)
        return q, k, v, last

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
        k, v = config.q_width // heads, config.v_width // heads
        layers = jnp.zeros((config.n_layers, batch_size, heads, k, v), config.state_dtype)
        if config.short_conv is not None:
            shape = (config.n_layers, batch_size, config.short_conv - 1)
            of_each = ((heads, k), (config.kv_heads, k), (config.kv_heads, v))
            last = (
                jnp.zeros((*shape, *heads_and_width), config.dtype) for heads_and_width in of_each
            )
            layers = ConvolvedState(layers, *last)
        return RetentionState(layers, position=jnp.zeros(batch_size, jnp.int32))

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


class FeatureMap(nnx.Module):
    """The elementwise function with a name of `FEATURE_MAPS`, with its parameters if it has any.

    Initial parameters are those of PyTorch and transformers.
    """

    def __init__(self, name: str):
        if name == "prelu":
            self.weight = nnx.Param(jnp.full(1, 0.25, jnp.float32))
        elif name == "xielu":
            self.alpha_p = nnx.Param(jnp.log(jnp.expm1(jnp.full(1, 0.8, jnp.float32))))
            self.alpha_n = nnx.Param(jnp.log(jnp.expm1(jnp.full(1, 0.3, jnp.float32))))
        self.name = name

    def __call__(self, x: Float[Array, "b t h k"]) -> Float[Array, "b t h k"]:
        if self.name == "prelu":
            return prelu(x, self.weight[...])
        if self.name == "xielu":
            return xielu(x, self.alpha_p[...], self.alpha_n[...])
        return feature_map(self.name)(x)
