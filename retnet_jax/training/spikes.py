"""Steps that are skipped: not finite, or with a loss or a gradient far above what is usual.

A bad batch, or an update that was too large, shows as a loss or a gradient norm many deviations
above its recent mean. Such a step is skipped: parameters, optimiser and statistics stay as they
were. The statistics are part of the training state, so that a resumed run judges alike.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from retnet_jax.shapes import Array, Bool, Float, Int

_KEPT = 0.98  # of a running mean with each step: about the last 50 count
_FIRST_JUDGED = 50  # steps that are taken whatever they are, as long as they are finite
# Least deviations: of the loss in nats, of the norm's logarithm. Large gradient norms occur at
# ordinary losses: with 0.1 for the norm a step of the quickstart was skipped at a loss of 3.74 and
# a norm of 3.9. Clipping bounds such steps; with 0.5 only a norm of 150 times its mean, which is 10
# deviations, is skipped, and no step of the quickstart is (1,900 steps, one seed).
_LEAST_DEVIATION = (0.02, 0.5)


class UsualStep(NamedTuple):
    """Running statistics of the loss and of the logarithm of the gradient norm."""

    count: Int[Array, ""]  # steps they were taken from
    mean: Float[Array, " 2"]
    variance: Float[Array, " 2"]
    skipped: Int[Array, ""]  # steps skipped since the last one taken


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
    """Whether a step is to be taken, and the statistics after it.

    Args:
      usual: statistics of the steps before.
      loss: of this one.
      norm: of its gradient.
      deviations: skip the step if either exceeds its mean by this many standard deviations; 0: only
        one that is not finite.
      finite: whether the parameters after it are.
    """
    seen = jnp.stack([loss, jnp.log(norm)]).astype(jnp.float32)
    good = finite & jnp.isfinite(loss) & jnp.isfinite(norm)
    if deviations:
        deviation = jnp.maximum(jnp.sqrt(usual.variance), jnp.array(_LEAST_DEVIATION))
        high = (seen > usual.mean + deviations * deviation).any()
        good &= ~(high & (usual.count >= _FIRST_JUDGED))
    # In the beginning the mean of all; the variance is around the mean before.
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
