"""The clamp on the row sums of retention's scores, which exists for parity with torchscale only."""

import jax
import jax.numpy as jnp

from retnet_jax.ops.retention.document_index import Documents
from retnet_jax.ops.retention.xla import decay_mask
from retnet_jax.shapes import Array, Float, Keys, LogDecay, Queries


def score_clamp(
    q: Queries,
    k: Keys,
    log_decay: LogDecay,
    row_scale: Float[Array, "b t h"] | None,
    documents: Documents | None,
    rule: str,
) -> Float[Array, "b t h"]:
    """1 / z, with which torchscale's parallel form multiplies the output at each position.

    z is a row sum of the scores A_nm = (q_n . k_m) gamma^(n-m) / sqrt(s_n), a constant in the
    gradient (arXiv 2307.08621, "Retention Score Normalization", the third):

        "absolute": clamp(sum_m |A_nm|, 1, 50000)        "signed": max(|sum_m A_nm|, 1)

    z needs all scores of a row, so it has no recurrent form, and takes O(t^2) memory. A norm over v
    follows and cancels 1 / z except for that norm's epsilon; in float16 it prevents overflow.

    Args:
      q: Queries, rotated and scaled, as for `retention`.
      k: Keys.
      log_decay: Log gamma of each head.
      row_scale: The factor s_n^(-1/2) from `row_normalizer`; None: 1.
      documents: Documents and padding, as from `number_documents`.
      rule: "absolute" (torchscale since October 2023, syncdoth) or "signed" (torchscale before).
    """
    # scores [b h t s], z [b h t]
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=log_decay.dtype)
    scores *= decay_mask(log_decay, q.shape[1], documents)
    if row_scale is not None:
        scores *= row_scale.swapaxes(1, 2)[..., None]
    if rule == "absolute":
        z = jnp.clip(jnp.abs(scores).sum(-1), 1, 5e4)
    else:
        z = jnp.maximum(jnp.abs(scores.sum(-1)), 1)
    return jax.lax.stop_gradient(1 / z).swapaxes(1, 2)
