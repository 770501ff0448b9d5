"""What a run prints when it starts."""

from collections.abc import Iterable

import jax

from retnet_jax.config import Config
from retnet_jax.config.as_text import summary
from retnet_jax.data import Stores
from retnet_jax.data.stores import repetition_notes
from retnet_jax.parallel import processes
from retnet_jax.runs.log import MetricsLog, NoLog
from retnet_jax.training.step import TrainState


def announce(
    log: MetricsLog | NoLog,
    config: Config,
    stores: Stores,
    state: TrainState,
    mesh: jax.sharding.Mesh,
    notes: Iterable[str],
) -> None:
    """Records the start of a run in its log, and prints what will be trained.

    Args:
      log: Log of the run.
      config: Config of the run.
      stores: The stores that it is trained on.
      state: The state that it begins with.
      mesh: The devices.
      notes: Messages to print first: the workdir, changed options, damaged checkpoints.
    """
    log.begin(processes.facts())
    for note in notes:
        log.say(note)
    log.say(summary(config))
    log.say(describe(config, stores, state, mesh))
    tokens = config.train.batch_size * config.data.sequence_length
    for note in repetition_notes(stores, config.train.steps, tokens):
        log.say(note)
    if config.profile.steps and config.profile.start <= int(state.step):
        log.say(
            f"no steps are traced: profile.start={config.profile.start} is already done; give a "
            f"step after {int(state.step)}"
        )


def describe(config: Config, stores: Stores, state: TrainState, mesh: jax.sharding.Mesh) -> str:
    """A few lines on the model, the devices, the steps and the data."""
    tokens = config.train.batch_size * config.data.sequence_length
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    shares = stores.weights / stores.weights.sum()
    several = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    rows = config.train.batch_size // config.train.micro_batches
    runs = state.model.mixer_type.implementation(config.model, (rows, config.data.sequence_length))
    return (
        f"{type(state.model).__name__} of {config.model.parameter_count():,} parameters, "
        f"{jax.devices()[0].device_kind} mesh {axes}{several}\n"
        f"steps {state.step} to {config.train.steps}, {tokens:,} tokens each, in "
        f"{config.data.windows} windows; {runs}"
        + "".join(
            f"\n{share:7.1%} of the windows from {store.directory}: "
            f"{store.train.token_count:,} tokens in {len(store.train):,} documents"
            f"{'' if store.has_block_digests else _UNVERIFIED}"
            for share, store in zip(shares, stores.stores.values(), strict=True)
        )
    )


_UNVERIFIED = (
    "; it was built without digests, so damage to its tokens would go unnoticed: build it again to "
    "add them"
)
