"""A model for decoding, where the time of a token is that of reading memory.

    model = for_decoding(load_pretrained(directory, dtype="bfloat16"))
    model = for_decoding(model, weights="int8", state_dtype="bfloat16")

It computes the same function with the same Blocks and forms; only the storage differs. Weights are
in the activations' dtype or in int8, with the weights of one output next to each other. On
accelerators the keys of a state are next to each other too. Each layer has its own arrays, which
XLA can read and update in place: slices of stacked layers it would copy first, and products with
columns of weights it would write to memory and add later. On a GPU that would take three times the
bytes.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from retnet_jax.errors import ConfigError
from retnet_jax.model.hybrid import PeriodStates
from retnet_jax.model.kv_cache import with_cache_dtype
from retnet_jax.model.layers import Linear
from retnet_jax.model.lm import LanguageModel, State
from retnet_jax.model.mixer import map_matrix
from retnet_jax.model.multi_scale_retention import MultiScaleRetention
from retnet_jax.ops.dropout import LayerKeys
from retnet_jax.ops.embedding import look_up_stored
from retnet_jax.ops.rounding import round_at_random
from retnet_jax.ops.stored_product import stored_product
from retnet_jax.own_objects import is_own
from retnet_jax.parallel.mesh import backend
from retnet_jax.shapes import Array, Float, Int, RetentionMatrix

STATE_DTYPES = ("float32", "bfloat16")


def for_decoding(
    model: LanguageModel, weights: str | None = None, state_dtype: str | None = None
) -> "DecodingModel":
    """The same model, converted for decoding.

    Args:
      model: RetNet or Transformer; it is not changed. A model for decoding is returned as it is.
      weights: Storage of matrices. "int8": integers, with a float32 scale for each output; None:
        the activations' dtype.
      state_dtype: Dtype in which a RetNet's state is stored between calls, "float32" or "bfloat16"
        (rounded by `round_at_random`); the computation is in float32. None: the dtype in which it
        is computed.

    Raises:
      ConfigError: for other values, and for a state_dtype of a Transformer.
    """
    if isinstance(model, DecodingModel):
        if weights is not None or state_dtype is not None:
            raise ConfigError(
                f"weights={weights!r}, state_dtype={state_dtype!r}: the model is converted for "
                "decoding already; give for_decoding the model it was made from"
            )
        return model
    if weights not in (None, "int8"):
        raise ConfigError(f"weights={weights!r} is not 'int8' or None (the activations' dtype)")
    if state_dtype is not None:
        if state_dtype not in STATE_DTYPES:
            raise ConfigError(f"state_dtype={state_dtype!r} is not 'float32' or 'bfloat16'")
        hybrid = bool(model.config.attention_layers)
        if not hybrid and not issubclass(model.mixer_type, MultiScaleRetention):
            kept = "a Transformer's cache has the dtype of its activations, " + model.config.dtype
            if is_own(model.config.mixer):
                kept = f"model.mixer={model.config.mixer!r} keeps its own as it computes it"
            raise ConfigError(f"state_dtype={state_dtype!r} is for a RetNet; {kept}")
    return _converted(model, weights, state_dtype or model.config.state_dtype)


class Rows(nnx.Module):
    """x W^T, plus a bias if there is one: a Linear with the weights of each output in a row."""

    def __init__(self, weight: Float[Array, "o i"], bias: Array | None, dtype: str):
        if dtype == "int8":
            scale = jnp.maximum(jnp.abs(weight).max(1), jnp.finfo(jnp.float32).tiny) / 127
            weight = jnp.round(weight / scale[:, None])
            self.scale = nnx.Param(scale.astype(jnp.float32))
        self.weight = nnx.Param(weight.astype(dtype))
        if bias is not None:
            self.bias = nnx.Param(bias)
        self.has_scale, self.has_bias = dtype == "int8", bias is not None

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        y = self.wide(x).astype(x.dtype)
        return y + self.bias[...].astype(x.dtype) if self.has_bias else y

    def wide(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """The product without the bias, in float32."""
        y = stored_product(x, self.weight[...])
        return y * self.scale[...] if self.has_scale else y

    def matrix(self) -> Float[Array, "o i"]:
        """The weights in float32."""
        return self.weight[...].astype(jnp.float32) * self.scale[...][:, None]


class DecodingModel(LanguageModel):
    """A model from `for_decoding`: a language model that cannot be trained or saved.

    Its state has a tuple of the layers' states. On accelerators a RetNet's S are [b h v k]: the
    keys, over which a read-out sums, are next to each other in memory. On a CPU they are [b h k v]:
    otherwise XLA rearranges them before and after each call, and at 8 rows and 8 tokens a call the
    recurrence takes three times as long. There a cache of bfloat16 keys and values is stored in
    float32, the same numbers: XLA would convert all of it to write a token.

    Attributes:
      keys_last: Whether S are [b h v k].
      cache_dtype: Dtype in which keys and values are stored.
    """

    stacked_state = False

    def __init__(self, model: LanguageModel, weights: str | None, state_dtype: str):
        self.config = config = model.config
        self.mixer_type = model.mixer_type
        self.state_dtype = state_dtype
        self.keys_last = backend() != "cpu"
        self.cache_dtype = config.dtype if backend() != "cpu" else config.accumulation_dtype
        dtype = weights or config.dtype
        self.embedding = nnx.Param(model.embedding[...].astype(config.dtype))
        self.int8_head = weights == "int8"
        if self.int8_head:
            self.head = Rows(model.head_matrix(), None, dtype)
        elif not config.tie_embeddings:
            self.head = nnx.Param(model.head[...].astype(config.dtype))
        for name in ("embedding_norm", "final_norm"):
            if hasattr(model, name):
                setattr(self, name, jax.tree.map(lambda x: x, getattr(model, name)))
        self.layers = nnx.List(
            _with_rows(_layer_of(model, i), dtype) for i in range(config.n_layers)
        )

    def _run_layers(self, x, states, context, form: str, keys: LayerKeys):
        before = states or (None,) * self.config.n_layers
        after = []
        for number, (block, layer_state) in enumerate(zip(self.layers, before, strict=True)):
            if layer_state is not None and _retains(block):
                layer_state = map_matrix(self._computed, layer_state)
            of_layer = context.of(number) if self.config.attention_layers else context
            x, layer_state = block(x, layer_state, of_layer, form, keys.of(number))
            after.append(self._stored(layer_state, of_layer, number))
        return x, tuple(after)

    def _computed(self, matrix: Float[Array, "b h _ _"]) -> RetentionMatrix:
        """A stored S as layers compute it."""
        return self._turned(matrix.astype(self.config.accumulation_dtype))

    def _stored(self, layer_state, context, number: int):
        """A layer's state with S as it is stored; that of attention is unchanged."""

        def stored(matrix: RetentionMatrix) -> Float[Array, "b h _ _"]:
            matrix = self._turned(matrix)
            if self.state_dtype == "bfloat16":
                # A prime larger than any number of layers: layers and positions share no seeds.
                return round_at_random(matrix, context.position * 1009 + number)
            return matrix

        return map_matrix(stored, layer_state) if _retains(self.layers[number]) else layer_state

    def _turned(self, matrix: Float[Array, "b h _ _"]) -> Float[Array, "b h _ _"]:
        """S from [b h k v] to its stored order, or back."""
        return matrix.swapaxes(-1, -2) if self.keys_last else matrix

    def portable(self, state: State) -> State:
        """A state as on every device: S as [b h v k], keys and values in the activations' dtype."""
        return self._between_devices(state, self.config.dtype)

    def from_portable(self, state: State) -> State:
        """A state from `portable` as this model stores it."""
        return self._between_devices(state, self.cache_dtype)

    def _between_devices(self, state: State, cache_dtype: str) -> State:
        def changed(block, layer_state):
            if not _retains(block):
                return with_cache_dtype(layer_state, cache_dtype)
            if self.keys_last:
                return layer_state
            return map_matrix(lambda x: x.swapaxes(-1, -2), layer_state)

        if not state.layers:
            return state
        layers = zip(self.layers, state.layers, strict=True)
        return state._replace(layers=tuple(changed(*each) for each in layers))

    def _embedding_rows(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        return look_up_stored(self.embedding[...], tokens)

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t w"]:
        if self.int8_head:
            return self.head.wide(hidden)
        return stored_product(hidden, self.head_matrix())

    def head_matrix(self) -> Float[Array, "w d"]:
        return self.head.matrix() if self.int8_head else super().head_matrix()

    def init_state(self, batch_size: int, capacity: int) -> State:
        state = self.mixer_type.init_state(self.config, batch_size, capacity)
        layers = []
        for i, block in enumerate(self.layers):
            layer_state = _layer_state(state.layers, i)
            if _retains(block):
                stored = lambda x: self._turned(x).astype(self.state_dtype)  # noqa: E731
                layer_state = map_matrix(stored, layer_state)
            else:
                layer_state = with_cache_dtype(layer_state, self.cache_dtype)
            layers.append(layer_state)
        return state._replace(layers=tuple(layers))

    @property
    def sharding(self) -> jax.sharding.Sharding:
        return self.layers[0].mixer_norm.scale[...].sharding


@jax.jit(static_argnums=(1, 2))
def _converted(model: LanguageModel, weights: str | None, state_dtype: str) -> DecodingModel:
    return DecodingModel(model, weights, state_dtype)


def _layer(stacked, index: int):
    return jax.tree.map(lambda x: x[index], stacked)


def _layer_of(model: LanguageModel, number: int):
    """A Block with the parameters of one layer of a trained model."""
    if not model.config.attention_layers:
        return _layer(model.layers, number)
    period = model.config.layer_period
    return _layer(model.layers[number % period], number // period)


def _layer_state(layers, number: int):
    """The state of one layer, from those of a trained model."""
    if not isinstance(layers, PeriodStates):
        return _layer(layers, number)
    period = len(layers.places)
    return _layer(layers.places[number % period], number // period)


def _retains(block) -> bool:
    """Whether the mixer of a layer is retention."""
    return isinstance(block.mixer, MultiScaleRetention)


def _with_rows(block, dtype: str):
    """A Block with Rows in place of its Linears, those of one input joined."""

    def rows(linears: list[Linear]) -> Rows:
        weight = jnp.concatenate([linear.kernel[...].T for linear in linears])
        biases = [linear.bias[...] for linear in linears if linear.has_bias]
        return Rows(weight, jnp.concatenate(biases) if biases else None, dtype)

    for module in (block.mixer, block.ffn):
        module.replace_linears(rows)
    return block
