"""What a model asks of its mixer; the base of one's own (docs/extend.md).

`MultiScaleRetention` and `Attention` have contexts of their own. What is here serves a mixer that
needs no more than where each token stands in its document, and keeps one array a layer or nothing.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from retnet_jax.config import ModelConfig
from retnet_jax.errors import ConfigError
from retnet_jax.model.kv_cache import put_rows, take_rows
from retnet_jax.model.layers import Projections
from retnet_jax.ops.retention import positions
from retnet_jax.shapes import Array, Float, Int, RetentionMatrix


class ConvolvedState(NamedTuple):
    """The state of one layer with short convolutions or, with the dimension n, of all.

    It has the last `short_conv - 1` inputs of each convolution, oldest first, with their heads
    split: every array has its rows in front of three other dimensions.
    """

    matrix: Float[Array, "*n b h k v"]  # S
    q: Float[Array, "*n b last h k"]
    k: Float[Array, "*n b last g k"]  # g: `n_kv_heads`
    v: Float[Array, "*n b last g v"]


LayerState = RetentionMatrix | ConvolvedState


def map_matrix(function: Callable, state: Array | ConvolvedState) -> Array | ConvolvedState:
    """The state of a layer with a function applied to its S."""
    if isinstance(state, ConvolvedState):
        return state._replace(matrix=function(state.matrix))
    return function(state)


class RetentionState(NamedTuple):
    """The state of a RetNet: it has the same size after ten tokens as after a million."""

    # S of all layers [n b h k v], or a `ConvolvedState`; None: nothing was read; a tuple of the
    # layers' states, with S as `DecodingModel` stores it: of a model for decoding
    layers: Float[Array, "n b h k v"] | ConvolvedState | tuple[LayerState, ...] | None
    position: Int[Array, " b"]  # position of the next token in its document

    def take(self, rows: Int[Array, " r"]) -> "RetentionState":
        """The states of some rows; a row may occur several times."""
        return RetentionState(take_rows(self.layers, rows), self.position[rows])

    def put(self, rows: Int[Array, " r"], state: "RetentionState") -> "RetentionState":
        """This state with the rows `rows` replaced by those of another state."""
        layers = put_rows(self.layers, rows, state.layers)
        return RetentionState(layers, self.position.at[rows].set(state.position))

    def with_room(self, tokens: int) -> "RetentionState":
        """This state, whose size is fixed; a `KVCache` gets slots for `tokens` more tokens."""
        return self

    def with_capacity(self, tokens: int) -> "RetentionState":
        """This state, whose size is fixed; a `KVCache` gets at least `tokens` slots."""
        return self


class MixerContext(NamedTuple):
    """Where the tokens of a batch stand in their documents: what all layers share."""

    segment_ids: Int[Array, "b t"]  # 0 is padding; 1 everywhere: each row is one document
    place: Int[Array, "b t"]  # in its document, which may have begun before the batch
    position: Int[Array, " b"]  # of the token after the batch

    def state(self, layers) -> RetentionState:
        """The state after the batch, from that of each layer."""
        return RetentionState(layers, self.position)


class Mixer(Projections):
    """Maps the normed activations of a layer to what is added to them, along each row.

    A subclass has an `__init__` and a `__call__` as here. With `state_shape` it can also read a
    text in parts, which generation and stateful perplexity need.

    Args:
      config: of the model.
      rngs: source of the random parameters.
      value_scale: factor on the initial parameters of values, by `Block`; as of `Linear`.
      out_scale: of the output projection.
    """

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, value_scale: float, out_scale: float
    ):
        raise NotImplementedError(f"{type(self).__name__} has no __init__ that makes its layers")

    def __call__(
        self, x: Float[Array, "b t d"], state: Any, context: Any, form: str
    ) -> tuple[Float[Array, "b t d"], Any]:
        """Mixes the tokens of each document.

        Args:
          x: activations, in the model's dtype.
          state: of this layer before the tokens [b h k v], zeros where nothing was read; None for a
            mixer without a state.
          context: what `prepare` gives.
          form: "parallel", "chunkwise" or "recurrent", which all compute the same function.

        Returns:
          What is added to the residual stream, and the state after the tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} has no __call__")

    @classmethod
    def state_shape(cls, config: ModelConfig) -> tuple[int, int, int] | None:
        """The shape [h k v] of a row's state in one layer; None: it keeps none."""
        return None

    @classmethod
    def flops_per_token(cls, config: ModelConfig, sequence_length: int) -> float:
        """FLOPs of a token's forward pass in one layer, for MFU; those with parameters excluded."""
        return 0.0

    @classmethod
    def parameter_count(cls, config: ModelConfig) -> int:
        """The number of parameters of one layer's mixer."""
        make = lambda: cls(config, rngs=nnx.Rngs(0), value_scale=1.0, out_scale=1.0)  # noqa: E731
        return sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(make)))

    @classmethod
    def implementation(
        cls, config: ModelConfig, shape: tuple[int, int], one_document: bool = False
    ) -> str:
        """What a batch of tokens [b t] is trained with, in a sentence."""
        return f"the mixer is {config.mixer}"

    @classmethod
    def init_state(cls, config: ModelConfig, batch_size: int, capacity: int) -> RetentionState:
        """The state of a model that has read nothing.

        Raises:
          ConfigError: for a mixer without a state.
        """
        shape = cls.state_shape(config)
        if shape is None:
            raise ConfigError(
                f"model.mixer={config.mixer!r} keeps no state, so its model reads whole rows alone "
                "and cannot generate; a mixer with a `state_shape` can"
            )
        return RetentionState(
            layers=jnp.zeros((config.n_layers, batch_size, *shape), config.state_dtype),
            position=jnp.zeros(batch_size, jnp.int32),
        )

    @classmethod
    def prepare(
        cls,
        config: ModelConfig,
        state: Any,
        shape: tuple[int, int],
        segment_ids: Int[Array, "b t"] | None,
    ) -> tuple[MixerContext, Any]:
        """The context of a batch of tokens [b t], and the state of each layer before them.

        Raises:
          ConfigError: for a state that is given to a mixer without one.
        """
        if state is None and cls.state_shape(config) is None:
            state = RetentionState(layers=None, position=jnp.zeros(shape[0], jnp.int32))
        elif state is None or state.layers is None:
            state = cls.init_state(config, shape[0], capacity=0)
        if segment_ids is None:
            segment_ids = jnp.ones(shape, jnp.int32)
        place, after = positions(segment_ids, state.position)
        return MixerContext(segment_ids, place, after), state.layers
