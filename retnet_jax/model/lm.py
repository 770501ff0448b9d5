"""RetNet and Transformer: one language model, two mixers.

    model = RetNet(config, rngs=nnx.Rngs(0))
    logits, state = model(tokens)                # i32[b t] -> f32[b t w]
    logits, state = model(next_tokens, state)    # goes on where it stopped

Modules are plain pytrees: `jax.jit`, `jax.grad` and `jax.eval_shape` take them as they are. The
layers are one Block with stacked parameters [n ...], run by `jax.lax.scan`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from retnet_jax.config import ModelConfig
from retnet_jax.model.attention import Attention, KVCache
from retnet_jax.model.layers import NORMS, FeedForward
from retnet_jax.model.multi_scale_retention import MultiScaleRetention, RetentionState
from retnet_jax.shapes import Array, Float, Int

State = RetentionState | KVCache


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)) (arXiv 2307.08621, Eq. 9)."""

    def __init__(self, mixer: type, config: ModelConfig, *, rngs: nnx.Rngs):
        # Each layer adds twice to the residual stream, which should not grow with the depth.
        out_scale = (2 * config.n_layers) ** -0.5
        norm = NORMS[config.norm]
        self.mixer_norm = norm(config.d_model, config.norm_epsilon)
        self.mixer = mixer(config, rngs=rngs, out_scale=out_scale)
        self.ffn_norm = norm(config.d_model, config.norm_epsilon)
        self.ffn = FeedForward(
            config.ffn, config.d_model, config.ffn_width, rngs=rngs, out_scale=out_scale
        )

    def __call__(self, x: Float[Array, "b t d"], state, context, form: str):
        y, state = self.mixer(self.mixer_norm(x), state, context, form)
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), state


class LanguageModel(nnx.Module):
    """What RetNet and Transformer have in common: all but the mixer."""

    mixer: ClassVar[str]
    mixer_type: ClassVar[type]

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Draws the parameters.

        Args:
          config: the shape; `config.mixer` is set to this class's.
          rngs: source of the random parameters, such as `nnx.Rngs(0)`.

        Raises:
          ConfigError: for sizes that do not fit together.
        """
        config = dataclasses.replace(config, mixer=self.mixer)
        config.check()
        self.config = config
        table = (config.vocab_size, config.d_model)
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), table))
        keys = jax.random.split(rngs.params(), config.n_layers)
        self.layers = jax.vmap(
            lambda key: Block(self.mixer_type, config, rngs=nnx.Rngs(params=key))
        )(keys)
        self.final_norm = NORMS[config.norm](config.d_model, config.norm_epsilon)
        if not config.tie_embeddings:
            self.head = nnx.Param(0.02 * jax.random.normal(rngs.params(), table))

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        state: State | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        form: str = "chunkwise",
    ) -> tuple[Float[Array, "b t w"], State]:
        """Logits of the token after each position, and the state after the last.

        Args:
          tokens: token ids.
          state: what an earlier call returned, or `init_state`; None: nothing was read before.
          segment_ids: documents and padding as in `retention`; None: each row is one document.
          form: of retention: "parallel", "chunkwise" or "recurrent".
        """
        hidden, state = self.hidden(tokens, state, segment_ids, form)
        return self.logits(hidden), state

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        state: State | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        form: str = "chunkwise",
    ) -> tuple[Float[Array, "b t d"], State]:
        """As a call, but without the output head: the normed activations it is applied to."""
        config = self.config
        context, state = self.mixer_type.prepare(config, state, tokens.shape, segment_ids)
        x = self.embedding[...][tokens].astype(config.dtype)

        def layer(x, layer_and_state):
            block, layer_state = layer_and_state
            return block(x, layer_state, context, form)

        if config.remat:
            layer = jax.checkpoint(layer, prevent_cse=False)
        # A loop zeroes and fills a stack for each thing the backward pass needs; a few layers are
        # faster written out (a 4-layer step on 2 cores: 201 ms for 227).
        unroll = config.n_layers if config.n_layers <= 4 else 1
        x, layer_states = jax.lax.scan(layer, x, (self.layers, state.layers), unroll=unroll)
        return self.final_norm(x), state._replace(layers=layer_states)

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t w"]:
        """The output head: float32 logits of the normed activations."""
        return jnp.einsum(
            "btd,wd->btw",
            hidden,
            self.head_matrix().astype(hidden.dtype),
            preferred_element_type=jnp.promote_types(jnp.float32, hidden.dtype),
        )

    def head_matrix(self) -> Float[Array, "w d"]:
        """The output head's matrix, which is the embedding's where they are tied."""
        return self.embedding[...] if self.config.tie_embeddings else self.head[...]

    def init_state(self, batch_size: int, capacity: int) -> State:
        """The state before the first token.

        Args:
          batch_size: rows.
          capacity: tokens that a row will read in all. A Transformer's cache has that many slots;
            a RetNet's state is of one size.
        """
        return self.mixer_type.init_state(self.config, batch_size, capacity)


class RetNet(LanguageModel):
    """The language model with multi-scale retention."""

    mixer = "retention"
    mixer_type = MultiScaleRetention


class Transformer(LanguageModel):
    """The same language model with softmax attention."""

    mixer = "attention"
    mixer_type = Attention


def build_model(config: ModelConfig, *, rngs: nnx.Rngs) -> LanguageModel:
    """The model that `config.mixer` names."""
    config.check()
    return {"retention": RetNet, "attention": Transformer}[config.mixer](config, rngs=rngs)
