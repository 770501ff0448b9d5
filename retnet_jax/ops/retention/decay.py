"""The decay of each head: its powers, its gradient, and the row normaliser that follows from it."""

import jax.numpy as jnp
import numpy as np

from retnet_jax.ops.retention.document_index import Documents
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

    Log gamma is at most -2^-100. Nearer to 0 float32 has no normal numbers, and 0 is no decay of
    which `row_normalizer` can be computed; gamma is 1 to rounding either way.
    """
    if rule == "log_spaced":
        first, last = np.log(decay_range)
        complement = np.exp(np.linspace(first, last, n_heads))
    elif rule == "powers_of_two":
        complement = 2.0 ** (-5.0 - np.arange(n_heads))
    else:
        raise ValueError(f"decay rule {rule!r} is not one of 'log_spaced', 'powers_of_two'")
    return jnp.asarray(np.minimum(np.log1p(-complement), -(2.0**-100)), dtype)


def power_of_decay(log_decay, exponent, where=None):
    """gamma^exponent [b h ...] for exponents [b ...], 0 outside the mask `where`."""
    heads = log_decay.reshape(1, -1, *[1] * (exponent.ndim - 1))
    log_power = heads * jnp.expand_dims(exponent, 1).astype(heads.dtype)
    if where is not None:
        log_power = jnp.where(jnp.expand_dims(where, 1), log_power, -jnp.inf)
    return jnp.exp(log_power)


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
    one = jnp.expm1(log_decay)[None, None]
    return jnp.sqrt(one / jnp.expm1(lengths * log_decay[None, None]))


def decay_gradient(
    q: Float[Array, "b t h k"],
    d_q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    d_k: Float[Array, "b t h k"],
    final: Float[Array, "b h k v"],
    d_final: Float[Array, "b h k v"] | None,
    documents: Documents | None,
) -> Float[Array, " h"]:
    """The gradient of log_decay [h] from those of q, k and the final state: no pass of its own.

    With c_n the real tokens up to n, log gamma enters as gamma^(c_n - c_m) between a query n and a
    key m alone. So gamma^c_n is a factor of q_n, and gamma^-c_m one of k_m, and what such a factor
    of x does to the loss is x . d_x. The final state has the factor gamma^c of the last token; the
    initial one has gamma^0. `d_final=None` is 0. Where decays are not trained, XLA leaves all of
    this out.

    Sums that are nearly equal are subtracted. Of gradients that were rounded to bfloat16 the
    difference can be all rounding, as for gamma = 1/2 and inputs whose mean is 0: to train decays,
    give q, k and v in float32.
    """
    b, t = q.shape[:2]
    count = jnp.arange(1, t + 1, dtype=jnp.int32)[None] if documents is None else documents.count
    count = jnp.broadcast_to(count, (b, t)).astype(final.dtype)

    def pushed(x, d_x):
        return jnp.einsum("bthk,bthk->bth", x, d_x, preferred_element_type=final.dtype)

    at_tokens = jnp.einsum("bt,bth->h", count, pushed(q, d_q) - pushed(k, d_k))
    if d_final is None:
        return at_tokens
    return at_tokens + jnp.einsum("b,bhkv,bhkv->h", count[:, -1], final, d_final)
