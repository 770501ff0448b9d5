"""Compiled programs of our models: a training step, and decoding.

`TrainingStep` and `Decoding` work on random tokens and states, and can be called again and again.
`compiled_decoding` is for a device that this machine may not have.
"""

import dataclasses
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from retnet_jax.aot.hlo import memory_of, peak_bytes
from retnet_jax.aot.traffic import memory_traffic
from retnet_jax.config import Config, MeshConfig, ModelConfig
from retnet_jax.data import Batch
from retnet_jax.generation.decode import Progress, decode, row_keys
from retnet_jax.model import LanguageModel, build_model, for_decoding
from retnet_jax.parallel.mesh import Device, make_mesh
from retnet_jax.training.step import state_of, train_step

_COMPILED_TOKENS = 16  # decoded in the loop of `compiled_decoding`
PRECISIONS = ("float32", "bfloat16", "int8")


def random_tokens(config: Config) -> np.ndarray:
    """Tokens of a training step of a config, [b t]."""
    shape = config.train.batch_size, config.data.sequence_length
    return np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)


class TrainingStep:
    """A training state, and the compiled step that replaces it.

    Args:
      config: Model, optimiser and batch.
      tokens: Tokens of every step, [b t]; each row is one document.
      model: Parameters to begin with; None: random ones.

    Attributes:
      compiled: The step's program.
    """

    def __init__(self, config: Config, tokens: np.ndarray, model: LanguageModel | None = None):
        batch = Batch(
            tokens=tokens,
            targets=np.roll(tokens, -1, axis=1),
            segment_ids=None,
            weights=np.ones(tokens.shape, np.float32),
            continues=np.zeros(len(tokens), bool),
        )
        model = random_model(config.model) if model is None else model
        self._state = jax.jit(partial(state_of, config))(model)
        self._batch = jax.device_put(batch)
        step = jax.jit(partial(train_step, config), donate_argnums=0)
        self.compiled = step.lower(self._state, self._batch).compile()

    @property
    def peak_bytes(self) -> int:
        """Memory of the step as the compiler reports it, with the training state."""
        return peak_bytes(memory_of(self.compiled))

    def __call__(self) -> jax.Array:
        """Takes a step; returns its loss."""
        self._state, metrics = self.compiled(self._state, self._batch)
        return jax.block_until_ready(metrics.loss)


def random_model(config: ModelConfig) -> LanguageModel:
    """A model with random parameters."""
    return jax.jit(lambda: build_model(config, rngs=nnx.Rngs(0)))()


def decoding_model(config: ModelConfig, precision: str, state_dtype: str | None = None):
    """A random model for decoding.

    Args:
      config: Its architecture.
      precision: Dtype of weights and activations, "float32" or "bfloat16"; or "int8" for the
        matrices, with activations in float32.
      state_dtype: As in `for_decoding`.
    """
    dtype = "float32" if precision == "int8" else precision
    model = random_model(dataclasses.replace(config, dtype=dtype, remat="none"))
    return for_decoding(model, "int8" if precision == "int8" else None, state_dtype)


class Decoding:
    """Decodes the next tokens of rows greedily, in one compiled loop.

    Args:
      model: A model for decoding.
      rows: Number of rows.
      capacity: Largest position that is reached, the size of a Transformer's cache.
      tokens: Number of tokens of each row in a call.

    Attributes:
      compiled: The program of a call.
      weight_bytes: As `weight_bytes(model)`.
      state_bytes: As `state_bytes(model, rows, capacity)`.
    """

    def __init__(self, model: LanguageModel, rows: int, capacity: int, tokens: int):
        self._model, self._rows, self._capacity = model, rows, capacity
        self._keys = row_keys(0, rows)
        empty = jax.eval_shape(lambda: random_progress(model, rows, capacity, 0))
        self.compiled = decode.lower(model, empty, self._keys, length=tokens).compile()
        self.weight_bytes = weight_bytes(model)
        self.state_bytes = bytes_of(empty.state.layers)

    @property
    def peak_bytes(self) -> int:
        """Memory of a call as the compiler reports it, with the model and the state."""
        return peak_bytes(memory_of(self.compiled))

    def start(self, position: int) -> "Decoding":
        """Sets all rows to a position, with random states; returns this object."""
        self._progress = None  # freed before the next is made
        self._progress = random_progress(self._model, self._rows, self._capacity, position)
        return self

    def __call__(self) -> jax.Array:
        """The next tokens [b n]."""
        new, self._progress = self.compiled(self._model, self._progress, self._keys)
        return jax.block_until_ready(new.tokens)


@partial(jax.jit, static_argnums=(1, 2))
def random_progress(model: LanguageModel, rows: int, capacity: int, position) -> Progress:
    """The progress of rows at `position`, with random states, the same for all rows."""
    state: Any = jax.eval_shape(lambda: model.init_state(rows, capacity))

    def same_for_all_rows(x):
        row = 0.1 * jax.random.normal(jax.random.key(1), x.shape[1:], x.dtype)
        return jnp.broadcast_to(row, x.shape)

    places = jnp.full(rows, position, jnp.int32)
    layers = jax.tree.map(same_for_all_rows, state.layers)
    state = state._replace(layers=layers, position=places)
    if getattr(state, "visible", None) is not None:  # a cache with a slot for each token
        seen = jnp.broadcast_to(jnp.arange(capacity) < position, (rows, capacity))
        state = state._replace(visible=seen, length=places)
    logits = jax.random.normal(jax.random.key(2), (rows, model.config.vocab_size))
    return Progress(logits.astype(model.config.accumulation_dtype), state, jnp.zeros(rows, bool))


class AbstractDecoding(NamedTuple):
    """Shapes and dtypes of the arguments of `decode`: nothing is allocated."""

    model: LanguageModel
    progress: Progress
    keys: jax.Array

    @property
    def weight_bytes(self) -> int:
        """As `weight_bytes(model)`."""
        return weight_bytes(self.model)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of all rows."""
        return bytes_of(self.progress.state.layers)


def abstract_decoding(
    device: Device,
    config: ModelConfig,
    rows: int,
    capacity: int = 1,
    weights: str | None = None,
    state_dtype: str | None = None,
) -> AbstractDecoding:
    """The arguments of decoding on a device, which need not exist.

    Args:
      device: Where it runs.
      config: Architecture of the model.
      rows: Number of rows.
      capacity: Slots of a Transformer's cache, all of which a token reads.
      weights: As in `for_decoding`.
      state_dtype: As in `for_decoding`.
    """
    config = dataclasses.replace(config, remat="none")

    def build():
        model = for_decoding(build_model(config, rngs=nnx.Rngs(0)), weights, state_dtype)
        progress = random_progress(model, rows, capacity, 0)
        return AbstractDecoding(model, progress, row_keys(0, rows))

    with jax.set_mesh(make_mesh(MeshConfig(), [device])):
        return jax.eval_shape(build)


class CompiledDecoding(NamedTuple):
    """What a compiler says of decoding."""

    moved_bytes: float  # read and written for a token of all rows
    peak_bytes: int  # memory of the program, with weights and states
    compile_seconds: float


def compiled_decoding(device: Device, arguments: AbstractDecoding) -> CompiledDecoding:
    """Compiles decoding for a device, such as those of `retnet_jax/aot/topologies.py`."""
    mesh = make_mesh(MeshConfig(), [device])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
    )
    begin = time.perf_counter()
    with jax.set_mesh(mesh):  # by which the model knows its platform
        program = decode.lower(*placed, length=_COMPILED_TOKENS).compile()
    seconds = time.perf_counter() - begin
    moved = sum(traffic.bytes for traffic in memory_traffic(program.as_text() or ""))
    return CompiledDecoding(moved / _COMPILED_TOKENS, peak_bytes(memory_of(program)), seconds)


def weight_bytes(model: LanguageModel) -> int:
    """Bytes of the parameters that a token reads: all but an embedding that is not also the head.

    Of an embedding that is stored beside the head, a token reads one row.
    """
    tied = model.config.tie_embeddings and not getattr(model, "int8_head", False)
    return bytes_of(model) - (0 if tied else bytes_of(model.embedding))


def state_bytes(model: LanguageModel, rows: int, capacity: int) -> int:
    """Bytes of the states of rows, with `capacity` slots in a Transformer's cache."""
    state: Any = jax.eval_shape(lambda: model.init_state(rows, capacity))
    return bytes_of(state.layers)


def bytes_of(tree: Any) -> int:
    """Bytes of the arrays of a tree, or of arrays with its shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
