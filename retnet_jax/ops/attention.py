"""Softmax attention in XLA, with all scores at once: the reference of the kernels.

`attend_to_all` is for whole rows, `attend_to_cache` for tokens after those of a cache.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from retnet_jax.shapes import Array, Bool, Float


def attend_to_all(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    mask: Bool[Array, "b 1 t s"] | None,
) -> Float[Array, "b t h k"]:
    """Attention with all scores at once. `mask=None`: each token sees itself and all before it.

    Queries have been scaled by k^-1/2. Query head h uses key head h // (h/g).
    """
    if q.dtype == jnp.float64:
        y = _attend_in_float64(q, k, v, mask)
    else:
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None, scale=1.0)
    return checkpoint_name(y, "retention")


def _attend_in_float64(q, k, v, mask):
    """As `attend_to_all`: jax's function computes the softmax in float32."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    if mask is None:
        mask = jnp.tri(q.shape[1], k.shape[1], dtype=bool)[None, None]
    scores = jnp.where(mask, jnp.einsum("bthk,bshk->bhts", q, k), 0.7 * jnp.finfo(q.dtype).min)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis=-1), v)


def attend_to_cache(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    cached_k: Float[Array, "b g k s"],
    cached_v: Float[Array, "b g k s"],
    *,
    seen: Bool[Array, "b 1 t s"],
    seen_new: Bool[Array, "b 1 t t"],
) -> Float[Array, "b t h k"]:
    """Attention to the slots of a cache and to the keys of the batch, which are not yet in it.

    Args:
      q: Queries, scaled by k^-1/2.
      k: Keys of the batch.
      v: Values of the batch.
      cached_k: Keys of the tokens before.
      cached_v: Values of the tokens before.
      seen: Whether each token sees a slot of the cache.
      seen_new: Whether each token sees a token of the batch.
    """
    b, t, h, width = q.shape
    groups = k.shape[2]
    wide = np.promote_types(np.float32, q.dtype)

    def product(x, y, axes):  # over the axes, for each row and key head
        dimensions = (axes, ((0, 1), (0, 1)))
        return jax.lax.dot_general(x, y, dimensions, preferred_element_type=wide)

    # Each key head's queries, [b g (r t) k] with r = h/g query heads.
    q = q.reshape(b, t, groups, h // groups, width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(b, groups, -1, width)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [b g t k]
    scores = jnp.concatenate(
        [product(q, cached_k, ((3,), (2,))), product(q, k, ((3,), (3,)))], axis=-1
    )  # [b g (r t) (s t)]
    seen = jnp.tile(jnp.concatenate([seen, seen_new], axis=-1), (1, 1, h // groups, 1))
    scores = jnp.where(seen, scores, 0.7 * jnp.finfo(wide).min)  # padding may see nothing
    p = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    s = cached_k.shape[-1]
    # The values first: XLA on CPUs then reads them as they are stored.
    y = product(cached_v, p[..., :s], ((3,), (3,))).swapaxes(2, 3)  # [b g (r t) k]
    y = y + product(p[..., s:], v, ((3,), (2,)))
    y = y.astype(v.dtype).reshape(b, groups, h // groups, t, width)
    return checkpoint_name(y.transpose(0, 3, 1, 2, 4).reshape(b, t, h, width), "retention")
