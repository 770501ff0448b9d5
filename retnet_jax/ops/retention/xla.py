"""Retention in plain jax.numpy: the definition that every kernel is held against.

For the real tokens of one document, with n counted from its first token and S_-1 the initial state,

    S_n = gamma S_{n-1} + k_n^T v_n        y_n = q_n S_n

and everything below computes just that. `parallel` multiplies all queries with all keys,
`recurrent` walks the tokens, `chunkwise` does the first inside chunks and the second between them.
All powers of gamma are exp of a sum of logarithms that is never positive, and masked before exp.
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
from retnet_jax.shapes import Array, Float

State = Float[Array, "b h k v"]


def zero_state(q: Float[Array, "b t h k"], v: Float[Array, "b t h v"]) -> State:
    """The state before the first token: float32, or float64 for such inputs."""
    b, _, h, k = q.shape
    return jnp.zeros((b, h, k, v.shape[3]), np.promote_types(np.float32, q.dtype))


def parallel(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    log_decay: Float[Array, " h"],
    state: State | None,
    documents: Documents | None,
) -> tuple[Float[Array, "b t h v"], State]:
    """The whole row at once (Eq. 5): O(t^2) work and memory. Kept for study and as a check.

    Differentiated by JAX, so that the rule of `chunkwise` has something to be held against.
    `state=None` is 0.
    """
    if state is None:
        state = zero_state(q, v)
    span = _Spans(start=0, n=1, chunks=1, size=q.shape[1])
    heads = (span.read(x, 0) for x in (q, k, v))
    y, state = _outputs(*heads, state, span.decays(log_decay, documents)(0))
    return span.write(jnp.zeros_like(v), y, 0), state


def chunkwise(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    log_decay: Float[Array, " h"],
    state: State | None,
    documents: Documents | None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "b t h v"], State]:
    """Parallel inside chunks, recurrent between them (Eq. 7): O(t) work and memory.

    The last chunk is as short as the length leaves it; `state=None` is 0, `chunk_size=None` is
    `best_chunk_size`. For its gradient it keeps q, k, v and the state before each span of chunks,
    nothing else.
    """
    if state is None:
        state = zero_state(q, v)
    size = min(chunk_size or best_chunk_size(), q.shape[1])
    return _chunkwise(q, k, v, log_decay, state, documents, size)


def best_chunk_size() -> int:
    """The chunk length that is fastest on what computes.

    CPU: 64, of 32, 64 and 128 with four heads of 64/128 at lengths 2048 and 8192, float32 (2 cores
    of an AMD EPYC, 2026-11-24). Accelerators: 512, where states that pass through memory cost
    as much as the scores inside chunks by the roofline; not yet measured.
    """
    return 64 if backend() == "cpu" else 512


def _chunks_of_a_span() -> int:
    """How many chunks are computed at once, by batched products; a loop goes over such spans.

    CPU: 1, since a chunk stays in cache; at length 2048 four of them took 1.36 times the CPU time,
    and all 32 2.3 times (2 cores of an AMD EPYC, float32, 2026-11-24). Accelerators: 4, to fill
    them where rows and heads are few.
    """
    return 1 if backend() == "cpu" else 4


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _chunkwise(q, k, v, log_decay, state, documents, size):
    y, final, _ = _forward(q, k, v, log_decay, state, documents, size)
    return y, final


def _forward(q, k, v, log_decay, state, documents, size):
    """Outputs, the final state, and the states before the spans: an array for each `_Spans`."""
    y, kept = jnp.zeros(v.shape, v.dtype), []
    for spans in _spans(q.shape[1], size):
        decays = spans.decays(log_decay, documents)

        def step(carry, start, spans=spans, decays=decays):
            state, y = carry
            heads = (spans.read(x, start) for x in (q, k, v))
            part, after = _outputs(*heads, state, decays(start))
            return (after, spans.write(y, part, start)), state

        (state, y), states = spans.scan(step, (state, y))
        kept.append(states)
    return y, state, tuple(kept)


def _chunkwise_forward(q, k, v, log_decay, state, documents, size):
    y, final, kept = _forward(q, k, v, log_decay, state, documents, size)
    return (y, final), (q, k, v, log_decay, documents, kept, final)


def _chunkwise_backward(size, residuals, cotangents):
    q, k, v, log_decay, documents, kept, final = residuals
    d_y, d_final = cotangents
    d_state, gradients = d_final, tuple(jnp.zeros_like(x) for x in (q, k, v))
    # From the last span to the first: what is carried is the gradient of the state after it.
    for spans, states in reversed(tuple(zip(_spans(q.shape[1], size), kept, strict=True))):
        decays = spans.decays(log_decay, documents)

        def step(carry, at, spans=spans, decays=decays):
            d_state, gradients = carry
            start, state = at
            heads = (spans.read(x, start) for x in (q, k, v, d_y))
            *parts, d_state = _gradients(*heads, state, d_state, decays(start))
            written = (
                spans.write(x, part, start) for x, part in zip(gradients, parts, strict=True)
            )
            return (d_state, tuple(written)), None

        (d_state, gradients), _ = spans.scan(step, (d_state, gradients), states, reverse=True)
    d_q, d_k, d_v = gradients
    d_log_decay = decay_gradient(q, d_q, k, d_k, final, d_final, documents)
    return d_q, d_k, d_v, d_log_decay.astype(log_decay.dtype), d_state, None


_chunkwise.defvjp(_chunkwise_forward, _chunkwise_backward)


def recurrent(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    log_decay: Float[Array, " h"],
    state: State | None,
    documents: Documents | None,
) -> tuple[Float[Array, "b t h v"], State]:
    """One token after the other (Eq. 6): O(1) memory beyond inputs and outputs.

    Its gradient is that of the chunkwise form, the same function, so none of the t states is kept.
    `state=None` is 0.
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
    opens = jnp.diff(index, axis=1, prepend=0) > 0
    tokens = jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, real, opens))
    state, y = jax.lax.scan(next_token, state, tokens)
    return y.swapaxes(0, 1), state


def _recurrent_forward(*inputs):
    return _recurrent(*inputs), inputs


def _recurrent_backward(inputs, cotangents):
    *arrays, documents = inputs
    _, backward = jax.vjp(lambda *arrays: chunkwise(*arrays, documents), *arrays)
    return (*backward(cotangents), None)


_recurrent.defvjp(_recurrent_forward, _recurrent_backward)


def decay_mask(
    log_decay: Float[Array, " h"], length: int, documents: Documents | None
) -> Float[Array, "#b h t s"]:
    """gamma^(n-m) from key m to query n (Eq. 5's D), 0 where n does not see m."""
    span = _Spans(start=0, n=1, chunks=1, size=length)
    return span.decays(log_decay, documents)(0).within[:, :, 0]


class _Spans(NamedTuple):
    """`n` spans in a row of `chunks` chunks each, whose length is `size`, from token `start` on.

    A span is read and written where it lies, time before heads: only what is in the works is
    transposed, for products whose batch dimensions are in front.
    """

    start: int
    n: int
    chunks: int
    size: int

    def scan(self, step: Callable, carry, xs=None, reverse: bool = False):
        """`jax.lax.scan` over the first tokens of the spans, and over `xs`, four in each step.

        On a CPU the products of a step run beside each other where none waits for another, while a
        batch of small ones has one core: forward+backward of 8192 tokens took 92 ms with four in a
        step and 107 with one (2 cores of an AMD EPYC, float32, 2026-11-24).
        """
        starts = self.start + self.chunks * self.size * jnp.arange(self.n)
        xs = starts if xs is None else (starts, xs)
        return jax.lax.scan(step, carry, xs, reverse=reverse, unroll=min(self.n, 4))

    def read(self, x: Float[Array, "b t h w"], start) -> Float[Array, "b h n l w"]:
        return self._tokens(x, start).transpose(0, 3, 1, 2, 4)

    def write(self, x: Float[Array, "b t h w"], span: Float[Array, "b h n l w"], start):
        b, h, n, size, width = span.shape
        span = span.astype(x.dtype).transpose(0, 2, 3, 1, 4).reshape(b, n * size, h, width)
        return jax.lax.dynamic_update_slice_in_dim(x, span, start, axis=1)

    def decays(self, log_decay: Float[Array, " h"], documents: Documents | None) -> Callable:
        """The decays of the span that begins at a token, as a function of that token."""
        if documents is None:
            fixed = _decays(log_decay, self.size)
            return lambda start: fixed
        whole = (documents, *documents.before())

        def at(start):
            (real, count, index), *before = jax.tree.map(lambda x: self._tokens(x, start), whole)
            before = [x[:, :, 0] for x in before]
            after = [x[..., -1:] for x in (count, index)]
            chunks = Chunks(real, count, index, *(x[..., None] for x in before), *after)
            return _document_decays(log_decay, chunks)

        return at

    def _tokens(self, x, start):
        """[b t ...] -> [b n l ...]"""
        x = jax.lax.dynamic_slice_in_dim(x, start, self.chunks * self.size, axis=1)
        return x.reshape(x.shape[0], self.chunks, self.size, *x.shape[2:])


def _spans(length: int, size: int) -> list[_Spans]:
    """Whole spans, then the whole chunks that are left, then the tokens that are left."""
    found, start = [], 0
    whole, chunks = divmod(length // size, _chunks_of_a_span())
    for spans in (
        _Spans(0, whole, _chunks_of_a_span(), size),
        _Spans(0, 1, chunks, size),
        _Spans(0, 1, 1, length % size),
    ):
        if tokens := spans.n * spans.chunks * spans.size:
            found.append(spans._replace(start=start))
            start += tokens
    return found


class _Decays(NamedTuple):
    """The powers of gamma in chunks; dimensions are 1 where all rows or all chunks agree."""

    within: Float[Array, "#b h #n l m"]  # from key m to query l; 0 where l does not see m
    from_start: Float[Array, "#b h #n l 1"]  # from the state before the chunk to query l
    to_end: Float[Array, "#b h #n l 1"]  # from key l to the state after the chunk
    across: Float[Array, "#b h #n 1 1"]  # from the state before the chunk to the one after it


def _decays(log_decay: Float[Array, " h"], length: int) -> _Decays:
    """One document, no padding."""
    places = jnp.arange(length)
    distance = places[:, None] - places[None]
    power = partial(power_of_decay, log_decay)
    return _Decays(
        within=power(distance[None, None], distance[None, None] >= 0),
        from_start=power(places[None, None, :, None] + 1),
        to_end=power(places[None, None, ::-1, None]),
        across=power(jnp.full((1, 1, 1, 1), length)),
    )


def _document_decays(log_decay: Float[Array, " h"], chunks: Chunks) -> _Decays:
    """Documents and padding: distances count real tokens, and no power crosses a border."""
    real, count, index = chunks[:3]
    places = jnp.arange(count.shape[-1])
    power = partial(power_of_decay, log_decay)
    sees = (
        (places[:, None] >= places[None])[None, None]
        & (index[..., :, None] == index[..., None, :])
        & (real[..., :, None] & real[..., None, :])
    )
    distance = count[..., :, None] - count[..., None, :]
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
    state: State,
    decays: _Decays,
) -> tuple[Float[Array, "b h n l v"], State]:
    """Outputs of a span and the state after it: products in the inputs' dtype, float32 sums."""
    product = partial(jnp.einsum, preferred_element_type=state.dtype)
    writes = product("bhnlk,bhnlv->bhnkv", _scaled(k, decays.to_end), v)
    before, state = _running(decays.across, writes, state)
    scores = product("bhnlk,bhnmk->bhnlm", q, k) * decays.within
    y = product("bhnlm,bhnmv->bhnlv", scores.astype(v.dtype), v)
    y += decays.from_start * product("bhnlk,bhnkv->bhnlv", q, before.astype(q.dtype))
    return y, state


def _gradients(
    q: Float[Array, "b h n l k"],
    k: Float[Array, "b h n l k"],
    v: Float[Array, "b h n l v"],
    d_y: Float[Array, "b h n l v"],
    state: State,
    d_state: State,
    decays: _Decays,
):
    """Those of q, k, v and of the state before a span, from those of y and the state after it.

    As y = (q k^T * D) v + a * (q S), and the next S = across S + (e * k)^T v, with D `within`,
    a `from_start` and e `to_end`: five products give scores' part, four the states'.
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
    state: State,
    reverse: bool = False,
) -> tuple[Float[Array, "b h n k v"], State]:
    """The state before each chunk, and after all, where each decays it and adds its own write."""
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
