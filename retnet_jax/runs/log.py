"""The log of a run: metrics.jsonl, TensorBoard, Weights & Biases, and the terminal."""

import math
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from retnet_jax.errors import ConfigError, brief
from retnet_jax.files import atomic
from retnet_jax.runs.json_lines import JsonLines, records_in

HELD_OUT_LOSS = "held-out loss"  # name of the evaluator that every run has


class MetricsLog:
    """Appends to metrics.jsonl and the TensorBoard events, and shows progress on stderr.

    A terminal shows a progress bar with loss, tokens/s, MFU and the time left. Elsewhere each
    logged step is a plain line.

    Args:
      workdir: Directory of the run. Records of steps after `first_step`, left by a run that was cut
        off, are deleted from its log: these steps will be run again.
      first_step: Number of steps already taken.
      steps: Number of steps of the whole run.
      wandb: Weights & Biases project that also gets the metrics; "": none.
    """

    def __init__(self, workdir: epath.PathLike, first_step: int, steps: int, wandb: str = ""):
        from tensorboardX import SummaryWriter
        from tqdm import tqdm

        workdir = epath.Path(workdir)
        self._bar = None
        self._wandb = _WeightsAndBiases(wandb, workdir, self.say) if wandb else None
        self._path = workdir / "metrics.jsonl"
        self._lines = JsonLines(self._path, self.say, first_step)
        self._starts = JsonLines(workdir / "starts.jsonl", self.say)
        self._events = SummaryWriter(str(workdir), purge_step=first_step + 1)
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._steps = steps
        self._session = (first_step, time.perf_counter())

    def begin(self, facts: dict[str, Any]) -> None:
        """Adds a record of this start to starts.jsonl."""
        self._starts.append({"time": time.time(), "step": self._session[0], **facts})

    def evaluators_at(self, step: int) -> set[str | None]:
        """The names of the evaluators that have a record for a step in metrics.jsonl.

        None stands for a record without a name, which an older version wrote.
        """
        records = [x for x in records_in(self._path) if x["step"] == step]
        return {x.get("evaluator") for x in records if "evaluator" in x or "loss" not in x}

    def advance(self, step: int) -> None:
        """Moves the progress bar to a finished step."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, step: int, values: Mapping[str, float]) -> dict[str, Any] | None:
        """Writes and returns a record of one step; values that are not finite are None in it."""
        return self._write({"step": step}, values)

    def write_evaluation(
        self, step: int, evaluator: str, values: Mapping[str, float]
    ) -> dict[str, Any] | None:
        """Like `write`, for the values of an evaluator; the record has the evaluator's name."""
        return self._write({"step": step, "evaluator": evaluator}, values)

    def _write(self, about: dict[str, Any], values: Mapping[str, float]) -> dict[str, Any]:
        step = about["step"]
        record = about | {name: x if math.isfinite(x) else None for name, x in values.items()}
        self._lines.append(record)
        curves = {_curve(about.get("evaluator"), name): x for name, x in values.items()}
        for name, value in curves.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(curves, step=step)
        shown = "  ".join(_SHOWN[name].format(values[name]) for name in values if name in _SHOWN)
        if self._bar is not None and "loss" in values:
            self._bar.set_postfix_str(shown)
        else:
            self.say(f"step {step}/{self._steps}  {shown}  {self._time_left(step)}")
        return record

    def say(self, message: str) -> None:
        """Prints a line on stderr, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Writes waiting records. Call it before a checkpoint, from which a run may resume."""
        self._lines.flush()
        self._starts.flush()

    def close(self) -> None:
        self.flush()
        self._events.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._bar is not None:
            self._bar.close()

    def _time_left(self, step: int) -> str:
        first_step, start = self._session
        if step <= first_step:
            return ""
        seconds = (time.perf_counter() - start) / (step - first_step) * (self._steps - step)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"


def _curve(evaluator: str | None, name: str) -> str:
    """The name of a value in TensorBoard and Weights & Biases.

    A value of an evaluator has the evaluator's name before its own, so values of two evaluators are
    never one curve. Those of the evaluator that every run has keep their names.
    """
    if evaluator not in (None, HELD_OUT_LOSS):
        name = f"{evaluator}/{name}"
    return re.sub(r"[^-/\w.]", "_", name, flags=re.ASCII)  # TensorBoard allows no others


_SHOWN = {
    "loss": "loss {:.4f}",
    "held_out_loss": "held-out loss {:.4f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
}


class NoLog:
    """The log in all processes but the first: it does nothing."""

    def begin(self, facts: dict[str, Any]) -> None:
        pass

    def evaluators_at(self, step: int) -> set[str | None]:
        return set()

    def advance(self, step: int) -> None:
        pass

    def write(self, step: int, values: Mapping[str, float]) -> dict[str, Any] | None:
        pass

    def write_evaluation(
        self, step: int, evaluator: str, values: Mapping[str, float]
    ) -> dict[str, Any] | None:
        pass

    def say(self, message: str) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class _WeightsAndBiases:
    """The metrics of a run at Weights & Biases. If it fails, training continues without it.

    Args:
      project: Project that the run belongs to.
      workdir: Directory of the run. It stores the run's id, under which it is resumed.
      say: Called with error messages.

    Raises:
      ConfigError: if the package is missing or cannot be started.
    """

    def __init__(self, project: str, workdir: epath.Path, say: Callable[[str], object]):
        try:
            import wandb  # pyright: ignore[reportMissingImports] (optional)
        except ImportError:
            raise ConfigError(
                f"train.wandb={project!r} needs the package wandb: pip install wandb"
            ) from None
        path = workdir / "wandb_id"
        if not path.exists():
            atomic.write_text(path, uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.name,
                id=path.read_text(),
                resume="allow",
                dir=str(workdir),
            )
        except Exception as error:  # it has many kinds of errors, and so has its network
            raise ConfigError(
                f"train.wandb={project!r}: Weights & Biases did not start "
                f"({type(error).__name__}: {brief(error)}); log in with `wandb login`, set "
                "WANDB_MODE=offline, or leave train.wandb out"
            ) from error
        self._say = say

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends the values of a step."""
        self._try(lambda run: run.log(dict(values), step=step))

    def finish(self) -> None:
        """Sends the remaining values."""
        self._try(lambda run: run.finish())

    def _try(self, action: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            self._run = None
            self._say(
                f"Weights & Biases failed ({type(error).__name__}: {brief(error)}); training "
                "continues without it, and metrics.jsonl has everything"
            )
