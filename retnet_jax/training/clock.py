"""Where the time of a run goes: steps, waiting for data, checkpoints, evaluation, and the rest."""

import contextlib
import time
from collections.abc import Iterable, Iterator

import jax
import numpy as np

from retnet_jax.parallel.chips import chip


def peak_flops(devices: Iterable[jax.Device]) -> float | None:
    """FLOP/s of devices together by their data sheets; None if one has none, as every CPU."""
    known = [chip(device.device_kind) for device in devices]
    return None if None in known else sum(x.flops for x in known)


class Clock:
    """Measures training between logged steps.

    Args:
      tokens_per_step: of a whole batch.
      flops_per_token: model FLOPs, `ModelConfig.training_flops_per_token`.
      peak_flops: of all devices together, FLOP/s; None: not known, and no MFU is given.

    Attributes:
      run_began: when the run was first started, seconds since 1970.
      training_seconds: that the steps of the run took, those not counted that were lost.
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
        """Continues with the two numbers of a checkpoint."""
        self.run_began, self.training_seconds = run_began, training_seconds

    def start(self) -> None:
        """Begins to measure, before a step."""
        self._lap_began = self._last_step = time.perf_counter()
        self._paused = 0.0  # since the last step
        self._steps: list[float] = []
        self._waited = dict.fromkeys(("data", "checkpoint", "evaluation"), 0.0)

    @contextlib.contextmanager
    def waiting(self, reason: str) -> Iterator[None]:
        """What happens inside is put down to "data", "checkpoint" or "evaluation".

        The last two do not count as time of a step; a step that waits for data does take longer.
        """
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._waited[reason] += seconds
        if reason != "data":
            self._paused += seconds

    def step(self) -> None:
        """A step is done: its metrics have been read."""
        now = time.perf_counter()
        seconds = now - self._last_step - self._paused
        self._steps.append(seconds)
        self.training_seconds += seconds
        self._last_step, self._paused = now, 0.0

    def lap(self) -> dict[str, float]:
        """What was measured since the last lap.

        Returns:
          tokens_per_second and, where the peak is known, mfu (model FLOPs utilisation) of the
          steps; step_seconds_p50, p90 and max; data_wait, checkpoint_wait and evaluation_wait, as
          shares of all the time;
          training_seconds of all steps of the run; goodput, their share of the time since the run
          was first started, with what was lost and the time it was down.
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
