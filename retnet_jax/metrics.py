"""What a run reports: metrics.jsonl, TensorBoard events, and a line or a bar on the terminal."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one device, by the start of `jax.Device.device_kind` (makers' data
# sheets). The first that matches counts.
PEAK_FLOPS = (
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU7x", 2307e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA B200", 2250e12),
)


def peak_flops(device: jax.Device) -> float:
    """FLOP/s that MFU is measured against: the data sheet's, or else a measured float32 product."""
    for kind, peak in PEAK_FLOPS:
        if device.device_kind.startswith(kind):
            return peak
    size = 1024
    x = jax.device_put(jnp.ones((size, size)), device)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


class MetricsLog:
    """Appends to metrics.jsonl and the TensorBoard events, and shows progress on stderr.

    On a terminal there is one bar with loss, tokens/s, MFU and the time left; elsewhere a plain
    line for each logged step.

    Args:
      workdir: of the run. Lines of steps after `first_step`, written before the run was cut off,
        are taken away; the steps will be run again.
      first_step: steps taken before.
      steps: steps of the whole run.
    """

    def __init__(self, workdir: Path, first_step: int, steps: int):
        from tensorboardX import SummaryWriter
        from tqdm import tqdm

        path = workdir / "metrics.jsonl"
        _keep_steps_up_to(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(workdir), purge_step=first_step + 1)
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True)
        self._steps = steps
        self._session = (first_step, time.perf_counter())

    def advance(self, step: int) -> None:
        """Moves the bar to a step that is done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Records the values of one step."""
        print(json.dumps({"step": step, **values}), file=self._file, flush=True)
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        shown = "  ".join(_SHOWN[name].format(values[name]) for name in values if name in _SHOWN)
        if self._bar is not None and "loss" in values:
            self._bar.set_postfix_str(shown)
        else:
            self.say(f"step {step}/{self._steps}  {shown}  {self._time_left(step)}")

    def say(self, message: str) -> None:
        """A line on stderr, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(message, file=sys.stderr)
        else:
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._file.close()
        self._events.close()
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


def _keep_steps_up_to(path: Path, last_step: int) -> None:
    """Drops later lines, and a last one that was cut off in the middle."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except ValueError:
            break
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text("".join(kept), encoding="utf-8")
    unfinished.rename(path)
