"""Decides which steps are skipped: those that are not finite, and those that are spikes.

A spike is a loss or a gradient norm many standard deviations above its recent mean: the sign of a
bad batch, or of an update that was too large. A skipped step leaves parameters, optimiser and
statistics as they were. The statistics are part of the training state, so a resumed run skips the
same steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from retnet_jax.shapes import Array, Bool, Float, Int

_KEPT = 0.98  # decay of the running means: about the last 50 steps count
_FIRST_JUDGED = 50  # spikes are skipped only after this many steps
# The smallest and the largest deviations used, of the loss in nats and of the logarithm of the
# gradient norm; see `judge`.
_LEAST_DEVIATION = (0.02, 0.229)
_MOST_DEVIATION = (0.25, 0.229)


class UsualStep(NamedTuple):
    """Running statistics of the loss and of the logarithm of the gradient norm."""

    count: Int[Array, ""]  # number of steps in the statistics
    mean: Float[Array, " 2"]
    variance: Float[Array, " 2"]
    skipped: Int[Array, ""]  # consecutive steps skipped up to now


def nothing_yet() -> UsualStep:
    """The statistics before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return UsualStep(zero, jnp.zeros(2), jnp.zeros(2), zero)


def judge(
    usual: UsualStep,
    loss: Float[Array, ""],
    norm: Float[Array, ""],
    deviations: float,
    finite: Bool[Array, ""],
) -> tuple[Bool[Array, ""], UsualStep]:
    """Decides whether a step is taken, and updates the statistics.

    A step that is not finite is skipped. So is, after the first 50 steps, one whose loss or
    gradient norm exceeds its running mean by more than `deviations` deviations. With 10 deviations:

    - A loss 3 nats above its mean is always skipped: a deviation counts as at most 0.25 nats,
      however much the loss varies from batch to batch. It counts as at least 0.02 nats, because a
      large batch has so little noise that ordinary losses would be many deviations away.
    - A gradient norm of 10 times its mean is always skipped, and none below 9.8 times. A deviation
      of its logarithm is always 0.229: the measured one says nothing of the ordinary batches, a few
      in 1,000, whose norm is 2 to 4 times the mean.

    Args:
      usual: Statistics of the previous steps.
      loss: Loss of this step.
      norm: Norm of its gradient.
      deviations: `train.spike_deviations`; 0: only a step that is not finite is skipped.
      finite: Whether the parameters after the step are finite.

    Returns:
      True if the step is taken, and the statistics after it.
    """
    seen = jnp.stack([loss, jnp.log(norm)]).astype(jnp.float32)
    good = finite & jnp.isfinite(loss) & jnp.isfinite(norm)
    if deviations:
        deviation = jnp.clip(
            jnp.sqrt(usual.variance), jnp.array(_LEAST_DEVIATION), jnp.array(_MOST_DEVIATION)
        )
        high = (seen > usual.mean + deviations * deviation).any()
        good &= ~(high & (usual.count >= _FIRST_JUDGED))
    # A plain mean at the beginning. Distances are from the mean before this step.
    share = jnp.maximum(1 - _KEPT, 1 / (usual.count + 1))
    distance = jnp.where(jnp.isfinite(seen), seen - usual.mean, 0.0)
    taken = UsualStep(
        count=usual.count + 1,
        mean=usual.mean + share * distance,
        variance=(1 - share) * (usual.variance + share * jnp.square(distance)),
        skipped=jnp.zeros((), jnp.int32),
    )
    skipped = usual._replace(skipped=usual.skipped + 1)
    return good, jax.tree.map(lambda a, b: jnp.where(good, a, b), taken, skipped)
