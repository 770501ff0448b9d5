"""One training step as a pure function, and the training state.

    state, metrics = train_step(config, state, batch)

`abstract_state` alone defines what a state looks like on a mesh: initialisation, restoring and
ahead-of-time compilation all start from it.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from retnet_jax.config import Config
from retnet_jax.data import Batch
from retnet_jax.model import LanguageModel, State, build_model
from retnet_jax.ops.cross_entropy import objective_sum
from retnet_jax.ops.dropout import row_keys
from retnet_jax.parallel.sharding import batch_shardings, constrain, with_shardings
from retnet_jax.shapes import Array, Bool, Float, Int, RandomKeys
from retnet_jax.training.optim import at_step, learning_rate_factor, make_optimizer
from retnet_jax.training.spikes import UsualStep, judge, nothing_yet


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Int[Array, ""]  # steps taken
    model: LanguageModel
    optimizer: Any
    carry: State | None  # state with which each row continues, with `config.train.carry_state`
    usual: UsualStep


class StepMetrics(NamedTuple):
    """Scalars of one step."""

    loss: Float[Array, ""]  # mean over the weights, nats per token, without the z-loss
    gradient_norm: Float[Array, ""]  # before clipping
    parameter_norm: Float[Array, ""]  # before the update
    learning_rate: Float[Array, ""]
    skipped: Int[Array, ""]  # consecutive skipped steps up to this one; 0: it was not skipped


class Sums(NamedTuple):
    """Sums over a batch, returned beside the objective."""

    loss: Float[Array, ""]  # weighted cross-entropy, nats
    weight: Float[Array, ""]
    carry: State | None  # state of each row after the batch, if there was one before it


def initial_state(config: Config) -> TrainState:
    """A newly initialised state, which depends on `config.train.seed`. Jit it with shardings."""
    return state_of(config, build_model(config.model, rngs=nnx.Rngs(config.train.seed)))


def state_of(config: Config, model: LanguageModel) -> TrainState:
    """The state before the first step, with given parameters."""
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    # optax's types name no pytrees but containers of arrays.
    optimizer_state = optimizer.init(model)  # pyright: ignore[reportArgumentType]
    carry = None
    if config.train.carry_state:
        carry = model.init_state(config.train.batch_size, capacity=0)
    return TrainState(jnp.zeros((), jnp.int32), model, optimizer_state, carry, nothing_yet())


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state, without allocating memory.

    Raises:
      ConfigError: for sizes that do not fit together or do not divide over the mesh.
    """
    return with_shardings(jax.eval_shape(partial(initial_state, config)), mesh)


def abstract_batch(config: Config, mesh: Mesh, one_document: bool = False) -> Batch:
    """Shapes, dtypes and shardings of a batch, without allocating memory.

    With `one_document` the `segment_ids` are None: each row is one document.
    """
    rows, length = config.train.batch_size, config.data.sequence_length
    batch = Batch(
        tokens=jax.ShapeDtypeStruct((rows, length), "int32"),
        targets=jax.ShapeDtypeStruct((rows, length), "int32"),
        segment_ids=None if one_document else jax.ShapeDtypeStruct((rows, length), "int32"),
        weights=jax.ShapeDtypeStruct((rows, length), "float32"),
        continues=jax.ShapeDtypeStruct((rows,), "bool"),
    )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        batch,
        batch_shardings(mesh, batch),
    )


def make_step(config: Config, state_shape: TrainState):
    """The jitted `train_step`: (state, batch) -> (state, metrics). The state is donated.

    train.py runs it, and `tools/compile_ahead.py` compiles it. Call it with the mesh set.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state_shape)
    return jax.jit(partial(train_step, config), donate_argnums=0, out_shardings=(shardings, None))


def loss_sum(
    model: LanguageModel,
    batch: Batch,
    carry: State | None = None,
    z_loss: float = 0.0,
    dropout_keys: RandomKeys | None = None,
) -> tuple[Float[Array, ""], Sums]:
    """The objective on a batch: its weighted cross-entropy, plus the z-loss.

    Args:
      model: A RetNet or Transformer.
      batch: The windows.
      carry: State of each row after its previous window, used by the rows that continue; None: all
        rows begin with the empty state.
      z_loss: Coefficient of the z-loss, as in `objective_sum`.
      dropout_keys: Random key of each row; None: nothing is dropped.
    """
    state = None if carry is None else _where_continued(batch.continues, carry)
    hidden, state = model.hidden(
        batch.tokens, state, segment_ids=batch.segment_ids, dropout_keys=dropout_keys
    )
    objective, loss = objective_sum(
        hidden, model.head_matrix(), batch.targets, batch.weights, z_loss
    )
    return objective, Sums(loss, batch.weights.sum(), None if carry is None else state)


def _where_continued(continues: Bool[Array, " b"], carry: Any) -> Any:
    """The carried state for rows that continue, the empty state for the others."""

    def kept(x):  # [n b ...]
        return jnp.where(continues.reshape(1, -1, *[1] * (x.ndim - 2)), x, jnp.zeros((), x.dtype))

    return carry._replace(
        layers=jax.tree.map(kept, carry.layers), position=jnp.where(continues, carry.position, 0)
    )


def train_step(config: Config, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    """One update, or none if the step is skipped (`spikes.py`).

    Losses, weights and gradients are summed over the micro-batches and divided once at the end. A
    mean of the micro-batches' means would weigh tokens differently where their counts differ.
    """
    keys = None
    if config.model.has_dropout:
        rows = constrain(jnp.arange(len(batch.tokens)), "b")
        keys = row_keys(config.train.seed, state.step, rows)
    gradients, sums = gradient_sums(
        state.model, batch, config.train.micro_batches, state.carry, config.train.z_loss, keys
    )
    gradients = jax.tree.map(lambda g: g / sums.weight, gradients)
    loss, norm = sums.loss / sums.weight, optax.tree.norm(gradients)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    before = at_step(state.optimizer, state.step)
    model: Any = state.model  # a pytree that optax's types do not name, as in `state_of`
    updates, optimizer_state = optimizer.update(gradients, before, model)
    model = optax.apply_updates(model, updates)
    finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(model)]).all()
    good, usual = judge(state.usual, loss, norm, config.train.spike_deviations, finite)
    factor = learning_rate_factor(config.optimizer, config.train.steps)
    metrics = StepMetrics(
        loss=loss,
        gradient_norm=norm,
        parameter_norm=optax.tree.norm(state.model),
        learning_rate=jnp.asarray(config.optimizer.learning_rate * factor(state.step)),
        skipped=usual.skipped,
    )
    model, optimizer_state = jax.tree.map(
        partial(jnp.where, good), (model, optimizer_state), (state.model, state.optimizer)
    )
    # After a skipped step the carried states may be wrong too, so rows begin anew.
    carry = jax.tree.map(lambda x: jnp.where(good, x, jnp.zeros_like(x)), sums.carry)
    return TrainState(state.step + 1, model, optimizer_state, carry, usual), metrics


def gradient_sums(
    model: LanguageModel,
    batch: Batch,
    micro_batches: int,
    carry: State | None = None,
    z_loss: float = 0.0,
    dropout_keys: RandomKeys | None = None,
) -> tuple[LanguageModel, Sums]:
    """Sums over a batch: the gradients of the objective, and the `Sums` of `loss_sum`.

    The batch is run in `micro_batches` parts, one after another. No gradient flows into `carry`.
    `dropout_keys` has a random key for each row of the whole batch; None: nothing is dropped.
    """
    gradient = jax.grad(partial(loss_sum, z_loss=z_loss), has_aux=True)
    if micro_batches == 1:
        return gradient(model, batch, carry, dropout_keys=dropout_keys)

    def add(totals, part):
        windows, carry, keys = part
        gradients, sums = gradient(model, windows, carry, dropout_keys=keys)
        added = jax.tree.map(jnp.add, totals, (gradients, sums.loss, sums.weight))
        return added, sums.carry

    def split(x, axis=0):
        # Part i takes every `micro_batches`-th row from i on, so rows stay on their devices.
        rows = jnp.moveaxis(x, axis, 0)  # [b ...]
        parts = rows.reshape(-1, micro_batches, *rows.shape[1:]).swapaxes(0, 1)  # [n b/n ...]
        return jnp.moveaxis(parts, 1, axis + 1)  # [n ...], with the rows at their axis again

    def join(parts, axis=0):
        rows = jnp.moveaxis(parts, axis + 1, 1).swapaxes(0, 1)  # [b/n n ...]
        return jnp.moveaxis(rows.reshape(-1, *rows.shape[2:]), 0, axis)  # as before `split`

    def of_rows(function, carry: Any) -> Any:  # rows are axis 1 of a state's layers
        layers = jax.tree.map(partial(function, axis=1), carry.layers)
        return carry._replace(layers=layers, position=function(carry.position))

    parts, keys = jax.tree.map(split, (batch, dropout_keys))
    if carry is not None:
        carry = of_rows(split, carry)
    zeros = jax.tree.map(jnp.zeros_like, (model, jnp.float32(0), jnp.float32(0)))
    (gradients, loss, weight), carry = jax.lax.scan(add, zeros, (parts, carry, keys))
    if carry is not None:
        carry = of_rows(join, carry)
    return gradients, Sums(loss, weight, carry)
