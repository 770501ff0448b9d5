"""Retention in plain jax.numpy: the reference for every kernel.

For the real tokens of one document, with n counted from its first token and S_-1 the initial state,

    S_n = gamma S_{n-1} + k_n^T v_n        y_n = q_n S_n

`parallel` multiplies all queries with all keys, `recurrent` reads token after token, `chunkwise` is
parallel inside chunks and recurrent between them. A power of gamma is computed as exp of an
exponent that is never positive and is masked before exp.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retnet_jax.ops.retention.decay import decay_gradient, power_of_decay
from retnet_jax.ops.retention.document_index import Chunks, Documents, number_documents
from retnet_jax.ops.retention.recurrent_step import step
from retnet_jax.parallel.mesh import backend
from retnet_jax.shapes import Array, Float, Keys, LogDecay, Queries, RetentionMatrix, Values


def zero_state(q: Queries, v: Values) -> RetentionMatrix:
    """The state before the first token: float32, or float64 for such inputs."""
    b, _, h, k = q.shape
    return jnp.zeros((b, h, k, v.shape[3]), np.promote_types(np.float32, q.dtype))


def parallel(
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: LogDecay,
    state: RetentionMatrix | None,
    documents: Documents | None,
) -> tuple[Values, RetentionMatrix]:
    """The whole row at once (Eq. 5): O(t^2) work and memory. Kept for study and as a check.

    JAX differentiates it, so that its gradient can test the gradient rule of `chunkwise`.
    `state=None` is 0.
    """
    if state is None:
        state = zero_state(q, v)
    row = _Loop(start=0, n=1, chunks=1, size=q.shape[1])  # one chunk
    qkv = row.read(q, 0), row.read(k, 0), row.read(v, 0)  # [b h n l w] each
    y, state = _outputs(*qkv, state, row.decays(log_decay, documents)(0))
    return row.write(jnp.zeros_like(v), y, 0), state


def chunkwise(
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: LogDecay,
    state: RetentionMatrix | None,
    documents: Documents | None,
    chunk_size: int | None = None,
) -> tuple[Values, RetentionMatrix]:
    """Parallel inside chunks, recurrent between them (Eq. 7): O(t) work and memory.

    The last chunk may be shorter. `state=None` is 0, `chunk_size=None` is `best_chunk_size`. For
    its gradient it keeps only q, k, v and the state before each span of chunks.
    """
    if state is None:
        state = zero_state(q, v)
    size = min(chunk_size or best_chunk_size(), q.shape[1])
    return _chunkwise(q, k, v, log_decay, state, documents, size)


def best_chunk_size() -> int:
    """The fastest chunk length on the current platform.

    CPU: 64, the fastest of 32, 64 and 128 with four heads of 64/128 at lengths 2048 and 8192,
    float32 (2 cores of an AMD EPYC, 2026-11-24). Accelerators: 512; by the roofline, states that
    pass through memory then cost the same as the scores inside chunks; not yet measured.
    """
    return 64 if backend() == "cpu" else 512


def _chunks_per_span() -> int:
    """The number of chunks that are computed at once, by batched products: a span.

    CPU: 1, since a chunk stays in cache; at length 2048 spans of four took 1.36 times the CPU time,
    and one of all 32 chunks 2.3 times (2 cores of an AMD EPYC, float32, 2026-11-24). Accelerators:
    4, to keep them busy where there are few rows and heads.
    """
    return 1 if backend() == "cpu" else 4


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _chunkwise(q, k, v, log_decay, state, documents, size):
    y, final, _ = _forward(q, k, v, log_decay, state, documents, size)
    return y, final


def _forward(q, k, v, log_decay, state, documents, size):
    """Outputs, the final state, and the states before the spans, an array [n b h k v] per loop."""
    y, kept = jnp.zeros(v.shape, v.dtype), []
    for loop in _loops(q.shape[1], size):
        state, y, states = _run(loop, q, k, v, log_decay, documents, state, y)
        kept.append(states)
    return y, state, tuple(kept)


def _run(loop: "_Loop", q, k, v, log_decay, documents, state, y):
    """One loop forward: the state after it, y with its outputs, and the states before its spans."""
    decays = loop.decays(log_decay, documents)

    def step(carry, start):
        state, y = carry
        qkv = loop.read(q, start), loop.read(k, start), loop.read(v, start)  # [b h n l w] each
        y_span, after = _outputs(*qkv, state, decays(start))
        return (after, loop.write(y, y_span, start)), state

    (state, y), states = loop.scan(step, (state, y))
    return state, y, states


def _chunkwise_forward(q, k, v, log_decay, state, documents, size):
    y, final, kept = _forward(q, k, v, log_decay, state, documents, size)
    return (y, final), (q, k, v, log_decay, documents, kept, final)


def _chunkwise_backward(size, residuals, cotangents):
    q, k, v, log_decay, documents, kept, final = residuals
    d_y, d_final = cotangents
    d_state, d_qkv = d_final, tuple(jnp.zeros_like(x) for x in (q, k, v))
    for loop, states in reversed(tuple(zip(_loops(q.shape[1], size), kept, strict=True))):
        arrays = (q, k, v, d_y)
        d_state, d_qkv = _run_backward(loop, arrays, log_decay, documents, states, d_state, d_qkv)
    d_q, d_k, d_v = d_qkv
    d_log_decay = decay_gradient(q, d_q, k, d_k, final, d_final, documents)
    return d_q, d_k, d_v, d_log_decay.astype(log_decay.dtype), d_state, None


def _run_backward(loop: "_Loop", arrays, log_decay, documents, states, d_state, d_qkv):
    """One loop from its last span to its first.

    Args:
      loop: The loop to run.
      arrays: The arrays q, k, v and d_y.
      log_decay: Log gamma of each head.
      documents: Document numbering; None: each row is one document.
      states: The state before each span.
      d_state: The gradient of the state after the loop.
      d_qkv: Gradients of q, k and v, filled from the loop's end on.

    Returns:
      The gradient of the state before the loop, and `d_qkv` with this loop's gradients.
    """
    decays = loop.decays(log_decay, documents)

    def step(carry, span):
        d_state, d_qkv = carry
        start, state = span
        q, k, v, d_y = (loop.read(x, start) for x in arrays)  # [b h n l w] each
        *d_span, d_state = _gradients(q, k, v, d_y, state, d_state, decays(start))
        written = (loop.write(x, part, start) for x, part in zip(d_qkv, d_span, strict=True))
        return (d_state, tuple(written)), None

    (d_state, d_qkv), _ = loop.scan(step, (d_state, d_qkv), states, reverse=True)
    return d_state, d_qkv


_chunkwise.defvjp(_chunkwise_forward, _chunkwise_backward)


def recurrent(
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: LogDecay,
    state: RetentionMatrix | None,
    documents: Documents | None,
) -> tuple[Values, RetentionMatrix]:
    """One token after the other (Eq. 6): O(1) memory beyond inputs and outputs.

    The chunkwise form is the same function and computes the gradient, so that none of the t states
    is kept. `state=None` is 0.
    """
    if state is None:
        state = zero_state(q, v)
    return _recurrent(q, k, v, log_decay, state, documents)


@jax.custom_vjp
def _recurrent(q, k, v, log_decay, state, documents):
    if q.shape[1] == 1 and documents is None:
        y, state = step(q[:, 0], k[:, 0], v[:, 0], log_decay, state)
        return y[:, None].astype(v.dtype), state

    def next_token(state, token):
        q, k, v, real, opens = token
        opened = jnp.where(opens[:, None, None, None], 0.0, state)
        y, after = step(q, k, v, log_decay, opened)
        real = real[:, None, None]
        return jnp.where(real[..., None], after, opened), jnp.where(real, y, 0.0).astype(v.dtype)

    if documents is None:
        documents = number_documents(jnp.ones(q.shape[:2], jnp.int32))
    real, _, index = documents
    opens = jnp.diff(index, axis=1, prepend=0) > 0  # whether a token is its document's first
    tokens = jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, real, opens))  # [t b ...] each
    state, y = jax.lax.scan(next_token, state, tokens)
    return y.swapaxes(0, 1), state


def _recurrent_forward(*inputs):
    return _recurrent(*inputs), inputs


def _recurrent_backward(inputs, cotangents):
    *arrays, documents = inputs
    _, backward = jax.vjp(partial(chunkwise, documents=documents), *arrays)
    return (*backward(cotangents), None)


_recurrent.defvjp(_recurrent_forward, _recurrent_backward)


def decay_mask(
    log_decay: LogDecay, length: int, documents: Documents | None
) -> Float[Array, "#b h t s"]:
    """gamma^(n-m) from key m to query n (Eq. 5's D), 0 where n does not see m."""
    row = _Loop(start=0, n=1, chunks=1, size=length)
    return row.decays(log_decay, documents)(0).within[:, :, 0]


class _Loop(NamedTuple):
    """A loop over `n` spans of `chunks` chunks of `size` tokens, beginning at token `start`.

    Each span is sliced from arrays [b t h w] and transposed when it is computed, so that products
    have their batch dimensions in front; the whole arrays are never transposed.
    """

    start: int
    n: int
    chunks: int
    size: int

    def scan(self, step: Callable, carry, xs=None, reverse: bool = False):
        """`jax.lax.scan` over the first token of each span, and over `xs`; four spans unrolled.

        On a CPU independent products of a step run in parallel, while a batched product of small
        matrices uses one core: forward and backward of 8192 tokens took 92 ms with four spans in a
        step and 107 ms with one (2 cores of an AMD EPYC, float32, 2026-11-24).
        """
        starts = self.start + self.chunks * self.size * jnp.arange(self.n)
        xs = starts if xs is None else (starts, xs)
        return jax.lax.scan(step, carry, xs, reverse=reverse, unroll=min(self.n, 4))

    def read(self, x: Float[Array, "b t h w"], start) -> Float[Array, "b h n l w"]:
        """The n chunks of the span that begins at token `start`."""
        return self._tokens(x, start).transpose(0, 3, 1, 2, 4)

    def write(
        self, x: Float[Array, "b t h w"], chunks: Float[Array, "b h n l w"], start
    ) -> Float[Array, "b t h w"]:
        """`x` with the chunks of the span that begins at token `start`."""
        b, h, n, size, width = chunks.shape
        tokens = chunks.astype(x.dtype).transpose(0, 2, 3, 1, 4).reshape(b, n * size, h, width)
        return jax.lax.dynamic_update_slice_in_dim(x, tokens, start, axis=1)

    def decays(self, log_decay: LogDecay, documents: Documents | None) -> Callable:
        """A function from the first token of a span to the span's decays."""
        if documents is None:
            fixed = _decays(log_decay, self.size)
            return lambda start: fixed
        whole = (documents, *documents.before())

        def at(start):
            (real, count, index), *before = jax.tree.map(lambda x: self._tokens(x, start), whole)
            before = [x[:, :, 0] for x in before]  # [b n]
            after = [x[..., -1:] for x in (count, index)]  # [b n 1]
            chunks = Chunks(real, count, index, *(x[..., None] for x in before), *after)
            return _document_decays(log_decay, chunks)

        return at

    def _tokens(self, x, start):
        """[b t ...] -> [b n l ...]"""
        x = jax.lax.dynamic_slice_in_dim(x, start, self.chunks * self.size, axis=1)
        return x.reshape(x.shape[0], self.chunks, self.size, *x.shape[2:])


def _loops(length: int, size: int) -> list[_Loop]:
    """Over the whole spans, over the remaining whole chunks, and over the remaining tokens."""
    found, start = [], 0
    whole, chunks = divmod(length // size, _chunks_per_span())
    for loop in (
        _Loop(0, whole, _chunks_per_span(), size),
        _Loop(0, 1, chunks, size),
        _Loop(0, 1, 1, length % size),
    ):
        if tokens := loop.n * loop.chunks * loop.size:
            found.append(loop._replace(start=start))
            start += tokens
    return found


class _Decays(NamedTuple):
    """The powers of gamma in chunks; a dimension is 1 where all rows or all chunks agree."""

    within: Float[Array, "#b h #n l m"]  # from key m to query l; 0 where l does not see m
    from_start: Float[Array, "#b h #n l 1"]  # from the state before the chunk to query l
    to_end: Float[Array, "#b h #n l 1"]  # from key l to the state after the chunk
    across: Float[Array, "#b h #n 1 1"]  # from the state before the chunk to the one after it


def _decays(log_decay: LogDecay, length: int) -> _Decays:
    """The decays of rows that are one document each, without padding."""
    places = jnp.arange(length)
    distance = places[:, None] - places[None]  # [l m]
    power = partial(power_of_decay, log_decay)
    return _Decays(
        within=power(distance[None, None], distance[None, None] >= 0),
        from_start=power(places[None, None, :, None] + 1),
        to_end=power(places[None, None, ::-1, None]),
        across=power(jnp.full((1, 1, 1, 1), length)),
    )


def _document_decays(log_decay: LogDecay, chunks: Chunks) -> _Decays:
    """The decays with documents and padding: distances count real tokens, 0 across borders."""
    real, count, index = chunks[:3]
    places = jnp.arange(count.shape[-1])
    power = partial(power_of_decay, log_decay)
    sees = (
        (places[:, None] >= places[None])[None, None]
        & (index[..., :, None] == index[..., None, :])
        & (real[..., :, None] & real[..., None, :])
    )
    distance = count[..., :, None] - count[..., None, :]  # [b n l m], as `sees`
    return _Decays(
        within=power(distance, sees),
        from_start=power(chunks.from_start, chunks.reads_start)[..., None],
        to_end=power(chunks.to_end, chunks.writes_end)[..., None],
        across=power(chunks.across, chunks.passes)[..., None],
    )


def _outputs(
    q: Float[Array, "b h n l k"],
    k: Float[Array, "b h n l k"],
    v: Float[Array, "b h n l v"],
    state: RetentionMatrix,
    decays: _Decays,
) -> tuple[Float[Array, "b h n l v"], RetentionMatrix]:
    """Outputs of a span and the state after it: products in the inputs' dtype, float32 sums."""
    product = partial(jnp.einsum, preferred_element_type=state.dtype)
    writes = product("bhnlk,bhnlv->bhnkv", _scaled(k, decays.to_end), v)
    before, state = _running(decays.across, writes, state)  # [b h n k v], [b h k v]
    scores = product("bhnlk,bhnmk->bhnlm", q, k) * decays.within
    y = product("bhnlm,bhnmv->bhnlv", scores.astype(v.dtype), v)
    y += decays.from_start * product("bhnlk,bhnkv->bhnlv", q, before.astype(q.dtype))
    return y, state


def _gradients(
    q: Float[Array, "b h n l k"],
    k: Float[Array, "b h n l k"],
    v: Float[Array, "b h n l v"],
    d_y: Float[Array, "b h n l v"],
    state: RetentionMatrix,
    d_state: RetentionMatrix,
    decays: _Decays,
):
    """Gradients of q, k, v and the state before a span, from those of y and the state after it.

    With D = `within`, a = `from_start` and e = `to_end`, in each chunk
    y = (q k^T * D) v + a * (q S), and the next S = across S + (e * k)^T v. The gradient takes five
    products for the scores' part and four for the states'.
    """
    dtype = q.dtype
    product = partial(jnp.einsum, preferred_element_type=state.dtype)
    to_state = _scaled(k, decays.to_end)
    from_state = _scaled(q, decays.from_start)
    writes = product("bhnlk,bhnlv->bhnkv", to_state, v)
    before, _ = _running(decays.across, writes, state)
    reads = product("bhnlk,bhnlv->bhnkv", from_state, d_y)
    d_after, d_state = _running(decays.across, reads, d_state, reverse=True)
    before, d_after = before.astype(dtype), d_after.astype(dtype)

    scores = (product("bhnlk,bhnmk->bhnlm", q, k) * decays.within).astype(dtype)
    d_scores = (product("bhnlv,bhnmv->bhnlm", d_y, v) * decays.within).astype(dtype)
    d_q = product("bhnlm,bhnmk->bhnlk", d_scores, k)
    d_q += decays.from_start * product("bhnlv,bhnkv->bhnlk", d_y, before)
    d_k = product("bhnlm,bhnlk->bhnmk", d_scores, q)
    d_k += decays.to_end * product("bhnlv,bhnkv->bhnlk", v, d_after)
    d_v = product("bhnlm,bhnlv->bhnmv", scores, d_y)
    d_v += product("bhnlk,bhnkv->bhnlv", to_state, d_after)
    return d_q, d_k, d_v, d_state


def _scaled(
    x: Float[Array, "b h n l k"], decay: Float[Array, "#b h #n l 1"]
) -> Float[Array, "b h n l k"]:
    """The product in float32, in the inputs' dtype."""
    return (x.astype(decay.dtype) * decay).astype(x.dtype)


def _running(
    across: Float[Array, "#b h #n 1 1"],
    writes: Float[Array, "b h n k v"],
    state: RetentionMatrix,
    reverse: bool = False,
) -> tuple[Float[Array, "b h n k v"], RetentionMatrix]:
    """The state before each chunk, and after all: a chunk decays the state and adds its write."""
    n = writes.shape[2]
    if n == 1:
        return state[:, :, None], across[:, :, 0] * state + writes[:, :, 0]
    across = jnp.broadcast_to(across, (*across.shape[:2], n, 1, 1))

    def step(state, chunk):
        across, write = chunk
        return across * state + write, state

    chunks = (jnp.moveaxis(across, 2, 0), jnp.moveaxis(writes, 2, 0))
    state, before = jax.lax.scan(step, state, chunks, reverse=reverse, unroll=n <= 8)
    return jnp.moveaxis(before, 0, 2), state
