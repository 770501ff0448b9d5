"""The clamp of the row sums of retention's scores: for parity with torchscale, nothing else."""

import jax
import jax.numpy as jnp

from retnet_jax.ops.retention.document_index import Documents
from retnet_jax.ops.retention.xla import decay_mask
from retnet_jax.shapes import Array, Float


def score_clamp(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    log_decay: Float[Array, " h"],
    row_scale: Float[Array, "b t h"] | None,
    documents: Documents | None,
    rule: str,
) -> Float[Array, "b t h"]:
    """1 / z, with which torchscale's parallel form multiplies the output at each position.

    z is a row sum of the scores A_nm = (q_n . k_m) gamma^(n-m) / sqrt(s_n), taken as a constant in
    the gradient (arXiv 2307.08621, "Retention Score Normalization", the third):

        "absolute": clamp(sum_m |A_nm|, 1, 50000)        "signed": max(|sum_m A_nm|, 1)

    It depends on all scores before, so there is no recurrent form of it. A norm over v follows, so
    it acts through the epsilon of that norm alone, and guards the range of float16. O(t^2) memory.

    Args:
      q: queries, rotated and scaled, as for `retention`.
      k: keys.
      log_decay: log gamma of each head.
      row_scale: s_n^(-1/2), as from `row_normalizer`; None: 1.
      documents: documents and padding, as from `number_documents`.
      rule: "absolute" (torchscale since October 2023, syncdoth) or "signed" (before).
    """
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=log_decay.dtype)
    scores *= decay_mask(log_decay, q.shape[1], documents)
    if row_scale is not None:
        scores *= row_scale.swapaxes(1, 2)[..., None]
    if rule == "absolute":
        z = jnp.clip(jnp.abs(scores).sum(-1), 1, 5e4)
    else:
        z = jnp.maximum(jnp.abs(scores.sum(-1)), 1)
    return jax.lax.stop_gradient(1 / z).swapaxes(1, 2)
