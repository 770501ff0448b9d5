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
from retnet_jax.model import LanguageModel, build_model
from retnet_jax.optim import learning_rate_factor, make_optimizer
from retnet_jax.shapes import Array, Float, Int
from retnet_jax.sharding import with_shardings


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Int[Array, ""]  # steps taken
    model: LanguageModel
    optimizer: Any


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
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state, without any memory.

    Raises:
      ConfigError: for sizes that do not fit together or do not divide over the mesh.
    """
    return with_shardings(jax.eval_shape(partial(initial_state, config)), mesh)


def loss_sum(model: LanguageModel, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum of the cross-entropy over a batch, in nats, and the sum of the weights."""
    hidden, _ = model.hidden(batch.tokens, segment_ids=batch.segment_ids)
    loss = cross_entropy_sum(hidden, model.head_matrix(), batch.targets, batch.weights)
    return loss, batch.weights.sum()


def train_step(config: Config, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    """One update.

    Micro-batches add up sums of losses, of weights and of gradients, and the division comes last:
    a mean of their means would weigh tokens differently wherever their counts differ.
    """
    loss, weight, gradients = gradient_sums(state.model, batch, config.train.micro_batches)
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
    return TrainState(state.step + 1, model, optimizer_state), metrics


def gradient_sums(
    model: LanguageModel, batch: Batch, micro_batches: int
) -> tuple[Float[Array, ""], Float[Array, ""], LanguageModel]:
    """Sums over the batch: of the loss, of the weights, and the gradients of the first.

    The batch is run in `micro_batches` parts, one after the other.
    """
    value_and_gradient = jax.value_and_grad(loss_sum, has_aux=True)
    if micro_batches == 1:
        (loss, weight), gradients = value_and_gradient(model, batch)
        return loss, weight, gradients

    def add(sums, part):
        (loss, weight), gradients = value_and_gradient(model, part)
        return jax.tree.map(jnp.add, sums, (loss, weight, gradients)), None

    # Every k-th row goes to the same part, so that each device keeps the rows it has.
    parts = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)
    zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), jnp.float32(0), model))
    (loss, weight, gradients), _ = jax.lax.scan(add, zeros, parts)
    return loss, weight, gradients
