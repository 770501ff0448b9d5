"""Softmax attention block by block, for long rows on a CPU: scores stay in its cache.

XLA writes the scores of whole rows to memory, and passes over them several times. Here the scores
of a block of queries and a block of keys are computed at once, with the softmax's maximum and sum
carried from block to block (arXiv 2205.14135); the backward pass computes them again. Accelerators
have kernels that do this (`flash_attention.py`).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retnet_jax.shapes import Array, Bool, Float


@jax.custom_vjp
def attend_in_blocks(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g k"],
    mask: Bool[Array, "#b 1 t s"] | None,
) -> Float[Array, "b t h k"]:
    """`attend_to_all` of float32 or bfloat16. It has a gradient in reverse mode only.

    Args:
      q: Queries, scaled by k^-1/2.
      k: Keys. Query head h uses key head h // (h/g).
      v: Values.
      mask: Whether a query sees a key, which is False for all keys after it; None: it sees its own
        and all before it. A query that sees nothing has some finite output.
    """
    return _forward(q, k, v, mask)[0]


def _forward(q, k, v, mask):
    blocks = _Blocks.of(q, k)
    queries, keys, values = blocks.of_queries(q), blocks.of_keys(k), blocks.of_keys(v)

    def add_keys(carried, i, j, hide):
        top, total, y = (x[i] for x in carried)
        scores = hide(_product("bgqk,bgsk->bgqs", queries[i], keys[j]))
        new_top = jnp.maximum(top, scores.max(-1))
        p, kept = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        y = y * kept[..., None] + _product("bgqs,bgsk->bgqk", p, values[j])
        new = new_top, total * kept + p.sum(-1), y
        return tuple(x.at[i].set(part) for x, part in zip(carried, new, strict=True))

    rows = queries.shape[:-1]
    start = jnp.full(rows, _HIDDEN), jnp.zeros(rows), jnp.zeros(queries.shape)
    top, total, y = blocks.over_pairs(add_keys, start, mask)
    y = blocks.as_rows(y / total[..., None]).astype(v.dtype)
    return y, (q, k, v, mask, y, top + jnp.log(total))


def _backward(residuals, d_y):
    q, k, v, mask, y, log_sum = residuals
    blocks = _Blocks.of(q, k)
    queries, keys, values = blocks.of_queries(q), blocks.of_keys(k), blocks.of_keys(v)
    d_rows = blocks.of_queries(d_y)
    mean = (blocks.of_queries(y).astype(jnp.float32) * d_rows).sum(-1, keepdims=True)

    def add_keys(carried, i, j, hide):
        d_q, d_k, d_v = carried
        scores = hide(_product("bgqk,bgsk->bgqs", queries[i], keys[j]))
        p = jnp.exp(scores - log_sum[i][..., None])
        d_scores = p * (_product("bgqk,bgsk->bgqs", d_rows[i], values[j]) - mean[i])
        d_q = d_q.at[i].add(_product("bgqs,bgsk->bgqk", d_scores, keys[j]))
        d_k = d_k.at[j].add(_product("bgqs,bgqk->bgsk", d_scores, queries[i]))
        d_v = d_v.at[j].add(_product("bgqs,bgqk->bgsk", p, d_rows[i]))
        return d_q, d_k, d_v

    start = tuple(jnp.zeros(x.shape) for x in (queries, keys, values))
    d_q, d_k, d_v = blocks.over_pairs(add_keys, start, mask)
    d_k, d_v = (blocks.as_keys(x) for x in (d_k, d_v))
    return blocks.as_rows(d_q).astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


attend_in_blocks.defvjp(_forward, _backward)

_HIDDEN = 0.7 * float(np.finfo(np.float32).min)  # score of a key that is not seen
_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


class _Blocks(NamedTuple):
    """How rows are cut into blocks of `size` queries and blocks of `size` keys.

    Each key head has its r = h/g query heads beside it: blocks of queries are [n b g (r l) k] for l
    queries, those of keys [m b g l k].
    """

    size: int
    t: int
    s: int
    repeats: int

    @classmethod
    def of(cls, q: Array, k: Array) -> "_Blocks":
        t, s = q.shape[1], k.shape[1]
        return cls(256 if t < 2048 else 512, t, s, q.shape[2] // k.shape[2])

    def of_queries(self, x: Float[Array, "b t h k"]) -> Float[Array, "n b g rl k"]:
        x = self._padded(x)
        b, end, h, width = x.shape
        x = x.reshape(b, end // self.size, self.size, h // self.repeats, self.repeats, width)
        return x.transpose(1, 0, 3, 4, 2, 5).reshape(-1, b, h // self.repeats, self._rows, width)

    def as_rows(self, x: Float[Array, "n b g rl k"]) -> Float[Array, "b t h k"]:
        n, b, g, _, width = x.shape
        x = x.reshape(n, b, g, self.repeats, self.size, width).transpose(1, 0, 4, 2, 3, 5)
        return x.reshape(b, n * self.size, g * self.repeats, width)[:, : self.t]

    def of_keys(self, x: Float[Array, "b s g k"]) -> Float[Array, "m b g l k"]:
        x = self._padded(x)
        return x.reshape(len(x), -1, self.size, *x.shape[2:]).transpose(1, 0, 3, 2, 4)

    def as_keys(self, x: Float[Array, "m b g l k"]) -> Float[Array, "b s g k"]:
        m, b, g, size, width = x.shape
        return x.transpose(1, 0, 3, 2, 4).reshape(b, m * size, g, width)[:, : self.s]

    @property
    def _rows(self) -> int:
        return self.repeats * self.size

    def _padded(self, x: Array) -> Array:
        """[b t ...] with t padded to whole blocks."""
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.size), (0, 0), (0, 0)))

    def over_pairs(self, add_keys: Callable, start: Any, mask: Array | None) -> Any:
        """Runs `add_keys` for each block of queries and each block of keys that it may see.

        Args:
          add_keys: Function of what is carried, the numbers of the two blocks, and `hide`, which
            maps scores [b g (r l) m] to scores that are `_HIDDEN` where a key is not seen.
          start: What is carried at first.
          mask: As in `attend_in_blocks`.
        """
        if mask is not None:
            behind = (0, -self.t % self.size), (0, -self.s % self.size)
            mask = jnp.pad(mask[:, 0], ((0, 0), *behind))

        def with_all(carried, pair):
            i, j = pair
            return add_keys(carried, i, j, lambda scores: scores), None

        def with_some(carried, pair):
            i, j = pair
            seen = self._seen(i, j, mask)
            return add_keys(carried, i, j, lambda scores: jnp.where(seen, scores, _HIDDEN)), None

        pairs = list(self._pairs())
        seen_by_all = [(i, j) for i, j, all_seen in pairs if all_seen and mask is None]
        others = [(i, j) for i, j, all_seen in pairs if not all_seen or mask is not None]
        for step, of_step in ((with_all, seen_by_all), (with_some, others)):
            if of_step:
                start, _ = jax.lax.scan(step, start, jnp.array(of_step, jnp.int32))
        return start

    def _pairs(self) -> Iterator[tuple[int, int, bool]]:
        """Blocks of queries and of keys that some query may see, and whether all may see all."""
        for first in range(0, self.t, self.size):
            last_key = self.s - self.t + first  # that the first query sees
            for key in range(0, min(self.s, last_key + self.size), self.size):
                all_seen = key + self.size - 1 <= last_key
                yield first // self.size, key // self.size, all_seen

    def _seen(self, i: Array, j: Array, mask: Array | None) -> Bool[Array, "#b 1 rl m"]:
        """Whether the queries of block i see the keys of block j."""
        if mask is None:
            query = self.s - self.t + i * self.size + jnp.arange(self.size)
            seen = (j * self.size + jnp.arange(self.size) <= query[:, None])[None]
        else:
            place = jnp.int32(0), i * self.size, j * self.size
            seen = jax.lax.dynamic_slice(mask, place, (len(mask), self.size, self.size))
        return jnp.tile(seen[:, None], (1, 1, self.repeats, 1))
