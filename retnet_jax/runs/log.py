"""What a run reports: metrics.jsonl, TensorBoard, Weights & Biases, and the terminal."""

import json
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from retnet_jax.errors import ConfigError


class MetricsLog:
    """Appends to metrics.jsonl and the TensorBoard events, and shows progress on stderr.

    On a terminal there is one bar with loss, tokens/s, MFU and the time left; elsewhere a plain
    line for each logged step.

    Args:
      workdir: of the run. Lines of steps after `first_step`, written before the run was cut off,
        are taken away; the steps will be run again.
      first_step: steps taken before.
      steps: steps of the whole run.
      wandb: project of Weights & Biases that gets the metrics too; "": none.
    """

    def __init__(self, workdir: epath.PathLike, first_step: int, steps: int, wandb: str = ""):
        from tensorboardX import SummaryWriter
        from tqdm import tqdm

        workdir = epath.Path(workdir)
        self._lines = _Lines(workdir / "metrics.jsonl", first_step)
        self._starts = _Lines(workdir / "starts.jsonl")
        self._events = SummaryWriter(str(workdir), purge_step=first_step + 1)
        self._wandb = _wandb_run(wandb, workdir) if wandb else None
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._steps = steps
        self._session = (first_step, time.perf_counter())

    def begin(self, facts: dict[str, Any]) -> None:
        """Records a start in starts.jsonl."""
        self._starts.append({"time": time.time(), "step": self._session[0], **facts})

    def advance(self, step: int) -> None:
        """Moves the bar to a step that is done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, step: int, values: Mapping[str, float]) -> dict[str, Any] | None:
        """Records the values of one step, and returns the record: None for what is not finite."""
        finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
        record = {"step": step, **finite}
        self._lines.append(record)
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        shown = "  ".join(_SHOWN[name].format(values[name]) for name in values if name in _SHOWN)
        if self._bar is not None and "loss" in values:
            self._bar.set_postfix_str(shown)
        else:
            self.say(f"step {step}/{self._steps}  {shown}  {self._time_left(step)}")
        return record

    def say(self, message: str) -> None:
        """A line on stderr, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
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


_SHOWN = {
    "loss": "loss {:.4f}",
    "held_out_loss": "held-out loss {:.4f}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
}


class NoLog:
    """The log of all processes but the first: none."""

    def begin(self, facts: dict[str, Any]) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def write(self, step: int, values: Mapping[str, float]) -> dict[str, Any] | None:
        pass

    def say(self, message: str) -> None:
        pass

    def close(self) -> None:
        pass


class _Lines:
    """A file of JSON lines that grows; on object stores it is written anew each time.

    Args:
      path: of the file.
      last_step: lines of later steps are dropped; None: of none. A last line that was cut off in
        the middle is, always.
    """

    def __init__(self, path: epath.Path, last_step: int | None = None):
        self._path = path
        self.records: list[dict[str, Any]] = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                break
            if last_step is None or record["step"] <= last_step:
                self.records.append(record)
        if path.exists():
            unfinished = path.with_name(path.name + ".unfinished")
            unfinished.write_text(self._text(self.records))
            unfinished.replace(path)

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if "://" in str(self._path):
            self._path.write_text(self._text(self.records))
        else:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(self._text([record]))

    @staticmethod
    def _text(records: list[dict[str, Any]]) -> str:
        return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


def _wandb_run(project: str, workdir: epath.Path):
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"train.wandb={project!r} needs the package wandb: pip install wandb"
        ) from None
    name = workdir.name
    return wandb.init(project=project, name=name, id=name, resume="allow", dir=str(workdir))
