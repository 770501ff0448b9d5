"""Trains a language model.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart
    python train.py --config=FILE[:ARGUMENT] --workdir=DIR --config.train.steps=100 ...
    python train.py ... --config.init_from=DIR          begins with a trained model, own or foreign
    python train.py ... --compiled=FILE                 with what tools/compile_ahead.py saved

The same command again resumes from the newest checkpoint, or says that the run is finished. Ctrl-C
and SIGTERM save and end with status 0.

Many processes train one model: TPU pods, SLURM and MPI are recognised; elsewhere each process gets

    --coordinator_address=HOST:PORT --num_processes=N --process_id=I
"""

import contextlib
import math
import operator
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import flags
from etils import epath

from retnet_jax import aot
from retnet_jax.config import Config
from retnet_jax.data import (
    Batch,
    BatchStream,
    Split,
    Stores,
    batch_numbers,
    number_of_windows,
    open_stores,
)
from retnet_jax.errors import CheckpointError, DamagedCheckpointError, DivergedError
from retnet_jax.parallel import processes
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.parallel.sharding import check_fit, local_rows, place_batch
from retnet_jax.pretrained import load_checkpoint, run_options, with_initial_model
from retnet_jax.programs import command_line
from retnet_jax.runs.checkpoint import Checkpoints
from retnet_jax.runs.log import MetricsLog, NoLog, peak_flops
from retnet_jax.runs.workdir import locked, open_workdir
from retnet_jax.training.clock import Clock
from retnet_jax.training.step import (
    StepMetrics,
    TrainState,
    abstract_state,
    initial_state,
    loss_sum,
    make_step,
    state_of,
)


def main() -> None:
    """The program."""
    flags.DEFINE_string("workdir", None, "directory of the run, made if it does not exist")
    flags.mark_flag_as_required("workdir")
    flags.DEFINE_string("compiled", None, "step that tools/compile_ahead.py --save wrote")
    command_line.define_processes()
    command_line.define_config()
    command_line.run(_main)


def _main() -> int:
    """Trains as the flags say."""
    given = flags.FLAGS
    config = command_line.given_config()
    processes.connect(
        given.coordinator_address, given.num_processes, given.process_id, given.connect_seconds
    )
    with processes.ending_with_the_others("The same command goes on from the newest checkpoint."):
        return train(config, epath.Path(given.workdir), given.compiled)


def train(config: Config, workdir: epath.PathLike, compiled: str | None = None) -> int:
    """Trains, from the beginning or from the newest checkpoint in `workdir`.

    Args:
      config: what to train.
      workdir: of the run, new or begun.
      compiled: file with the compiled step; None: it is compiled here.

    Returns:
      The exit status: 0 when the run is finished or was asked to stop, 1 after too many bad steps
      or a last checkpoint that could not be written.

    Raises:
      ConfigError, CheckpointError: before anything is changed, for input that does not fit.
    """
    workdir = epath.Path(workdir)
    config = with_initial_model(config, workdir)
    processes.check_alike(config)
    mesh = make_mesh(config.mesh)
    check_fit(mesh, config)
    state_shape = abstract_state(config, mesh)
    if compiled is None:
        step = make_step(config, state_shape)
    else:
        step = aot.load(Path(compiled), config, mesh, state_shape)
    # A store that is not there yet is built by the first process.
    processes.once(lambda: open_stores(config.data, config.model.vocab_size))
    stores = open_stores(config.data, config.model.vocab_size)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(processes.stop_signals())
        processes.once(lambda: stack.enter_context(locked(workdir)))
        changes = processes.once(lambda: open_workdir(workdir, config, stores.tokenizer))
        peak = mesh.devices.size * peak_flops(jax.local_devices()[0])
        stack.enter_context(jax.set_mesh(mesh))
        keep = config.train.keep_checkpoints, config.train.keep_every
        checkpoints = Checkpoints(workdir / "checkpoints", *keep)
        stack.enter_context(contextlib.closing(checkpoints))
        state, next_batch, damage = start_or_restore(config, mesh, state_shape, checkpoints)
        start, steps = int(state.step), config.train.steps
        log = NoLog()
        if processes.is_first():
            log = MetricsLog(workdir, start, steps, config.train.wandb)
        stack.enter_context(contextlib.closing(log))
        for change in changes or ():
            log.say(f"goes on with another {change}")
        for problem in damage:
            log.say(problem)
        log.say(describe(config, stores, state, mesh))
        run = Run(config, stores, mesh, step, checkpoints, log, peak, workdir / "profile")
        try:
            state, done = run.advance(state, start, next_batch, steps, stop)
        except DivergedError as error:
            log.say(str(error))
            return 1
        if done < steps:
            log.say(f"{stop.name}: stopping after step {done}")
        return run.finish(state, done)


def start_or_restore(
    config: Config, mesh: jax.sharding.Mesh, state_shape: TrainState, checkpoints: Checkpoints
) -> tuple[TrainState, int, list[str]]:
    """The state of the newest whole checkpoint or a fresh one.

    Returns:
      The state, the number of the next batch, and what was found damaged on the way.

    Raises:
      CheckpointError: if there are checkpoints but none is whole.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state_shape)
    problems: list[str] = []
    for step in checkpoints.steps():
        try:
            items, next_batch = checkpoints.restore(step, items_of(state_shape))
        except DamagedCheckpointError as error:
            problems.append(f"{error}; it is set aside, and the one before is used")
            checkpoints.set_aside(step)
            continue
        count = jax.device_put(np.int32(step), shardings.step)
        return TrainState(step=count, **items), next_batch, problems
    if problems:
        raise CheckpointError("\n".join([*problems, "there is no other checkpoint"]))
    if config.init_from:
        model, _ = load_checkpoint(epath.Path(config.init_from), mesh, **run_options(config.model))
        begin = jax.jit(partial(state_of, config), out_shardings=shardings, donate_argnums=0)
        return begin(model), 0, []
    return jax.jit(partial(initial_state, config), out_shardings=shardings)(), 0, []


def items_of(state: TrainState) -> dict:
    """What of a state a checkpoint holds, by name; the step is the checkpoint's own."""
    items = state._asdict()
    del items["step"]
    return items


def describe(config: Config, stores: Stores, state: TrainState, mesh: jax.sharding.Mesh) -> str:
    """What is about to be trained, in a few lines."""
    tokens = config.train.batch_size * config.data.sequence_length
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    shares = stores.weights / stores.weights.sum()
    several = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return (
        f"{type(state.model).__name__} of {config.model.parameter_count():,} parameters, "
        f"{jax.devices()[0].device_kind} mesh {axes}{several}\n"
        f"steps {state.step} to {config.train.steps} of {tokens:,} tokens in "
        f"{config.data.windows} windows"
        + "".join(
            f"\n{share:7.1%} of {store.directory}: {store.train.token_count:,} tokens in "
            f"{len(store.train):,} documents"
            for share, store in zip(shares, stores.stores.values(), strict=True)
        )
    )


class Run:
    """The loop and what it works with."""

    def __init__(
        self,
        config: Config,
        stores: Stores,
        mesh: jax.sharding.Mesh,
        step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]],
        checkpoints: Checkpoints,
        log: MetricsLog | NoLog,
        peak: float,
        trace_directory: epath.Path,
    ):
        self.config = config
        self.mesh = mesh
        self.checkpoints = checkpoints
        self.log = log
        self.trace_directory = trace_directory
        began, training_seconds = log.begin(processes.facts())
        self.clock = Clock(
            tokens_per_step=config.train.batch_size * config.data.sequence_length,
            flops_per_token=config.model.training_flops_per_token(config.data.sequence_length),
            peak_flops=peak,
            run_began=began,
            training_seconds=training_seconds,
        )
        self.step = step
        self.loss_sum = jax.jit(loss_sum)
        self.stores = stores
        self.rows = local_rows(mesh, config.train.batch_size)
        self.train_stream = self._stream(
            [store.train for store in stores.stores.values()], stores.weights, config.data.windows
        )
        self.held_out = {
            name: self._stream([store.held_out], [1.0], "packed")
            for name, store in stores.stores.items()
        }
        self.bad_batches: list[int] = []  # of the steps passed over in a row

    def advance(
        self,
        state: TrainState,
        done: int,
        next_batch: int,
        last: int,
        stop: processes.StopRequest,
    ) -> tuple[TrainState, int]:
        """Steps from `done` to `last`, or until a signal came, with all that is due.

        Raises:
          DivergedError: naming the batches and their documents.
        """
        train, profile = self.config.train, self.config.profile
        self.saved, self.saved_at, self.next_batch = done, time.monotonic(), next_batch
        skip = frozenset(self.config.data.skip_steps)
        pending = None  # a step whose metrics have not been read
        with (
            self.train_stream.iterate(next_batch, skip) as batches,
            contextlib.ExitStack() as trace,
        ):
            numbers = batch_numbers(next_batch, skip)
            self.clock.start()
            while done < last and not stop.seen(done):
                if profile.steps and done + 1 == profile.start:
                    trace.enter_context(jax.profiler.trace(str(self.trace_directory)))
                with self.clock.waiting("data"):
                    batch, number = self.place(next(batches)), next(numbers)
                state, metrics = self.step(state, batch)
                # The step before is read while this one runs, so that neither waits.
                if pending is not None:
                    self.report(*pending)
                done, pending, self.next_batch = done + 1, (done + 1, number, metrics), number + 1
                evaluate = done % train.eval_every == 0 or done == train.steps
                save = done % train.checkpoint_every == 0 or self.save_is_due(done)
                traced = profile.steps and done + 1 == profile.start + profile.steps
                if evaluate or save or traced:
                    self.report(*pending)
                    pending = None
                if traced:
                    trace.close()
                if evaluate:
                    with self.clock.waiting("evaluation"):
                        self.evaluate(done, state)
                if save:
                    with self.clock.waiting("checkpoint"):
                        self.save(done, state)
            if pending is not None:
                self.report(*pending)
        return state, done

    def place(self, batch: Batch) -> Batch:
        """This process's rows as its part of a batch on all devices."""
        return place_batch(self.mesh, batch, self.rows, self.config.train.batch_size)

    def report(self, step: int, batch: int, metrics: StepMetrics) -> None:
        """Waits for a step, judges it, and logs it if it is due.

        Raises:
          DivergedError: as `advance`.
        """
        values = {name: float(x) for name, x in zip(metrics._fields, metrics, strict=True)}
        self.clock.step()
        self.log.advance(step)
        skipped = int(values.pop("skipped"))
        self.bad_batches = [*self.bad_batches, batch] if skipped else []
        if skipped:
            self.log.say(
                f"step {step} is passed over: with batch {batch} the loss is {values['loss']:.4g}, "
                f"the norm of its gradient {values['gradient_norm']:.4g}"
            )
        if skipped >= self.config.train.most_skipped:
            raise DivergedError(self._divergence(step))
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            self.log.write(step, values | self.clock.lap())

    def _divergence(self, step: int) -> str:
        documents = {
            name for batch in self.bad_batches for name in self.train_stream.document_names(batch)
        }
        numbers = ",".join(map(str, self.bad_batches))
        return (
            f"the last {len(self.bad_batches)} steps, to step {step}, were passed over, and no "
            "checkpoint has them. Their batches held parts of\n  "
            + "\n  ".join(sorted(documents))
            + f"\nThe same command with --config.data.skip_steps='({numbers},)' goes on from the "
            "newest checkpoint without them; if the trouble goes on too, it is not the data"
        )

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
        found = [
            self.loss_sum(state.model, self.place(self.held_out[name][number]))[1]
            for number in range(batches)
        ]
        return sum(float(x.loss) for x in found) / sum(float(x.weight) for x in found)

    def save_is_due(self, step: int) -> bool:
        """Whether `checkpoint_minutes` have passed: by the first process, at logged steps."""
        minutes = self.config.train.checkpoint_minutes
        if not minutes or step % self.config.train.log_every:
            return False
        passed = time.monotonic() - self.saved_at > 60 * minutes
        return processes.any_of_us(processes.is_first() and passed)

    def save(self, step: int, state: TrainState) -> None:
        """Begins a checkpoint. A failure is said and training goes on: the next may succeed."""
        self.written()  # the one before; its failure should not cost this one
        self.saved_at = time.monotonic()
        try:
            self.checkpoints.save(step, items_of(state), self.next_batch)
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
            rows=self.rows,
        )
