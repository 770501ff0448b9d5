"""The decay of each head, and the row normaliser that follows from it."""

import jax.numpy as jnp
import numpy as np

from retnet_jax.shapes import Array, Float, Int


def log_decay(
    rule: str, n_heads: int, decay_range: tuple[float, float], dtype: str = "float32"
) -> Float[Array, " h"]:
    """Log gamma of each head, computed in float64.

    Args:
      rule: "log_spaced": gamma = 1 - exp(linspace(log first, log last)), which with 1/32 and 1/512
        all experiments of the paper use (arXiv 2307.08621, 3.1). "powers_of_two":
        gamma = 1 - 2^(-5-h) (Eq. 8; torchscale and flash-linear-attention).
      n_heads: number of heads.
      decay_range: first and last 1 - gamma of "log_spaced".
      dtype: of the result.
    """
    if rule == "log_spaced":
        first, last = np.log(decay_range)
        complement = np.exp(np.linspace(first, last, n_heads))
    elif rule == "powers_of_two":
        complement = 2.0 ** (-5.0 - np.arange(n_heads))
    else:
        raise ValueError(f"decay rule {rule!r} is not one of 'log_spaced', 'powers_of_two'")
    return jnp.asarray(np.log1p(-complement), dtype)


def row_normalizer(
    log_decay: Float[Array, " h"], positions: Int[Array, "b t"]
) -> Float[Array, "b t h"]:
    """s_p^(-1/2) with s_p = sum_{i<=p} gamma^i, for position p in the document.

    Dividing retention's outputs by the root of the row sum of the decay mask keeps their variance
    the same at every position (arXiv 2307.08621, "Retention Score Normalization", the second). It
    depends on the position alone, so it is the same in all forms and for all chunk sizes.
    """
    lengths = (positions + 1)[..., None].astype(log_decay.dtype)
    # (1 - gamma^length) / (1 - gamma), without the cancellation as gamma nears 1.
    return jnp.sqrt(jnp.expm1(log_decay) / jnp.expm1(lengths * log_decay))
