"""The story of a run: from a config and a directory to a trained model.

    result = train(config, "runs/mine")

The methods of `Run` stand in the order in which they are called. What is computed of the model
along the way is an `Evaluator`; the held-out loss (`held_out_loss.py`) is one.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from etils import epath

from retnet_jax.config import Config
from retnet_jax.config_text import summary
from retnet_jax.data import Batch, Stores, open_stores
from retnet_jax.data.batches import PlacedBatches
from retnet_jax.data.build import DEFAULT_COMMAND
from retnet_jax.errors import CheckpointError, ConfigError, DivergedError
from retnet_jax.files.paths import place
from retnet_jax.model import LanguageModel
from retnet_jax.parallel import processes
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.parallel.sharding import check_fit
from retnet_jax.pretrained import with_initial_model
from retnet_jax.runs.checkpoint import Checkpoints
from retnet_jax.runs.log import MetricsLog, NoLog
from retnet_jax.runs.workdir import locked, record_start, recorded_config, restore_if_gone
from retnet_jax.training.clock import Clock, peak_flops
from retnet_jax.training.held_out_loss import HeldOutLoss
from retnet_jax.training.start import RunProgress, check_finite, items_of, start_or_restore
from retnet_jax.training.step import StepMetrics, TrainState, abstract_state, make_step

Step = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]

HELD_OUT_LOSS = "held-out loss"  # the name of the evaluator that every run has


class Evaluator(NamedTuple):
    """What is computed of the model while it is trained, and logged.

    Its records in metrics.jsonl have its name: so a run that is resumed knows which evaluations
    are missing (`Run.make_missing_evaluations`).
    """

    name: str  # each evaluator has its own
    every: int  # steps between evaluations; there is one after the last step too
    function: Callable[[LanguageModel], Mapping[str, float]]  # values by the names they log under


class TrainResult(NamedTuple):
    """What `train` leaves in memory; the workdir has it too."""

    model: LanguageModel
    step: int  # steps taken in all
    status: str  # "finished", "stopped" by a signal, "diverged", or "unsaved"
    metrics: list[dict[str, Any]]  # what this call logged, one record as in metrics.jsonl each


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

    Ctrl-C and SIGTERM save and return ("stopped"); the same call resumes. In several processes
    each calls it alike.

    Args:
      config: what to train.
      workdir: directory of the run, new or begun.
      step: makes the compiled step of config, mesh and shapes of the state; None: `make_step`.
      evaluators: beside the held-out loss; what is due after the step that is resumed from, and
        not in metrics.jsonl, is evaluated first.
      on_log: called with each record of metrics.jsonl, in the first process.
      command: what builds the store of `config.data` by itself, for messages and its manifest.

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
        if step is None:
            compiled = make_step(config, state_shape)
        else:
            compiled = step(config, mesh, state_shape)
        # A store that does not exist is built by the first process.
        data = config.data, config.model.vocab_size, command
        processes.once(lambda: open_stores(*data))
        stores = open_stores(*data)
        of_run = stores.tokenizer, list(stores.stores.values())
        changes = processes.once(lambda: record_start(workdir, config, recorded, *of_run))
        stop = stack.enter_context(processes.stop_signals())
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = Checkpoints(
            workdir / "checkpoints", config.train.keep_checkpoints, config.train.keep_every
        )
        stack.enter_context(contextlib.closing(checkpoints))
        state, progress, damage = start_or_restore(config, mesh, state_shape, checkpoints, workdir)
        check_finite(state, config, workdir)
        of_log = workdir, int(state.step), config.train.steps, config.train.wandb
        log = processes.once(lambda: MetricsLog(*of_log)) or NoLog()
        stack.enter_context(contextlib.closing(log))
        log.begin(processes.facts())
        for change in changes or ():
            log.say(f"resumed with another {change}")
        for problem in damage:
            log.say(problem)
        log.say(summary(config))
        log.say(describe(config, stores, state, mesh))
        if config.profile.steps and config.profile.start <= int(state.step):
            log.say(
                f"nothing is traced: step profile.start={config.profile.start} is done already; "
                f"give one after {int(state.step)}"
            )
        held_out = HeldOutLoss(config, mesh, stores)
        evaluators = (Evaluator(HELD_OUT_LOSS, config.train.eval_every, held_out), *evaluators)
        run = Run(config, workdir, mesh, stores, compiled, checkpoints, log, evaluators, on_log)
        return run.run(state, progress, stop)


def check_names(evaluators: Iterable[Evaluator]) -> None:
    """Raises `ConfigError` if two evaluators share a name; the held-out loss is one of them."""
    counts = Counter([HELD_OUT_LOSS, *(evaluator.name for evaluator in evaluators)])
    for name, count in counts.items():
        if count > 1:
            raise ConfigError(
                f"{count} evaluators have the name {name!r}, by which metrics.jsonl tells whose a "
                "record is: give each a name of its own"
            )


def describe(config: Config, stores: Stores, state: TrainState, mesh: jax.sharding.Mesh) -> str:
    """What is about to be trained, in a few lines."""
    tokens = config.train.batch_size * config.data.sequence_length
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    shares = stores.weights / stores.weights.sum()
    several = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    rows = config.train.batch_size // config.train.micro_batches
    runs = state.model.mixer_type.implementation(config.model, (rows, config.data.sequence_length))
    return (
        f"{type(state.model).__name__} of {config.model.parameter_count():,} parameters, "
        f"{jax.devices()[0].device_kind} mesh {axes}{several}\n"
        f"steps {state.step} to {config.train.steps} of {tokens:,} tokens in "
        f"{config.data.windows} windows; {runs}"
        + "".join(
            f"\n{share:7.1%} of {store.directory}: {store.train.token_count:,} tokens in "
            f"{len(store.train):,} documents{'' if store.has_block_digests else _UNVERIFIED}"
            for share, store in zip(shares, stores.stores.values(), strict=True)
        )
    )


_UNVERIFIED = (
    "; it was built without digests, so damaged tokens would not be noticed: build it again to "
    "have them"
)


class Run:
    """The loop, and what it works with.

    Args:
      config: what is trained.
      workdir: of the run.
      mesh: the devices; it is to be set while the run lasts.
      stores: the data.
      step: the compiled step.
      checkpoints: of the run.
      log: of the run.
      evaluators: what is computed of the model along the way.
      on_log: as of `train`.
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
        self.step = step
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
        self.skipped_batches: list[int] = []  # of the latest steps, if these were skipped

    def run(
        self, state: TrainState, progress: RunProgress, stop: processes.StopRequest
    ) -> TrainResult:
        """Trains from a state to the last step, or until a stop is requested; saves; says so."""
        self.begin(state, progress)
        self.make_missing_evaluations()
        try:
            self.advance(self.config.train.steps, stop)
        except DivergedError as error:
            self.log.say(str(error))
            return self.result("diverged")
        except ConfigError:  # a batch cannot be read
            if jax.process_count() == 1:  # else the others are in the next step
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
        return self.result("finished" if finished else "stopped")

    def begin(self, state: TrainState, progress: RunProgress) -> None:
        """Takes over a state."""
        self.state = state
        self.done = self.saved = int(state.step)
        self.saved_at = time.monotonic()
        self.next_batch = progress.next_batch
        self.clock.restore(progress.run_began, progress.training_seconds)
        self.unread: tuple[int, int, StepMetrics] | None = None  # step, batch and its metrics

    def make_missing_evaluations(self) -> None:
        """Evaluates what is due after the step resumed from and has no record in metrics.jsonl.

        A checkpoint is saved before the evaluations of its step, and a run may be killed between
        the two. With this its records are those of a run that was not killed, in the same order.

        What is due depends on this start alone: a new evaluator, or one with another `every`,
        evaluates this step as well, but none before it. An evaluation that raised an error does so
        again here, until it is left out or has the memory that it needs (for the held-out loss,
        more `train.micro_batches`).
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
                f"metrics.jsonl has an evaluation of step {self.done} that does not name its "
                "evaluator, as older versions wrote them: that step is not evaluated again"
            )
            return
        names = ", ".join(x.name for x in missing)
        self.log.say(f"step {self.done} was not evaluated by {names}: that comes first")
        self.evaluate(missing)

    def advance(self, last: int, stop: processes.StopRequest) -> None:
        """Takes steps up to `last`, or until a stop is requested, with all that is due after each.

        A checkpoint is saved before the evaluation of the same step, which may fail for want of
        memory; a run that is killed between the two evaluates first when it is resumed.

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

    def take_step(self, batches: Iterable[tuple[int, Batch]]) -> None:
        """Begins a step, and reads the metrics of the one before while it runs."""
        with self.clock.waiting("data"):
            number, batch = next(batches)
        self.state, metrics = self.step(self.state, batch)
        self.read()
        self.done, self.next_batch = self.done + 1, number + 1
        self.unread = self.done, number, metrics

    def read(self) -> None:
        """Waits for the step whose metrics have not been read, judges it, and logs it if due.

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
            self.log.say(
                f"step {step} is skipped: on batch {batch} the loss is {values['loss']:.4g}, "
                f"the norm of its gradient {values['gradient_norm']:.4g}"
            )
        if skipped >= self.config.train.max_skipped:
            raise DivergedError(self._divergence(step))
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            self.record(self.log.write(step, values | self.clock.lap()))

    def _divergence(self, step: int) -> str:
        documents = {
            name for batch in self.skipped_batches for name in self.batches.document_names(batch)
        }
        numbers = ",".join(map(str, self.skipped_batches))
        return (
            f"the last {len(self.skipped_batches)} steps, up to step {step}, were skipped, and no "
            "checkpoint has them. Their batches held parts of\n  "
            + "\n  ".join(sorted(documents))
            + f"\nThe same command with --config.data.skip_batches='({numbers},)' resumes from the "
            "newest checkpoint without them; if the same happens then, it is not the data"
        )

    def record(self, logged: dict[str, Any] | None) -> None:
        """Keeps and passes on what was logged; None: this is not the process that logs."""
        if logged is not None:
            self.metrics.append(logged)
            if self.on_log is not None:
                self.on_log(logged)

    def save_is_due(self) -> bool:
        """Whether it is a step to save at, the last one, or `checkpoint_minutes` have passed.

        The first process tells the time, at logged steps.
        """
        config = self.config.train
        if self.done % config.checkpoint_every == 0 or self.done == config.steps:
            return True
        if not config.checkpoint_minutes or self.done % config.log_every:
            return False
        passed = time.monotonic() - self.saved_at > 60 * config.checkpoint_minutes
        return processes.any_of_us(processes.is_first() and passed)

    def save(self) -> None:
        """Begins a checkpoint. A failure is reported, and training continues."""
        self.written()  # the one before; its failure should not cost this one
        self.saved_at = time.monotonic()
        progress = RunProgress(self.next_batch, self.clock.run_began, self.clock.training_seconds)
        of_run = self.stores.tokenizer, list(self.stores.stores.values())
        self.log.flush()
        try:
            if processes.once(lambda: restore_if_gone(self.workdir, self.config, *of_run)):
                self.log.say(
                    "the workdir was moved or deleted while training: it is written again from "
                    f"step {self.done} on"
                )
            self.checkpoints.save(self.done, items_of(self.state), progress._asdict())
            self.saved = self.done
        except CheckpointError as error:
            self.log.say(f"step {self.done}: {error}")

    def written(self) -> bool:
        """Waits for a checkpoint that was begun; False, and a message, if it failed."""
        try:
            self.checkpoints.wait()
        except CheckpointError as error:
            self.log.say(str(error))
            return False
        return True

    def evaluation_is_due(self, evaluator: Evaluator) -> bool:
        """After every `every` steps, and after the last."""
        return self.done % evaluator.every == 0 or self.done == self.config.train.steps

    def evaluate(self, evaluators: Iterable[Evaluator]) -> None:
        """Logs what evaluators compute of the model.

        Raises:
          ConfigError: if one gives a value a name that each record has already.
        """
        for evaluator in evaluators:
            values = evaluator.function(self.state.model)
            for name in ("step", "evaluator"):
                if name in values:
                    raise ConfigError(
                        f"the evaluator {evaluator.name!r} has a value of the name {name!r}, which "
                        "each record in metrics.jsonl has already: give it another name"
                    )
            self.record(self.log.write_evaluation(self.done, evaluator.name, values))

    def save_last(self) -> bool:
        """Saves the last step if it is not yet saved; whether it is written."""
        if self.saved != self.done:
            self.save()
        return self.written() and self.saved == self.done

    def result(self, status: str) -> TrainResult:
        return TrainResult(self.state.model, self.done, status, self.metrics)
