"""One training step as a pure function, and the state it maps.

    state, metrics = train_step(config, state, batch)

`abstract_state` is the single source of what a state looks like on a mesh: initialisation, restore
and ahead-of-time compilation all start from it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from retnet_jax.config import Config
from retnet_jax.cross_entropy import cross_entropy_sum
from retnet_jax.data import Batch
from retnet_jax.model import LanguageModel, State, build_model
from retnet_jax.model.multi_scale_retention import RetentionState
from retnet_jax.optim import learning_rate_factor, make_optimizer
from retnet_jax.shapes import Array, Bool, Float, Int
from retnet_jax.sharding import with_shardings


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Int[Array, ""]  # steps taken
    model: LanguageModel
    optimizer: Any
    carry: State | None  # what each row goes on with: `config.train.carry_state`


class StepMetrics(NamedTuple):
    """Scalars of one step."""

    loss: Float[Array, ""]  # mean over the weights, nats per token
    gradient_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]


def initial_state(config: Config) -> TrainState:
    """A fresh state; a function of `config.train.seed`. To be jitted with shardings."""
    return state_of(config, build_model(config.model, rngs=nnx.Rngs(config.train.seed)))


def state_of(config: Config, model: LanguageModel) -> TrainState:
    """The state before the first step, with given parameters."""
    optimizer = make_optimizer(config.optimizer, config.train.steps).init(model)
    carry = None
    if config.train.carry_state:
        carry = model.init_state(config.train.batch_size, capacity=0)
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer, carry)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state, without any memory.

    Raises:
      ConfigError: for sizes that do not fit together or do not divide over the mesh.
    """
    return with_shardings(jax.eval_shape(partial(initial_state, config)), mesh)


def loss_sum(
    model: LanguageModel, batch: Batch, carry: State | None = None
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], State | None]]:
    """Weighted sum of the cross-entropy over a batch, in nats.

    Args:
      model: RetNet or Transformer.
      batch: windows.
      carry: the state of each row after its last window, for rows that go on; None: all begin anew.

    Returns:
      The sum, and the sum of the weights with the state after the batch, None without `carry`.
    """
    state = None if carry is None else _where_continued(batch.continues, carry)
    hidden, state = model.hidden(batch.tokens, state, segment_ids=batch.segment_ids)
    loss = cross_entropy_sum(hidden, model.head_matrix(), batch.targets, batch.weights)
    return loss, (batch.weights.sum(), None if carry is None else state)


def _where_continued(continues: Bool[Array, " b"], carry: RetentionState) -> RetentionState:
    """The state of rows that go on, the empty state for the others."""
    return RetentionState(
        layers=jnp.where(continues[None, :, None, None, None], carry.layers, 0.0),
        position=jnp.where(continues, carry.position, 0),
    )


def train_step(config: Config, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    """One update.

    Micro-batches add up sums of losses, of weights and of gradients, and the division comes last:
    a mean of their means would weigh tokens differently wherever their counts differ.
    """
    loss, weight, gradients, carry = gradient_sums(
        state.model, batch, config.train.micro_batches, state.carry
    )
    gradients = jax.tree.map(lambda g: g / weight, gradients)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.model)
    factor = learning_rate_factor(config.optimizer, config.train.steps)
    metrics = StepMetrics(
        loss=loss / weight,
        gradient_norm=optax.tree.norm(gradients),
        learning_rate=jnp.asarray(config.optimizer.learning_rate * factor(state.step)),
    )
    model = optax.apply_updates(state.model, updates)
    return TrainState(state.step + 1, model, optimizer_state, carry), metrics


def gradient_sums(
    model: LanguageModel, batch: Batch, micro_batches: int, carry: State | None = None
) -> tuple[Float[Array, ""], Float[Array, ""], LanguageModel, State | None]:
    """Sums over the batch: of the loss, of the weights, and the gradients of the first; the state.

    The batch is run in `micro_batches` parts, one after the other. No gradient flows into `carry`.
    """
    value_and_gradient = jax.value_and_grad(loss_sum, has_aux=True)
    if micro_batches == 1:
        (loss, (weight, carry)), gradients = value_and_gradient(model, batch, carry)
        return loss, weight, gradients, carry

    def add(sums, part):
        (loss, (weight, carry)), gradients = value_and_gradient(model, *part)
        return jax.tree.map(jnp.add, sums, (loss, weight, gradients)), carry

    def split(x, axis=0):
        # Every k-th row goes to the same part, so that each device keeps the rows it has.
        rows = jnp.moveaxis(x, axis, 0)
        parts = rows.reshape(-1, micro_batches, *rows.shape[1:]).swapaxes(0, 1)
        return jnp.moveaxis(parts, 1, axis + 1)

    def join(parts, axis=0):
        rows = jnp.moveaxis(parts, axis + 1, 1).swapaxes(0, 1)
        return jnp.moveaxis(rows.reshape(-1, *rows.shape[2:]), 0, axis)

    parts = jax.tree.map(split, batch)
    if carry is not None:
        carry = RetentionState(split(carry.layers, axis=1), split(carry.position))
    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), jnp.float32(0), model))
    (loss, weight, gradients), carry = jax.lax.scan(add, zeros, (parts, carry))
    if carry is not None:
        carry = RetentionState(join(carry.layers, axis=1), join(carry.position))
    return loss, weight, gradients, carry
