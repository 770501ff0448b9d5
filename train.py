"""Trains a language model.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart
    python train.py --config=FILE[:ARGUMENT] --workdir=DIR --config.train.steps=100 ...
    python train.py ... --config.init_from=DIR          begins with a trained model, own or foreign

The same command again resumes from the newest checkpoint, or says that the run is finished. Ctrl-C
and SIGTERM save and end with status 0.
"""

import contextlib
import math
import operator
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
from absl import flags

from retnet_jax import command_line
from retnet_jax.checkpoint import CheckpointError, Checkpoints
from retnet_jax.config import Config
from retnet_jax.data import BatchStream, Split, Stores, number_of_windows, open_stores
from retnet_jax.metrics import MetricsLog, peak_flops
from retnet_jax.pretrained import load_checkpoint, run_options, with_initial_model
from retnet_jax.sharding import batch_sharding, check_batch, make_mesh
from retnet_jax.train_step import (
    StepMetrics,
    TrainState,
    abstract_state,
    initial_state,
    loss_sum,
    state_of,
    train_step,
)
from retnet_jax.workdir import open_workdir


def main() -> int:
    """Trains as the flags, defined below, say."""
    return train(command_line.given_config(), Path(flags.FLAGS.workdir))


def train(config: Config, workdir: Path) -> int:
    """Trains, from the beginning or from the newest checkpoint in `workdir`.

    Returns:
      The exit status: 0 when the run is finished or was asked to stop, 1 after a loss that is not
      finite or a last checkpoint that could not be written.

    Raises:
      ConfigError, CheckpointError: before anything is changed, for input that does not fit.
    """
    config = with_initial_model(config, workdir)
    mesh = make_mesh(config.mesh)
    check_batch(mesh, config.train.batch_size, config.train.micro_batches)
    state_shape = abstract_state(config, mesh)
    stores = open_stores(config.data, config.model.vocab_size)
    open_workdir(workdir, config, stores.tokenizer)
    checkpoints = Checkpoints(workdir / "checkpoints", config.train.keep_checkpoints)
    clock = Clock(
        tokens_per_step=config.train.batch_size * config.data.sequence_length,
        flops_per_token=config.model.training_flops_per_token(config.data.sequence_length),
        peak_flops=mesh.devices.size * peak_flops(mesh.devices.flat[0]),
    )
    with stop_signals() as stop, jax.set_mesh(mesh), contextlib.closing(checkpoints):
        state, next_batch = start_or_restore(config, mesh, state_shape, checkpoints)
        start = int(state.step)
        log = MetricsLog(workdir, start, config.train.steps)
        with contextlib.closing(log):
            log.say(describe(config, stores, state, mesh))
            run = Run(config, stores, mesh, state_shape, checkpoints, log, clock)
            try:
                state, done = run.advance(state, start, next_batch, config.train.steps, stop)
            except NonFiniteLossError as error:
                log.say(str(error))
                return 1
            if stop:
                log.say(f"{stop[0]}: stopping after step {done}")
            return run.finish(state, done)


def start_or_restore(
    config: Config, mesh: jax.sharding.Mesh, state_shape: TrainState, checkpoints: Checkpoints
) -> tuple[TrainState, int]:
    """The state of the newest checkpoint or a fresh one, and the number of the next batch."""
    step = checkpoints.latest_step()
    shardings = jax.tree.map(lambda x: x.sharding, state_shape)
    if step is None and config.init_from:
        model, _ = load_checkpoint(Path(config.init_from), mesh, **run_options(config.model))
        begin = jax.jit(partial(state_of, config), out_shardings=shardings, donate_argnums=0)
        return begin(model), 0
    if step is None:
        return jax.jit(partial(initial_state, config), out_shardings=shardings)(), 0
    model, optimizer, carry, next_batch = checkpoints.restore(
        step, state_shape.model, state_shape.optimizer, state_shape.carry
    )
    count = jax.device_put(jax.numpy.int32(step), shardings.step)
    return TrainState(count, model, optimizer, carry), next_batch


def describe(config: Config, stores: Stores, state: TrainState, mesh: jax.sharding.Mesh) -> str:
    """What is about to be trained, in a few lines."""
    tokens = config.train.batch_size * config.data.sequence_length
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    shares = stores.weights / stores.weights.sum()
    return (
        f"{type(state.model).__name__} of {config.model.parameter_count():,} parameters, "
        f"{jax.devices()[0].device_kind} mesh {axes}\n"
        f"steps {state.step} to {config.train.steps} of {tokens:,} tokens in "
        f"{config.data.windows} windows"
        + "".join(
            f"\n{share:7.1%} of {store.directory}: {store.train.token_count:,} tokens in "
            f"{len(store.train):,} documents"
            for share, store in zip(shares, stores.stores.values(), strict=True)
        )
    )


class NonFiniteLossError(Exception):
    """A loss or a gradient that is NaN or infinite."""


class Run:
    """The loop and what it works with."""

    def __init__(
        self,
        config: Config,
        stores: Stores,
        mesh: jax.sharding.Mesh,
        state_shape: TrainState,
        checkpoints: Checkpoints,
        log: MetricsLog,
        clock: "Clock",
    ):
        self.config = config
        self.checkpoints = checkpoints
        self.log = log
        self.clock = clock
        self.batch_sharding = batch_sharding(mesh)
        shardings = jax.tree.map(lambda x: x.sharding, state_shape)
        self.step = jax.jit(
            partial(train_step, config), donate_argnums=0, out_shardings=(shardings, None)
        )
        self.loss_sum = jax.jit(loss_sum)
        self.stores = stores
        self.train_stream = self._stream(
            [store.train for store in stores.stores.values()], stores.weights, config.data.windows
        )
        self.held_out = {
            name: self._stream([store.held_out], [1.0], "packed")
            for name, store in stores.stores.items()
        }

    def advance(
        self, state: TrainState, done: int, next_batch: int, last: int, stop: list[str]
    ) -> tuple[TrainState, int]:
        """Steps from `done` to `last`, or until `stop` holds a signal, with all that is due.

        Raises:
          NonFiniteLossError: naming the step and the documents of its batch.
        """
        train = self.config.train
        self.saved = done
        pending = None  # a step whose metrics have not been read
        with self.train_stream.iterate(next_batch) as batches:
            self.clock.start(done)
            while done < last and not stop:
                batch = jax.device_put(next(batches), self.batch_sharding)
                state, metrics = self.step(state, batch)
                # The step before is read while this one runs, so that neither waits.
                if pending is not None:
                    self.report(*pending)
                done, pending = done + 1, (done + 1, metrics)
                evaluate = done % train.eval_every == 0 or done == train.steps
                save = done % train.checkpoint_every == 0
                if evaluate or save:
                    self.report(*pending)
                    pending = None
                    with self.clock.paused():
                        if evaluate:
                            self.evaluate(done, state)
                        if save:
                            self.save(done, state)
            if pending is not None:
                self.report(*pending)
        return state, done

    def report(self, step: int, metrics: StepMetrics) -> None:
        """Waits for a step, and logs it if it is due."""
        values = {name: float(x) for name, x in zip(metrics._fields, metrics, strict=True)}
        self.log.advance(step)
        if not math.isfinite(values["loss"]) or not math.isfinite(values["gradient_norm"]):
            raise NonFiniteLossError(
                f"step {step}: the loss is {values['loss']}, the norm of its gradient "
                f"{values['gradient_norm']}. No checkpoint has it. The batch held parts of\n  "
                + "\n  ".join(self.train_stream.document_names(step - 1))
            )
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            self.log.write(step, values | self.clock.lap(step))

    def evaluate(self, step: int, state: TrainState) -> None:
        """Logs the mean loss over the first windows of what each store holds out.

        Every window begins with the empty state. Of several stores each has a loss of its own, and
        their mean is by the shares of the mixture.
        """
        found = {name: self._held_out_loss(name, state) for name in self.held_out}
        metrics = {}
        for name, loss in found.items():
            held_out = self.stores.stores[name].held_out
            metrics |= {
                f"held_out_loss/{name}": loss,
                f"held_out_perplexity/{name}": math.exp(min(loss, 700.0)),
                f"held_out_bits_per_byte/{name}": loss / math.log(2) * held_out.tokens_per_byte,
            }
        shares = self.stores.weights / self.stores.weights.sum()
        mean = sum(map(operator.mul, shares, found.values()))
        self.log.write(step, {"held_out_loss": float(mean)} | metrics)

    def _held_out_loss(self, name: str, state: TrainState) -> float:
        config, split = self.config, self.stores.stores[name].held_out
        windows = number_of_windows(split, config.data.sequence_length)
        batches = min(config.train.eval_batches, math.ceil(windows / config.train.batch_size))
        sums = []
        for number in range(batches):
            batch = jax.device_put(self.held_out[name][number], self.batch_sharding)
            loss, (weight, _) = self.loss_sum(state.model, batch)
            sums.append((loss, weight))
        loss, weight = (sum(map(float, column)) for column in zip(*sums, strict=True))
        return loss / weight

    def save(self, step: int, state: TrainState) -> None:
        """Begins a checkpoint. A failure is said and training goes on: the next may succeed."""
        self.written()  # the one before; its failure should not cost this one
        try:
            self.checkpoints.save(step, state.model, state.optimizer, state.carry)
            self.saved = step
        except CheckpointError as error:
            self.log.say(f"step {step}: {error}")

    def written(self) -> bool:
        """Waits for a checkpoint that was begun; False, and a message, if it failed."""
        try:
            self.checkpoints.wait()
        except CheckpointError as error:
            self.log.say(str(error))
            return False
        return True

    def finish(self, state: TrainState, done: int) -> int:
        """Saves the last step, waits until it is written, and says how to go on."""
        if self.saved != done:
            self.save(done, state)
        if not self.written() or self.saved != done:
            return 1
        finished = done == self.config.train.steps
        self.log.say("the run is finished" if finished else "the same command goes on from here")
        return 0

    def _stream(
        self, splits: Sequence[Split], weights: Sequence[float], policy: str
    ) -> BatchStream:
        return BatchStream(
            splits,
            weights,
            sequence_length=self.config.data.sequence_length,
            batch_size=self.config.train.batch_size,
            bos_id=self.stores.tokenizer.bos_id,
            seed=self.config.train.seed,
            policy=policy,
        )


class Clock:
    """Training speed between logged steps, evaluations and checkpoints left out."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, peak_flops: float):
        self._tokens_per_step = tokens_per_step
        self._peak_tokens_per_second = peak_flops / flops_per_token

    def start(self, step: int) -> None:
        self._step, self._since = step, time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    def lap(self, step: int) -> dict[str, float]:
        """Tokens/s and model FLOPs utilisation since the last lap."""
        seconds = time.perf_counter() - self._since
        speed = (step - self._step) * self._tokens_per_step / seconds
        self.start(step)
        return {"tokens_per_second": speed, "mfu": speed / self._peak_tokens_per_second}


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """A list that gets the name of a SIGINT or SIGTERM. The second one acts as usual."""
    received: list[str] = []

    def note(number, _):
        received.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "directory of the run, made if it does not exist")
    flags.mark_flag_as_required("workdir")
    command_line.define_config()
    command_line.run(main)
