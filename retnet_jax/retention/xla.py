"""Retention in plain jax.numpy: the definition that every kernel is held against.

For the real tokens of one document, with n counted from its first token and S_-1 the initial state,

    S_n = gamma S_{n-1} + k_n^T v_n        y_n = q_n S_n

and everything below computes just that. `parallel` multiplies all queries with all keys,
`recurrent` walks the tokens, `chunkwise` does the first inside chunks and the second between them.
All powers of gamma are exp of a sum of logarithms that is never positive, and masked before exp.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from retnet_jax.retention.documents import Documents, documents
from retnet_jax.retention.step import step
from retnet_jax.shapes import Array, Float, Int
from retnet_jax.sharding import backend

State = Float[Array, "b h k v"]


def zero_state(q: Float[Array, "b t h k"], v: Float[Array, "b t h v"]) -> State:
    """The state before the first token: float32, or float64 for such inputs."""
    b, _, h, k = q.shape
    return jnp.zeros((b, h, k, v.shape[3]), jnp.promote_types(jnp.float32, q.dtype))


class Before(NamedTuple):
    """What a chunk knows of the tokens before it, along with their state."""

    count: Int[Array, " b"]  # how many were real
    index: Int[Array, " b"]  # number of the document they ended in, and the state belongs to


def _nothing(rows: int) -> Before:
    zeros = jnp.zeros(rows, jnp.int32)
    return Before(count=zeros, index=zeros)


def parallel(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    log_decay: Float[Array, " h"],
    state: State,
    row: Documents | None,
) -> tuple[Float[Array, "b t h v"], State]:
    """The whole row at once (Eq. 5): O(t^2) work and memory. Kept for study and as a check."""
    return chunkwise(q, k, v, log_decay, state, row, chunk_size=q.shape[1])


def chunkwise(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    log_decay: Float[Array, " h"],
    state: State | None,
    row: Documents | None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "b t h v"], State]:
    """Parallel inside chunks, recurrent between them (Eq. 7): O(t) work and memory.

    The last chunk is as short as the length leaves it. Of each chunk the backward pass keeps the
    inputs and the state, and computes the scores again. `state=None` is 0, `chunk_size=None` is
    `best_chunk_size`.
    """
    if state is None:
        state = zero_state(q, v)
    length = q.shape[1]
    size = min(chunk_size or best_chunk_size(), length)
    n_chunks = length // size
    # Heads before time inside, so that XLA's matrix products find their batch dimensions in front.
    tokens = _Row(*(x.swapaxes(1, 2) for x in (q, k, v)), documents=row)

    @jax.checkpoint
    def step(carry, chunk):
        state, before = carry
        if chunk.documents is None:
            decays = _decays(log_decay, chunk.q.shape[2])
        else:
            decays = _document_decays(log_decay, chunk.documents, before)
            before = Before(chunk.documents.count[:, -1], chunk.documents.index[:, -1])
        y, state = _chunk(chunk, state, decays)
        return (state, before), y

    carry = (state, _nothing(q.shape[0]))
    ys, looped = [], 0
    # A loop costs a copy of each slice; a few chunks are faster written out (CPU, 2 cores).
    if n_chunks > 4:
        carry, y = jax.lax.scan(step, carry, tokens.chunks(n_chunks, size))
        looped = n_chunks * size
        ys.append(jnp.moveaxis(y, 0, 2).reshape(*y.shape[1:3], looped, y.shape[-1]))
    for start in range(looped, length, size):
        carry, y = step(carry, tokens.part(start, min(start + size, length)))
        ys.append(y)
    y = jnp.concatenate(ys, axis=2)
    return y.swapaxes(1, 2), carry[0]


def best_chunk_size() -> int:
    """The chunk length that is fastest on what computes.

    CPU: 64, of 32, 64 and 128 with four heads of 64/128 at lengths 2048 and 8192, float32
    (`benchmarks/retention.py`). Accelerators: 512, where states that pass through memory cost as
    much as the scores inside chunks by the roofline; not yet measured.
    """
    return 64 if backend() == "cpu" else 512


@jax.custom_vjp
def recurrent(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    log_decay: Float[Array, " h"],
    state: State,
    row: Documents | None,
) -> tuple[Float[Array, "b t h v"], State]:
    """One token after the other (Eq. 6): O(1) memory beyond inputs and outputs.

    Its gradient is that of the chunkwise form, the same function, so none of the t states is kept.
    """
    if q.shape[1] == 1 and row is None:
        y, state = step(q[:, 0], k[:, 0], v[:, 0], log_decay, state)
        return y[:, None].astype(v.dtype), state

    def next_token(state, token):
        q, k, v, real, opens = token
        opened = jnp.where(opens[:, None, None, None], 0.0, state)
        y, after = step(q, k, v, log_decay, opened)
        real = real[:, None, None]
        return jnp.where(real[..., None], after, opened), jnp.where(real, y, 0.0).astype(v.dtype)

    if row is None:
        row = documents(jnp.ones(q.shape[:2], jnp.int32))
    real, _, index = row
    opens = jnp.diff(index, axis=1, prepend=0) > 0
    tokens = jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, real, opens))
    state, y = jax.lax.scan(next_token, state, tokens)
    return y.swapaxes(0, 1), state


def _recurrent_forward(*inputs):
    return recurrent(*inputs), inputs


def _recurrent_backward(inputs, cotangents):
    *arrays, row = inputs
    _, backward = jax.vjp(lambda *arrays: chunkwise(*arrays, row), *arrays)
    return (*backward(cotangents), None)


recurrent.defvjp(_recurrent_forward, _recurrent_backward)


def decay_mask(
    log_decay: Float[Array, " h"], length: int, row: Documents | None
) -> Float[Array, "#b h t s"]:
    """gamma^(n-m) from key m to query n (Eq. 5's D), 0 where n does not see m."""
    if row is None:
        return _decays(log_decay, length).within
    return _document_decays(log_decay, row, _nothing(row.count.shape[0])).within


class _Row(NamedTuple):
    """Inputs with heads before time, whole or one chunk of them."""

    q: Float[Array, "b h t k"]
    k: Float[Array, "b h t k"]
    v: Float[Array, "b h t v"]
    documents: Documents | None

    def chunks(self, n_chunks: int, size: int) -> "_Row":
        """The first `n_chunks * size` tokens, chunks in front."""

        def split(x, axis):
            x = jax.lax.slice_in_dim(x, 0, n_chunks * size, axis=axis)
            return jnp.moveaxis(
                x.reshape(*x.shape[:axis], n_chunks, size, *x.shape[axis + 1 :]), axis, 0
            )

        return self._map(split)

    def part(self, start: int, end: int) -> "_Row":
        """The tokens from `start` to before `end`."""
        return self._map(lambda x, axis: jax.lax.slice_in_dim(x, start, end, axis=axis))

    def _map(self, function) -> "_Row":
        heads = (function(x, 2) for x in self[:3])
        return _Row(*heads, jax.tree.map(lambda x: function(x, 1), self.documents))


class _Decays(NamedTuple):
    """The powers of gamma in one chunk; the batch dimension is 1 where all rows agree."""

    within: Float[Array, "#b h l m"]  # from key m to query l; 0 where l does not see m
    from_start: Float[Array, "#b h l"]  # from the state before the chunk to query l
    to_end: Float[Array, "#b h l"]  # from key l to the state after the chunk
    across: Float[Array, "#b h"]  # from the state before the chunk to the state after it


def _decays(log_decay: Float[Array, " h"], length: int) -> _Decays:
    """One document, no padding."""
    places = jnp.arange(length)
    distance = places[:, None] - places[None, :]
    power = partial(power_of_decay, log_decay)
    return _Decays(
        within=power(distance[None], distance[None] >= 0),
        from_start=power(places[None] + 1),
        to_end=power(places[None, ::-1]),
        across=power(jnp.full(1, length)),
    )


def _document_decays(log_decay: Float[Array, " h"], chunk: Documents, before: Before) -> _Decays:
    """Documents and padding: distances count real tokens, and no power crosses a border."""
    real, count, index = chunk
    end_count, end_index = count[:, -1], index[:, -1]
    places = jnp.arange(count.shape[1])
    power = partial(power_of_decay, log_decay)
    sees = (
        (places[:, None] >= places[None, :])
        & (index[:, :, None] == index[:, None, :])
        & (real[:, :, None] & real[:, None, :])
    )
    return _Decays(
        within=power(count[:, :, None] - count[:, None, :], sees),
        from_start=power(count - before.count[:, None], real & (index == before.index[:, None])),
        to_end=power(end_count[:, None] - count, real & (index == end_index[:, None])),
        across=power(end_count - before.count, end_index == before.index),
    )


def power_of_decay(log_decay, exponent, where=None):
    """gamma^exponent [b h ...] for exponents [b ...], 0 outside the mask `where`."""
    heads = log_decay.reshape(1, -1, *[1] * (exponent.ndim - 1))
    log_power = heads * jnp.expand_dims(exponent, 1)
    if where is not None:
        log_power = jnp.where(jnp.expand_dims(where, 1), log_power, -jnp.inf)
    return jnp.exp(log_power)


def _chunk(chunk: _Row, state: State, decays: _Decays) -> tuple[Float[Array, "b h l v"], State]:
    """Outputs of one chunk and the state after it: products in the inputs' dtype, float32 sums."""
    q, k, v, _ = chunk
    product = partial(jnp.einsum, preferred_element_type=state.dtype)
    scores = product("bhlk,bhmk->bhlm", q, k) * decays.within
    y = product("bhlm,bhmv->bhlv", scores.astype(v.dtype), v)
    y += product("bhlk,bhkv->bhlv", q, state.astype(q.dtype)) * decays.from_start[..., None]
    decayed_k = (k * decays.to_end[..., None]).astype(k.dtype)
    state = decays.across[..., None, None] * state + product("bhlk,bhlv->bhkv", decayed_k, v)
    return y.astype(v.dtype), state
