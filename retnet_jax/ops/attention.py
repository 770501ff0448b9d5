"""Softmax attention in XLA: the reference of the kernels, and what runs where there is none.

`attend_to_all` computes the scores of whole rows, `attend_in_window` those of a window,
`attend_to_cache` those of tokens after a cache, and `attend_to_used_slots` those after the part of
a cache that a row uses.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from retnet_jax.ops.blockwise_attention import attend_in_blocks
from retnet_jax.parallel.mesh import backend
from retnet_jax.shapes import Array, Bool, Float, Int

LEAST_IN_BLOCKS = 512  # tokens of a row; whether shorter ones gain was not measured


def attend_to_all(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    mask: Bool[Array, "b 1 t s"] | None,
) -> Float[Array, "b t h k"]:
    """Attention to the rows' own tokens, of which the last is that of the last query.

    On an accelerator all scores are computed at once, on a CPU those of long rows block by block.

    Args:
      q: Queries, scaled by k^-1/2.
      k: Keys. Query head h uses key head h // (h/g).
      v: Values.
      mask: Whether a query sees a key, which is False for all keys after it; None: it sees its own
        and all before it.
    """
    t = q.shape[1]
    if q.dtype == jnp.float64:
        y = _attend_in_float64(q, k, v, mask)
    elif backend() != "cpu" or t < LEAST_IN_BLOCKS:
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None, scale=1.0)
    else:
        y = attend_in_blocks(q, k, v, mask)
    return checkpoint_name(y, "retention")


def _attend_in_float64(q, k, v, mask):
    """As `attend_to_all`: jax's function computes the softmax in float32."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    if mask is None:
        mask = jnp.tri(q.shape[1], k.shape[1], dtype=bool)[None, None]
    scores = jnp.where(mask, jnp.einsum("bthk,bshk->bhts", q, k), 0.7 * jnp.finfo(q.dtype).min)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores, axis=-1), v)


SMALLEST_CHUNK = 128  # tokens; matrix products of smaller ones are slow


def attend_in_window(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    document: Int[Array, "b t"] | None = None,
    *,
    window: int,
    smallest_chunk: int = SMALLEST_CHUNK,
) -> Float[Array, "b t h k"]:
    """Attention of each token to the last `window` tokens of its document, itself included.

    Rows are cut into chunks of a window or more, so a token sees no more than its chunk and the one
    before: the number of scores is proportional to the row's length.

    Args:
      q: Queries, scaled by k^-1/2.
      k: Keys. Query head h uses key head h // (h/g).
      v: Values.
      document: As in `flash_attention`; tokens are counted in the row.
      window: Number of tokens that a token sees.
      smallest_chunk: Smallest number of tokens in a chunk.
    """
    b, t = q.shape[:2]
    size = min(max(window, smallest_chunk), t)
    n = -(-t // size)
    if document is None:
        document = jnp.zeros((b, t), jnp.int32)

    def chunks(x, fill=0):  # [b t ...] as [b n size ...]
        behind = [(0, 0), (0, n * size - t), *[(0, 0)] * (x.ndim - 2)]
        return jnp.pad(x, behind, constant_values=fill).reshape(b, n, size, *x.shape[2:])

    def with_previous(x, fill=0):  # [b n size ...] as [(b n) 2size ...]
        first = [(0, 0), (1, 0), *[(0, 0)] * (x.ndim - 2)]
        previous = jnp.pad(x, first, constant_values=fill)[:, :-1]
        return jnp.concatenate([previous, x], axis=2).reshape(b * n, 2 * size, *x.shape[3:])

    own = chunks(document, -1)
    keys = with_previous(own, -2)  # before the first chunk there is no document
    distance = jnp.arange(size, 2 * size)[:, None] - jnp.arange(2 * size)
    seen = (distance >= 0) & (distance < window)
    mask = seen & (own.reshape(b * n, size, 1) == keys[:, None])
    y = attend_to_all(
        chunks(q).reshape(b * n, size, *q.shape[2:]),
        with_previous(chunks(k)),
        with_previous(chunks(v)),
        mask[:, None],
    )
    return y.reshape(b, n * size, *q.shape[2:])[:, :t]


def without_padding(
    attend: Callable,
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    document: Int[Array, "b t"],
) -> Float[Array, "b t h k"]:
    """`attend(q, k, v, document)` of rows whose padding, document -1, is moved to the end.

    A window counts the tokens of a document, also across padding inside of it.
    """
    order = jnp.argsort(document < 0, axis=1, stable=True)

    def moved(x, order):
        return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)

    y = attend(*(moved(x, order) for x in (q, k, v, document)))
    return moved(y, jnp.argsort(order, axis=1))


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
      cached_k: Keys of the tokens before, of this dtype or a wider one.
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
    scores = product(q.astype(cached_k.dtype), cached_k, ((3,), (2,)))
    scores = jnp.concatenate([scores, product(q, k, ((3,), (3,)))], axis=-1)  # [b g (r t) (s t)]
    seen = jnp.tile(jnp.concatenate([seen, seen_new], axis=-1), (1, 1, h // groups, 1))
    scores = jnp.where(seen, scores, 0.7 * jnp.finfo(wide).min)  # padding may see nothing
    p = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    s = cached_k.shape[-1]
    # The values first: XLA on CPUs then reads them as they are stored.
    y = product(cached_v, p[..., :s].astype(cached_v.dtype), ((3,), (3,))).swapaxes(2, 3)
    y = y + product(p[..., s:], v, ((3,), (2,)))
    y = y.astype(v.dtype).reshape(b, groups, h // groups, t, width)
    return checkpoint_name(y.transpose(0, 3, 1, 2, 4).reshape(b, t, h, width), "retention")


def attend_to_used_slots(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t g k"],
    v: Float[Array, "b t g k"],
    cached_k: Float[Array, "b g k s"],
    cached_v: Float[Array, "b g k s"],
    *,
    seen: Bool[Array, "b 1 t s"],
    seen_new: Bool[Array, "b 1 t t"],
    used: Int[Array, " b"],
) -> Float[Array, "b t h k"]:
    """As `attend_to_cache`, where no token sees a slot of its row from `used` on.

    On a CPU the time is that of the slots each row uses, rounded up to chunks, and what a row gets
    does not depend on the slots of other rows. Accelerators read the whole cache.
    """

    def whole(q, k, v, cached_k, cached_v, seen, seen_new, used):
        return attend_to_cache(q, k, v, cached_k, cached_v, seen=seen, seen_new=seen_new)

    arguments = (q, k, v, cached_k, cached_v, seen, seen_new, used)
    return jax.lax.platform_dependent(*arguments, cpu=_attend_row_by_row, default=whole)


def chunk_of_slots(tokens: int) -> int:
    """The number of slots that `attend_to_used_slots` reads at once on a CPU, for t tokens."""
    return 128 if tokens == 1 else 512


def _attend_row_by_row(q, k, v, cached_k, cached_v, seen, seen_new, used):
    """`attend_to_used_slots` as a loop over rows, and for each row over chunks of its slots."""
    t, (h, width), (groups, slots) = q.shape[1], q.shape[2:], cached_k.shape[1::2]
    chunk = min(chunk_of_slots(t), slots)
    wide = np.promote_types(np.float32, q.dtype)
    product = partial(jnp.einsum, preferred_element_type=wide)

    def of_row(inputs):
        row, q, k, v, seen_new, used = inputs
        # Each key head's queries, [g (r t) k] with r = h/g query heads.
        q = q.reshape(t, groups, h // groups, width).transpose(1, 2, 0, 3)
        q = q.reshape(groups, -1, width)

        def masked(scores, seen):  # [g (r t) s], [t s]
            seen = jnp.tile(seen, (h // groups, 1))
            return jnp.where(seen, scores, 0.7 * jnp.finfo(wide).min)

        scores = masked(product("gqk,sgk->gqs", q, k), seen_new[0])
        top = scores.max(-1)
        p = jnp.exp(scores - top[..., None])

        def add_chunk(number, sums):
            top, total, y = sums
            first = number * chunk
            start = jnp.minimum(first, slots - chunk)
            part = (row, 0, 0, start), (1, groups, width, chunk)
            keys, values = (jax.lax.dynamic_slice(x, *part)[0] for x in (cached_k, cached_v))
            sees = jax.lax.dynamic_slice(seen, (row, 0, 0, start), (1, 1, t, chunk))[0, 0]
            sees &= start + jnp.arange(chunk) >= first
            scores = masked(product("gqk,gks->gqs", q.astype(keys.dtype), keys), sees)
            new_top = jnp.maximum(top, scores.max(-1))
            p, kept = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
            y = y * kept[..., None]
            y = y + product("gks,gqs->gqk", values, p.astype(v.dtype).astype(values.dtype))
            return new_top, total * kept + p.sum(-1), y

        sums = top, p.sum(-1), product("gqs,sgk->gqk", p.astype(v.dtype), v)
        _, total, y = jax.lax.fori_loop(0, -(-used // chunk), add_chunk, sums)
        y = (y / total[..., None]).astype(v.dtype)  # [g (r t) k]
        y = y.reshape(groups, h // groups, t, width)
        return y.transpose(2, 0, 1, 3).reshape(t, h, width)

    return jax.lax.map(of_row, (jnp.arange(len(q)), q, k, v, seen_new, used))
