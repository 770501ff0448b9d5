"""The gradient of log gamma, from those of q and k: no pass over the tokens of its own."""

import jax.numpy as jnp

from retnet_jax.ops.retention.document_index import Documents
from retnet_jax.shapes import Array, Float


def decay_gradient(
    q: Float[Array, "b t h k"],
    d_q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    d_k: Float[Array, "b t h k"],
    final: Float[Array, "b h k v"],
    d_final: Float[Array, "b h k v"] | None,
    row: Documents | None,
) -> Float[Array, " h"]:
    """The gradient of log_decay [h] from those of q, k and the final state.

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
    count = jnp.arange(1, t + 1, dtype=jnp.int32)[None] if row is None else row.count
    count = jnp.broadcast_to(count, (b, t)).astype(final.dtype)

    def pushed(x, d_x):
        return jnp.einsum("bthk,bthk->bth", x, d_x, preferred_element_type=final.dtype)

    at_tokens = jnp.einsum("bt,bth->h", count, pushed(q, d_q) - pushed(k, d_k))
    if d_final is None:
        return at_tokens
    return at_tokens + jnp.einsum("b,bhkv,bhkv->h", count[:, -1], final, d_final)
