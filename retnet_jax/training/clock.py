"""Measures the time of a run: in steps, waiting for data, in checkpoints and in evaluation."""

import contextlib
import time
from collections.abc import Iterable, Iterator

import numpy as np

from retnet_jax.parallel.chips import chip
from retnet_jax.parallel.mesh import Device


def peak_flops(devices: Iterable[Device]) -> float | None:
    """Peak FLOP/s of all devices together; None if one has no data sheet, such as a CPU."""
    known = [chip(device.device_kind) for device in devices]
    flops = [x.flops for x in known if x is not None]
    return sum(flops) if len(flops) == len(known) else None


class Clock:
    """Measures training between logged steps.

    Args:
      tokens_per_step: Tokens in a whole batch.
      flops_per_token: Model FLOPs (`ModelConfig.training_flops_per_token`).
      peak_flops: FLOP/s of all devices together; None: unknown, and no MFU is reported.

    Attributes:
      run_began: Time of the run's first start, in seconds since 1970.
      training_seconds: Seconds spent in the steps of the run. A step that was lost and repeated
        counts once.
    """

    def __init__(
        self,
        tokens_per_step: int,
        flops_per_token: float,
        peak_flops: float | None,
    ):
        self._tokens_per_step = tokens_per_step
        self._peak_tokens_per_second = None if peak_flops is None else peak_flops / flops_per_token
        self.restore(time.time(), 0.0)
        self.start()

    def restore(self, run_began: float, training_seconds: float) -> None:
        """Continues from the two numbers in a checkpoint."""
        self.run_began, self.training_seconds = run_began, training_seconds

    def start(self) -> None:
        """Starts measuring. Call it before a step."""
        self._lap_began = self._last_step = time.perf_counter()
        self._paused = 0.0  # since the last step
        self._steps: list[float] = []
        self._waited: dict[str, float] = dict.fromkeys(("data", "checkpoint", "evaluation"), 0.0)

    @contextlib.contextmanager
    def waiting(self, reason: str) -> Iterator[None]:
        """Counts the time inside the `with` as "data", "checkpoint" or "evaluation".

        Waiting for data is part of a step's time; checkpoints and evaluations are not.
        """
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._waited[reason] += seconds
        if reason != "data":
            self._paused += seconds

    def step(self) -> None:
        """Records that a step is done: its metrics have been read."""
        now = time.perf_counter()
        seconds = now - self._last_step - self._paused
        self._steps.append(seconds)
        self.training_seconds += seconds
        self._last_step, self._paused = now, 0.0

    def lap(self) -> dict[str, float]:
        """The measurements since the last lap.

        Returns:
          tokens_per_second and, where the peak is known, mfu (model FLOPs utilisation) of the
          steps; step_seconds_p50, p90 and max; data_wait, checkpoint_wait and evaluation_wait, as
          shares of the elapsed time; training_seconds of all steps of the run; goodput, the share
          of training_seconds in the time since the run's first start, which includes lost steps
          and downtime.
        """
        now, seconds = time.perf_counter(), sum(self._steps)
        speed = len(self._steps) * self._tokens_per_step / seconds
        middle, high, longest = np.quantile(self._steps, [0.5, 0.9, 1.0]).tolist()
        found = {"tokens_per_second": speed}
        if self._peak_tokens_per_second is not None:
            found["mfu"] = speed / self._peak_tokens_per_second
        found |= {
            "step_seconds_p50": middle,
            "step_seconds_p90": high,
            "step_seconds_max": longest,
        }
        elapsed = now - self._lap_began
        found |= {f"{reason}_wait": x / elapsed for reason, x in self._waited.items()}
        found["training_seconds"] = self.training_seconds
        # The system's clock may have been set back since the run began.
        found["goodput"] = self.training_seconds / max(
            time.time() - self.run_began, self.training_seconds
        )
        last_step, paused = self._last_step, self._paused
        self.start()
        self._last_step, self._paused = last_step, paused
        return found
