"""A training run: from a config and a directory to a trained model.

    result = train(config, "runs/mine")

The methods of `Run` are in the order in which they are called. Everything that is computed from the
model during training is an `Evaluator`, such as the held-out loss (`held_out_loss.py`).
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath

from retnet_jax.config import Config
from retnet_jax.data import Batch, Stores, Tokenizer, open_stores
from retnet_jax.data.batches import PlacedBatches
from retnet_jax.data.build import DEFAULT_COMMAND
from retnet_jax.data.token_store import TokenStore
from retnet_jax.errors import CheckpointError, ConfigError, DivergedError
from retnet_jax.files.paths import place
from retnet_jax.model import LanguageModel
from retnet_jax.parallel import processes
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.parallel.sharding import check_fit
from retnet_jax.pretrained import with_initial_model
from retnet_jax.runs.checkpoint import Checkpoints
from retnet_jax.runs.log import HELD_OUT_LOSS, MetricsLog, NoLog
from retnet_jax.runs.workdir import locked, record_start, recorded_config, restore_if_gone
from retnet_jax.training.announce import announce
from retnet_jax.training.clock import Clock, peak_flops
from retnet_jax.training.held_out_loss import HeldOutLoss
from retnet_jax.training.memory import check_memory
from retnet_jax.training.start import RunProgress, check_finite, items_of, start_or_restore
from retnet_jax.training.step import StepMetrics, TrainState, abstract_state, make_step
from retnet_jax.waiting import showing, showing_first_call

Step = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


class Evaluator(NamedTuple):
    """A function of the model whose values are logged during training.

    Its records in metrics.jsonl have its name, so a resumed run knows which evaluations are missing
    (`Run.make_missing_evaluations`).
    """

    name: str  # unique among the evaluators of a run
    every: int  # number of steps between evaluations; the last step is always evaluated
    function: Callable[[LanguageModel], Mapping[str, float]]  # returns values by name


class TrainResult(NamedTuple):
    """What `train` returns; the workdir has all of it too."""

    model: LanguageModel
    step: int  # number of steps taken, over all starts
    status: str  # "finished", "stopped" by a signal, "diverged", or "unsaved"
    metrics: list[dict[str, Any]]  # the records that this call added to metrics.jsonl


def train(
    config: Config,
    workdir: epath.PathLike,
    *,
    step: Callable[[Config, jax.sharding.Mesh, TrainState], Step] | None = None,
    evaluators: Iterable[Evaluator] = (),
    on_log: Callable[[dict[str, Any]], object] | None = None,
    command: str = DEFAULT_COMMAND,
) -> TrainResult:
    """Trains from the beginning, or from the newest checkpoint in `workdir`.

    Ctrl-C and SIGTERM save and return ("stopped"); the same call resumes. With several processes,
    all of them make the same call.

    Args:
      config: What to train.
      workdir: Directory of the run, new or existing.
      step: Makes the compiled step from config, mesh and shapes of the state; None: `make_step`.
      evaluators: Evaluators beside the held-out loss. Evaluations that are due at the step to
        resume from, but not in metrics.jsonl, are made first.
      on_log: Called in the first process with each record of metrics.jsonl.
      command: Command that builds the store of `config.data`, for messages and its manifest.

    Raises:
      ConfigError, CheckpointError: before anything is changed, for input that does not fit.
    """
    config.check()
    evaluators = tuple(evaluators)
    check_names(evaluators)
    workdir = place(workdir)
    with contextlib.ExitStack() as stack:
        processes.once(lambda: stack.enter_context(locked(workdir)))
        recorded = recorded_config(workdir)
        config = with_initial_model(config, recorded)
        processes.check_alike(config)
        mesh = make_mesh(config.mesh)
        check_fit(mesh, config)
        state_shape = abstract_state(config, mesh)
        memory = check_memory(config, state_shape)
        compiled = (step or _jitted_step)(config, mesh, state_shape)
        stores = _open_stores(config, command)
        changes = processes.once(lambda: record_start(workdir, config, recorded, *_files(stores)))
        stop = stack.enter_context(processes.stop_signals())
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = stack.enter_context(contextlib.closing(_checkpoints(config, workdir)))
        with showing("preparing the training state", processes.is_first()):
            state, progress, damage = start_or_restore(
                config, mesh, state_shape, checkpoints, workdir
            )
            check_finite(state, config, workdir)
        log = stack.enter_context(contextlib.closing(_open_log(config, workdir, int(state.step))))
        notes = [f"workdir {workdir}"]
        notes += [f"resumed with a changed option: {change}" for change in changes or ()]
        notes += [*damage, memory]
        announce(log, config, stores, state, mesh, notes)
        held_out = HeldOutLoss(config, mesh, stores)
        evaluators = (Evaluator(HELD_OUT_LOSS, config.train.eval_every, held_out), *evaluators)
        run = Run(config, workdir, mesh, stores, compiled, checkpoints, log, evaluators, on_log)
        return run.run(state, progress, stop)


def _jitted_step(config: Config, mesh: jax.sharding.Mesh, state_shape: TrainState) -> Step:
    return make_step(config, state_shape)


def _open_stores(config: Config, command: str) -> Stores:
    """The stores to train on. The first process builds one that does not exist."""
    arguments = config.data, config.model.vocab_size, command
    processes.once(lambda: open_stores(*arguments))
    return open_stores(*arguments)


def _files(stores: Stores) -> tuple[Tokenizer, list[TokenStore]]:
    """The tokenizer and the stores, which a workdir records."""
    return stores.tokenizer, list(stores.stores.values())


def _checkpoints(config: Config, workdir: epath.Path) -> Checkpoints:
    keep = config.train.keep_checkpoints, config.train.keep_every
    return Checkpoints(workdir / "checkpoints", *keep)


def _open_log(config: Config, workdir: epath.Path, step: int) -> MetricsLog | NoLog:
    """The log of the run in the first process, an empty one in the others."""
    arguments = workdir, step, config.train.steps, config.train.wandb
    return processes.once(lambda: MetricsLog(*arguments)) or NoLog()


def check_names(evaluators: Iterable[Evaluator]) -> None:
    """Raises `ConfigError` if two evaluators share a name; the held-out loss is one of them."""
    counts = Counter([HELD_OUT_LOSS, *(evaluator.name for evaluator in evaluators)])
    for name, count in counts.items():
        if count > 1:
            raise ConfigError(
                f"{count} evaluators are named {name!r}, but metrics.jsonl tells evaluations apart "
                "by name: give each evaluator its own"
            )


class Run:
    """The training loop.

    Args:
      config: What to train.
      workdir: Directory of the run.
      mesh: The devices. The mesh must be set (`jax.set_mesh`) during the run.
      stores: The data.
      step: The compiled step.
      checkpoints: Checkpoints of the run.
      log: Log of the run.
      evaluators: All evaluators of the run.
      on_log: Called in the first process with each record of metrics.jsonl.
    """

    def __init__(
        self,
        config: Config,
        workdir: epath.Path,
        mesh: jax.sharding.Mesh,
        stores: Stores,
        step: Step,
        checkpoints: Checkpoints,
        log: MetricsLog | NoLog,
        evaluators: Iterable[Evaluator] = (),
        on_log: Callable[[dict[str, Any]], object] | None = None,
    ):
        self.config = config
        self.workdir = workdir
        self.stores = stores
        first = processes.is_first()
        self.step = showing_first_call(step, "compiling the training step", first)
        self.checkpoints = checkpoints
        self.log = log
        self.evaluators = tuple(evaluators)
        self.on_log = on_log
        self.batches = PlacedBatches(
            mesh,
            [store.train for store in stores.stores.values()],
            stores.weights,
            sequence_length=config.data.sequence_length,
            batch_size=config.train.batch_size,
            bos_id=stores.tokenizer.bos_id,
            seed=config.train.seed,
            policy=config.data.windows,
            loss_weights=config.data.loss_weights,
        )
        self.clock = Clock(
            tokens_per_step=config.train.batch_size * config.data.sequence_length,
            flops_per_token=config.model.training_flops_per_token(config.data.sequence_length),
            peak_flops=peak_flops(mesh.devices.flat),
        )
        self.metrics: list[dict[str, Any]] = []
        self.skipped_batches: list[int] = []  # batches of the consecutive skipped steps up to now
        self.skipped_since_record = 0  # number of skipped steps since the last record

    def run(
        self, state: TrainState, progress: RunProgress, stop: processes.StopRequest
    ) -> TrainResult:
        """Trains from a state to the last step, or until a stop is requested, and saves."""
        self.begin(state, progress)
        self.make_missing_evaluations()
        try:
            self.advance(self.config.train.steps, stop)
        except DivergedError as error:
            self.log.say(str(error))
            return self.result("diverged")
        except ConfigError:  # a batch cannot be read
            if jax.process_count() == 1:  # with several, the others are already in the next step
                with contextlib.suppress(DivergedError):
                    self.read()
                    self.save_last()
            raise
        finished = self.done == self.config.train.steps
        if not finished:
            self.log.say(f"{stop.name}: stopping after step {self.done}")
        if not self.save_last():
            return self.result("unsaved")
        self.log.say("the run is finished" if finished else "the same command resumes from here")
        self.log.say(f"checkpoint: {self.workdir / 'checkpoints' / str(self.done)}")
        self.log.say(f"metrics:    {self.workdir / 'metrics.jsonl'}")
        return self.result("finished" if finished else "stopped")

    def begin(self, state: TrainState, progress: RunProgress) -> None:
        """Sets the state and the progress to begin with."""
        self.state = state
        self.done = self.saved = int(state.step)
        self.saved_at = time.monotonic()
        self.next_batch = progress.next_batch
        self.clock.restore(progress.run_began, progress.training_seconds)
        self.unread: tuple[int, int, StepMetrics] | None = None  # step, batch and its metrics

    def make_missing_evaluations(self) -> None:
        """Makes the evaluations that are due at the step resumed from but not in metrics.jsonl.

        A checkpoint is saved before the evaluations of its step, and a run may be killed between
        the two. Made here, its records are those of a run that was not killed, in the same order.

        Only the options of this start decide what is due: a new evaluator, or one with another
        `every`, evaluates this step too, but no step before it. An evaluation that raised an error
        raises it again here, until the evaluator is left out or has the memory that it needs (for
        the held-out loss, more `train.micro_batches`).
        """
        if not self.done:
            return
        made = self.log.evaluators_at(self.done)  # known in the first process
        due = [x for x in self.evaluators if self.evaluation_is_due(x)]
        first = processes.is_first()
        missing = [x for x in due if processes.any_of_us(first and x.name not in made)]
        if not missing:
            return
        if processes.any_of_us(None in made):
            self.log.say(
                f"metrics.jsonl has an evaluation of step {self.done} without the name of its "
                "evaluator, written by an older version: that step is not evaluated again"
            )
            return
        names = ", ".join(x.name for x in missing)
        self.log.say(f"step {self.done} was not evaluated by {names}: doing that first")
        self.evaluate(missing)

    def advance(self, last: int, stop: processes.StopRequest) -> None:
        """Takes steps up to `last`, or until a stop is requested; saves and evaluates when due.

        A checkpoint is saved before the evaluation of the same step, which may run out of memory. A
        run that is killed between the two makes the evaluation first when it is resumed.

        Raises:
          DivergedError: after too many consecutive skipped steps, naming their documents.
        """
        profile, skip = self.config.profile, frozenset(self.config.data.skip_batches)
        with (
            self.batches.iterate(self.next_batch, skip) as batches,
            contextlib.ExitStack() as trace,
        ):
            self.clock.start()
            while self.done < last and not stop.seen(self.done):
                if profile.steps and self.done + 1 == profile.start:
                    trace.enter_context(jax.profiler.trace(str(self.workdir / "profile")))
                self.take_step(batches)
                traced = profile.steps and self.done + 1 == profile.start + profile.steps
                due = [x for x in self.evaluators if self.evaluation_is_due(x)]
                save = self.save_is_due()
                if due or save or traced:
                    self.read()
                if traced:
                    trace.close()
                if save:
                    with self.clock.waiting("checkpoint"):
                        self.save()
                if due:
                    with self.clock.waiting("evaluation"):
                        self.evaluate(due)
            self.read()

    def take_step(self, batches: Iterator[tuple[int, Batch]]) -> None:
        """Starts a step, and reads the metrics of the previous step while it runs."""
        with self.clock.waiting("data"):
            number, batch = next(batches)
        self.state, metrics = self.step(self.state, batch)
        self.read()
        self.done, self.next_batch = self.done + 1, number + 1
        self.unread = self.done, number, metrics

    def read(self) -> None:
        """Waits for the last started step, reads its metrics, and logs them if due.

        Raises:
          DivergedError: as `advance`.
        """
        if self.unread is None:
            return
        (step, batch, metrics), self.unread = self.unread, None
        values = {name: float(x) for name, x in zip(metrics._fields, metrics, strict=True)}
        self.clock.step()
        self.log.advance(step)
        skipped = int(values.pop("skipped"))
        self.skipped_batches = [*self.skipped_batches, batch] if skipped else []
        if skipped:
            self.skipped_since_record += 1
            self.log.say(
                f"step {step} is skipped: batch {batch} has a loss of {values['loss']:.4g} and a "
                f"gradient norm of {values['gradient_norm']:.4g}"
            )
        if skipped >= self.config.train.max_skipped:
            raise DivergedError(self._divergence(step))
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            values["skipped_steps"] = self.skipped_since_record
            self.skipped_since_record = 0
            self.record(self.log.write(step, values | self.clock.lap()))

    def _divergence(self, step: int) -> str:
        documents = {
            name for batch in self.skipped_batches for name in self.batches.document_names(batch)
        }
        numbers = ",".join(map(str, self.skipped_batches))
        return (
            f"the run stops: the last {len(self.skipped_batches)} steps, up to step {step}, were "
            "skipped. Their batches have parts of these documents:\n  "
            + "\n  ".join(sorted(documents))
            + f"\nThe same command with --config.data.skip_batches='({numbers},)' resumes from the "
            "newest checkpoint without these batches. If steps are skipped again, the data is not "
            "the cause"
        )

    def record(self, logged: dict[str, Any] | None) -> None:
        """Keeps a record for the result and calls `on_log`. None: another process logs."""
        if logged is not None:
            self.metrics.append(logged)
            if self.on_log is not None:
                self.on_log(logged)

    def evaluation_is_due(self, evaluator: Evaluator) -> bool:
        """Whether an evaluation is due now: after every `every` steps, and after the last."""
        return self.done % evaluator.every == 0 or self.done == self.config.train.steps

    def save_is_due(self) -> bool:
        """Whether to save now: `checkpoint_every` steps or `checkpoint_minutes` have passed.

        The last step is always saved. The first process measures the minutes, at logged steps.
        """
        config = self.config.train
        if self.done % config.checkpoint_every == 0 or self.done == config.steps:
            return True
        if not config.checkpoint_minutes or self.done % config.log_every:
            return False
        passed = time.monotonic() - self.saved_at > 60 * config.checkpoint_minutes
        return processes.any_of_us(processes.is_first() and passed)

    def save(self) -> None:
        """Starts writing a checkpoint. A failure is reported, and training continues."""
        self.written()  # so that a failure of the previous checkpoint does not fail this one
        self.saved_at = time.monotonic()
        progress = RunProgress(self.next_batch, self.clock.run_began, self.clock.training_seconds)
        of_run = _files(self.stores)
        self.log.flush()
        try:
            if processes.once(lambda: restore_if_gone(self.workdir, self.config, *of_run)):
                self.log.say(
                    "the workdir was moved or deleted during training: it is written again from "
                    f"step {self.done} on"
                )
            self.checkpoints.save(self.done, items_of(self.state), progress._asdict())
            self.saved = self.done
        except CheckpointError as error:
            self.log.say(f"step {self.done}: {error}")

    def written(self) -> bool:
        """Waits until the checkpoint is written. False if that failed, which is reported."""
        try:
            self.checkpoints.wait()
        except CheckpointError as error:
            self.log.say(str(error))
            return False
        return True

    def evaluate(self, evaluators: Iterable[Evaluator]) -> None:
        """Runs evaluators and logs their values.

        Raises:
          ConfigError: if a value has a name that every record already has.
        """
        for evaluator in evaluators:
            with showing(f"evaluating the {evaluator.name}", processes.is_first()):
                values = evaluator.function(self.state.model)
            for name in ("step", "evaluator"):
                if name in values:
                    raise ConfigError(
                        f"evaluator {evaluator.name!r} returned a value named {name!r}, but every "
                        "record in metrics.jsonl already has that name: use another"
                    )
            self.record(self.log.write_evaluation(self.done, evaluator.name, values))

    def save_last(self) -> bool:
        """Saves the last step if it is not yet saved. Whether it is now written."""
        if self.saved != self.done:
            self.save()
        return self.written() and self.saved == self.done

    def result(self, status: str) -> TrainResult:
        return TrainResult(self.state.model, self.done, status, self.metrics)
