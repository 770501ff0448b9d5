"""The decay of each head: its powers, its gradient, and the row normaliser that follows from it."""

import jax.numpy as jnp
import numpy as np

from retnet_jax.ops.retention.document_index import Documents
from retnet_jax.shapes import Array, Float, Int, Keys, LogDecay, Queries, RetentionMatrix


def log_decay(
    rule: str, n_heads: int, decay_range: tuple[float, float], dtype: str = "float32"
) -> LogDecay:
    """Log gamma of each head, computed in float64.

    Args:
      rule: "log_spaced": gamma = 1 - exp(linspace(log first, log last)). All experiments of the
        paper use it with 1/32 and 1/512 (arXiv 2307.08621, 3.1). "powers_of_two":
        gamma = 1 - 2^(-5-h) (Eq. 8; torchscale and flash-linear-attention). "none": gamma = 1,
        so that the row normaliser of position p is (p + 1)^(-1/2).
      n_heads: Number of heads.
      decay_range: First and last 1 - gamma of "log_spaced"; equal ones give all heads one gamma.
      dtype: Dtype of the result.

    Log gamma is at most -2^-100, also for "none": nearer to 0 float32 has no normal numbers, and
    `row_normalizer` would divide by 0. gamma, its powers and (1 - gamma) S round as they do for 0.
    """
    if rule == "log_spaced":
        first, last = np.log(decay_range)
        complement = np.exp(np.linspace(first, last, n_heads))
    elif rule == "powers_of_two":
        complement = 2.0 ** (-5.0 - np.arange(n_heads))
    elif rule == "none":
        complement = np.zeros(n_heads)
    else:
        raise ValueError(f"decay rule {rule!r} is not one of 'log_spaced', 'powers_of_two', 'none'")
    return jnp.asarray(np.minimum(np.log1p(-complement), -(2.0**-100)), dtype)


def power_of_decay(log_decay, exponent, where=None):
    """gamma^exponent [b h ...] for exponents [b ...], 0 outside the mask `where`."""
    heads = log_decay.reshape(1, -1, *[1] * (exponent.ndim - 1))
    log_power = heads * jnp.expand_dims(exponent, 1).astype(heads.dtype)
    if where is not None:
        log_power = jnp.where(jnp.expand_dims(where, 1), log_power, -jnp.inf)
    return jnp.exp(log_power)


def row_normalizer(log_decay: LogDecay, positions: Int[Array, "b t"]) -> Float[Array, "b t h"]:
    """s_p^(-1/2) with s_p = sum_{i<=p} gamma^i, for position p in the document.

    s_p is the row sum of the decay mask. Dividing retention's outputs by its root keeps their
    variance the same at every position (arXiv 2307.08621, "Retention Score Normalization", the
    second). It depends only on the position, so it is the same in all forms and chunk sizes.
    """
    lengths = (positions + 1)[..., None].astype(log_decay.dtype)
    # (1 - gamma^length) / (1 - gamma), without the cancellation as gamma nears 1.
    one = jnp.expm1(log_decay)[None, None]
    return jnp.sqrt(one / jnp.expm1(lengths * log_decay[None, None]))


def decay_gradient(
    q: Queries,
    d_q: Queries,
    k: Keys,
    d_k: Keys,
    final: RetentionMatrix,
    d_final: RetentionMatrix | None,
    documents: Documents | None,
) -> LogDecay:
    """The gradient of log_decay [h], from the gradients of q, k and the final state.

    With c_n the number of real tokens up to n, log gamma enters only as gamma^(c_n - c_m) between a
    query n and a key m: as a factor gamma^c_n of q_n, and gamma^-c_m of k_m. The derivative of the
    loss by the logarithm of a factor of x is x . d_x. The final state has the factor gamma^c of the
    last token, the initial state gamma^0. `d_final=None` is 0. Where decays are not trained, XLA
    removes this computation.

    It subtracts sums that are nearly equal. If the gradients were rounded to bfloat16, the
    difference can be nothing but rounding errors, as for gamma = 1/2 and inputs of mean 0. To train
    decays, pass q, k and v in float32.
    """
    b, t = q.shape[:2]
    count = jnp.arange(1, t + 1, dtype=jnp.int32)[None] if documents is None else documents.count
    count = jnp.broadcast_to(count, (b, t)).astype(final.dtype)

    def inner(x, d_x):
        return jnp.einsum("bthk,bthk->bth", x, d_x, preferred_element_type=final.dtype)

    at_tokens = jnp.einsum("bt,bth->h", count, inner(q, d_q) - inner(k, d_k))
    if d_final is None:
        return at_tokens
    return at_tokens + jnp.einsum("b,bhkv,bhkv->h", count[:, -1], final, d_final)
