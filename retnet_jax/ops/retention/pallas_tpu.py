"""Chunkwise retention on TPUs: forward and backward as Pallas kernels, with the state in VMEM.

A program processes the chunks of one row in order, for a group of heads. Their float32 states stay
in VMEM, so only q, k, v and y of each token pass through HBM. Heads are not transposed: a tile is
the columns of some heads of [b t (h k)], as the projections write it.

The backward pass goes through the chunks twice: forward in time it recomputes the states, and from
them d_q; backward in time it carries d_S, and computes d_k and d_v. It keeps only the inputs of the
forward pass. Keeping the states instead would save 2 k v FLOPs a token and head, for 8 k v bytes
written and read in each chunk: at widths 256/512 and chunks of 128 that is 0.6 ns of a v5p's matrix
units for 3 ns of its memory.

**Tile sizes.** With chunks of c tokens, a token and head takes 4 k v + 2 c (k + v) FLOPs forward
and 12 k v + 6 c (k + v) backward, and in bfloat16 4 (k + v) and 10 (k + v) bytes. At 256/512 and
c = 128 that is 230 FLOPs a byte forward, where matrix units and memory of a v5p are even at 166 and
of a v6e at 560: longer chunks only add work to a v5p. But the matrix units of v6e and later are
256 x 256, and half empty with 128. The compilers agree: by their schedules, forward and
backward together take a v5p 22 cycles of one token and head with c = 128 and 25 with 256, a v6e 13
and 9 (256/512, four heads a program). Some 300 of a program's bundles start its copies, whence the
four heads. None of this was run on a TPU.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from retnet_jax.ops.retention.decay import decay_gradient
from retnet_jax.ops.retention.document_index import Documents
from retnet_jax.parallel.chips import chip
from retnet_jax.parallel.mesh import backend, device_kind
from retnet_jax.shapes import Array, Float, Int, Keys, LogDecay, Queries, RetentionMatrix, Values

LANES = 128
MOST_HEADS = 4  # heads of one program, unless more are needed to fill whole lanes


def chunkwise(
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: LogDecay,
    state: RetentionMatrix | None,
    documents: Documents | None,
    chunk_size: int | None = None,
) -> tuple[Values, RetentionMatrix]:
    """`retention.xla.chunkwise` as a kernel, interpreted on a CPU; `state=None` is 0."""
    tiling = Tiling.of(q, v, chunk_size)
    numbers = None if documents is None else document_numbers(documents, tiling.chunk)
    return _retention(tiling, q, k, v, log_decay, state, numbers, documents)


def unsupported(q, k, v, chunk_size: int | None = None) -> str | None:
    """Why the kernels cannot run arrays of these shapes on this platform; None if they can."""
    if backend() not in ("tpu", "cpu"):
        return f"it is for TPUs (and interpreted on a CPU), not for {backend()!r}"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, not {q.dtype}"
    tiling = Tiling.of(q, v, chunk_size)
    if backend() == "cpu":
        return None
    if tiling.chunk % 16 and tiling.chunk != tiling.t:
        return f"chunk_size={tiling.chunk} is not a multiple of 16"
    vmem = _Limits.here().vmem
    if tiling.vmem() > vmem:
        return (
            f"{tiling.group} heads of {tiling.k}/{tiling.v}, which together fill whole lanes, need "
            f"{tiling.vmem() / 2**20:.0f} MiB of VMEM, and {device_kind()} has {vmem >> 20}"
        )
    return None


class Tiling(NamedTuple):
    """Shapes of the arrays and of the tiles that the kernels process."""

    b: int
    t: int
    h: int
    k: int
    v: int
    itemsize: int
    chunk: int
    group: int  # heads of one program

    @staticmethod
    def of(q, v, chunk_size: int | None) -> "Tiling":
        """The tiling of arrays: the longest chunk and then the largest group that fit in VMEM."""
        b, t, h, k = q.shape
        whole = Tiling(b, t, h, k, v.shape[3], q.dtype.itemsize, 0, 0)
        limits = _Limits.here()
        wanted = chunk_size or limits.chunk * 2 // q.dtype.itemsize
        for chunk in (wanted,) if chunk_size else (wanted, wanted // 2, wanted // 4):
            tiling = whole._replace(chunk=min(chunk, t))
            groups = [n for n in range(1, h + 1) if tiling._fills_lanes(n)]
            fitting = [n for n in groups if n <= max(MOST_HEADS, groups[0])]
            for group in reversed(fitting):
                tiling = tiling._replace(group=group)
                if tiling.vmem() <= limits.vmem:
                    return tiling
        return tiling  # none fits; `unsupported` says so

    def _fills_lanes(self, n_heads: int) -> bool:
        if self.h % n_heads:
            return False
        return n_heads == self.h or not (n_heads * self.k % LANES or n_heads * self.v % LANES)

    @property
    def n_chunks(self) -> int:
        return -(-self.t // self.chunk)

    def vmem(self) -> int:
        """Bytes of the kernel that needs most: tiles of two steps, states, and temporaries."""
        k, v = (-(-width // LANES) * LANES for width in (self.k, self.v))
        tokens = 3 * self.chunk * self.group * (self.k + self.v) * self.itemsize
        states = self.group * self.k * v * 4
        temporaries = 4 * self.chunk * (6 * self.chunk + 4 * (k + v)) + 10 * self.k * v
        return 2 * tokens + states + temporaries + 2 * 2**20


class _Limits(NamedTuple):
    """Properties of a TPU that the tiling depends on."""

    vmem: int  # bytes of one core
    chunk: int  # tokens of a chunk, in bfloat16

    @staticmethod
    def here() -> "_Limits":
        """Limits of the device that runs the program; if it is not in the table, of any TPU."""
        known = chip(device_kind())
        if known is None or not known.vmem:
            return _Limits(16 * 2**20, 128)
        return _Limits(known.vmem, known.chunk)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _retention(tiling, q, k, v, log_decay, state, numbers, documents):
    (y,), final = _walk(_outputs, tiling, log_decay, numbers, (q, k, v), state, out=(v,))
    return y, final


def _retention_forward(tiling, *inputs):
    is_primal = lambda x: isinstance(x, jax.custom_derivatives.CustomVJPPrimal)  # noqa: E731
    decay_is_trained = inputs[3].perturbed
    inputs = jax.tree.map(lambda x: x.value, inputs, is_leaf=is_primal)
    result: tuple[Array, Array] = _retention(tiling, *inputs)
    return result, (inputs, result[1] if decay_is_trained else None)


def _retention_backward(tiling, residuals, cotangents):
    (q, k, v, log_decay, state, numbers, documents), final = residuals
    d_y, d_final = cotangents
    if _is_zero(d_final):
        d_final = None
    if _is_zero(d_y):
        d_y = jnp.zeros(d_y.shape, d_y.dtype)
    walk = partial(_walk, tiling=tiling, log_decay=log_decay, numbers=numbers)
    (d_q,), _ = walk(_query_gradients, tokens=(k, v, d_y), state=state, out=(q,), returns=False)
    (d_k, d_v), d_state = walk(
        _key_gradients,
        tokens=(q, k, v, d_y),
        state=d_final,
        out=(k, v),
        returns=state is not None,
        backward=True,
    )
    d_log_decay = (
        None if final is None else decay_gradient(q, d_q, k, d_k, final, d_final, documents)
    )
    return d_q, d_k, d_v, d_log_decay, d_state, None, None


def _is_zero(cotangent) -> bool:
    return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


_retention.defvjp(_retention_forward, _retention_backward, symbolic_zeros=True)


# The following functions compute one chunk of one head. They take the powers of gamma, the state
# before the chunk [k v] and arrays of its tokens [l k] or [l v]; they return arrays of its tokens
# and the state after the chunk. `_key_gradients` goes backwards: it takes the gradient of the state
# after the chunk, and returns that of the state before it.


def _outputs(decays, state, q, k, v):
    scores = (_dot(q, k, 1, 1) * decays.within).astype(v.dtype)
    old = _dot(q, state.astype(q.dtype), 1, 0)
    return (_dot(scores, v, 1, 0) + decays.from_start * old,), _next(decays, state, k, v)


def _query_gradients(decays, state, k, v, d_y):
    d_scores = (_dot(d_y, v, 1, 1) * decays.within).astype(k.dtype)
    old = _dot(d_y, state.astype(d_y.dtype), 1, 1)
    return (_dot(d_scores, k, 1, 0) + decays.from_start * old,), _next(decays, state, k, v)


def _next(decays, state, k, v):
    decayed_k = (k * decays.to_end).astype(k.dtype)
    return decays.across * state + _dot(decayed_k, v, 0, 0)


def _key_gradients(decays, d_state, q, k, v, d_y):
    # Scores with keys in rows and queries in columns, so that none of them is transposed.
    scores = (_dot(k, q, 1, 1) * decays.within_transposed).astype(d_y.dtype)
    d_scores = (_dot(v, d_y, 1, 1) * decays.within_transposed).astype(q.dtype)
    later = d_state.astype(k.dtype)
    d_v = _dot(scores, d_y, 1, 0) + decays.to_end * _dot(k, later, 1, 0)
    d_k = _dot(d_scores, q, 1, 0) + decays.to_end * _dot(v, later, 1, 1)
    decayed_q = (q * decays.from_start).astype(q.dtype)
    return (d_k, d_v), decays.across * d_state + _dot(decayed_q, d_y, 0, 0)


def _dot(x, y, x_axis, y_axis):
    """Product over an axis of each, summed in float32."""
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _walk(one_chunk, tiling, log_decay, numbers, tokens, state, out, backward=False, returns=True):
    """Runs all chunks of all heads, one after the other, or from the last to the first.

    Args:
      one_chunk: One of the functions above.
      tiling: Shapes of arrays and tiles.
      log_decay: Log gamma of each head, float32 [h].
      numbers: What `document_numbers` returns; None: each row is one document.
      tokens: Inputs of `one_chunk`, of all tokens: [b t h k] or [b t h v].
      state: Initial state, float32 [b h k v]; None: 0.
      out: Arrays with the shapes and dtypes of the outputs of `one_chunk`, of all tokens.
      backward: Whether to go from the last chunk to the first.
      returns: Whether to return the last state.

    Returns:
      The outputs, and the last state, or None.
    """

    def place(row, group, step):
        return row, tiling.n_chunks - 1 - step if backward else step, group

    def tiles(x):
        return pl.BlockSpec((1, tiling.chunk, tiling.group * x.shape[3]), place)

    def flat(x):
        return jax.ShapeDtypeStruct((tiling.b, tiling.t, tiling.h * x.shape[3]), x.dtype)

    of_numbers = None
    if numbers is not None:
        shape = (1, 1, *numbers.shape[2:])
        of_numbers = pl.BlockSpec(shape, lambda *at: (*place(*at)[:2], 0, 0))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    states = jax.ShapeDtypeStruct((tiling.b, tiling.h, tiling.k, tiling.v), jnp.float32)
    outputs, last = pl.pallas_call(
        partial(_kernel, one_chunk, tiling, backward),
        grid=(tiling.b, tiling.h // tiling.group, tiling.n_chunks),
        in_specs=(
            pl.BlockSpec(memory_space=pltpu.SMEM),
            of_numbers,
            [*map(tiles, tokens)],
            None if state is None else whole,
        ),
        out_specs=([*map(tiles, out)], whole if returns else None),
        out_shape=([*map(flat, out)], states if returns else None),
        scratch_shapes=[pltpu.VMEM((tiling.group, tiling.k, tiling.v), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tiling.vmem(),
        ),
        cost_estimate=_cost(tiling, one_chunk, tokens + out),
        interpret=backend() == "cpu",
        name=f"retention{one_chunk.__name__}",
    )(log_decay, numbers, [x.reshape(flat(x).shape) for x in tokens], state)
    return [y.reshape(x.shape) for y, x in zip(outputs, out, strict=True)], last


def _kernel(
    one_chunk,
    tiling,
    backward,
    log_decay,
    numbers,
    tokens,
    first_state,
    outputs,
    last_state,
    states,
):
    """One chunk of a group of heads; `states`, in VMEM, are carried from chunk to chunk."""
    row, group, step = (pl.program_id(axis) for axis in range(3))
    chunk = tiling.n_chunks - 1 - step if backward else step
    heads = pl.ds(group * tiling.group, tiling.group)

    @pl.when(step == 0)
    def _():
        if first_state is None:
            states[...] = jnp.zeros_like(states)
        else:
            pltpu.sync_copy(first_state.at[row, heads], states)

    if numbers is None:
        exponents = Exponents.of_one_document(tiling, chunk)
    else:
        exponents = Exponents.of_documents(numbers[0, 0])
    for head in range(tiling.group):
        inputs = [_read(ref, head, tiling, chunk) for ref in tokens]
        decays = exponents.powers(log_decay[group * tiling.group + head])
        results, states[head] = one_chunk(decays, states[head], *inputs)
        for ref, y in zip(outputs, results, strict=True):
            ref[0, :, _lanes(ref, head, tiling)] = y.astype(ref.dtype)

    if last_state is not None:

        @pl.when(step == tiling.n_chunks - 1)
        def _():
            pltpu.sync_copy(states, last_state.at[row, heads])


def _lanes(ref, head: int, tiling: Tiling) -> slice:
    """The lanes of one head in the tile of a group."""
    width = ref.shape[2] // tiling.group
    return slice(head * width, (head + 1) * width)


def _read(ref, head: int, tiling: Tiling, chunk):
    """A head's tokens of a chunk; 0 after the end of the row, where a tile has arbitrary values."""
    x = ref[0, :, _lanes(ref, head, tiling)]
    if tiling.t % tiling.chunk == 0:
        return x
    places = jax.lax.broadcasted_iota(jnp.int32, (tiling.chunk, 1), 0)
    return jnp.where(places < tiling.t - chunk * tiling.chunk, x, jnp.zeros_like(x))


# The matrix products of `one_chunk`: the number of those with the state, 2 k v FLOPs a token each,
# and of those within the chunk, c (k + v) each.
_PRODUCTS = {_outputs: (2, 2), _query_gradients: (2, 2), _key_gradients: (3, 4)}


def _cost(tiling: Tiling, one_chunk, arrays) -> pl.CostEstimate:
    with_state, within = _PRODUCTS[one_chunk]
    k, v, c, heads = tiling.k, tiling.v, tiling.chunk, tiling.b * tiling.h
    each = 2 * with_state * k * v + within * c * (k + v)
    return pl.CostEstimate(
        flops=heads * tiling.t * each,
        transcendentals=heads * tiling.t * c,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays) + 4 * heads * k * v,
    )


class Exponents(NamedTuple):
    """Exponents of gamma in one chunk, in real tokens; negative where the power is to be 0."""

    within: Int[Array, "l m"]  # from key m to query l
    within_transposed: Int[Array, "m l"]
    from_start: Int[Array, "l 1"]  # from the state before the chunk to query l
    to_end: Int[Array, "l 1"]  # from key l to the state after the chunk
    across: Int[Array, "1 1"]  # from the state before the chunk to the state after it

    @staticmethod
    def of_one_document(tiling: Tiling, chunk) -> "Exponents":
        places = jax.lax.broadcasted_iota(jnp.int32, (tiling.chunk, 1), 0)
        along = jax.lax.broadcasted_iota(jnp.int32, (1, tiling.chunk), 1)
        filled = jnp.minimum(tiling.chunk, tiling.t - chunk * tiling.chunk)
        return Exponents(
            within=places - along,
            within_transposed=along - places,
            from_start=places + 1,
            to_end=filled - 1 - places,
            across=jnp.full((1, 1), filled),
        )

    @staticmethod
    def of_documents(numbers: Int[Array, "n l"]) -> "Exponents":
        """The exponents of a chunk, from its part of what `document_numbers` returns."""
        columns = numbers.T
        count, document, from_start, to_end = (columns[:, i : i + 1] for i in range(4))
        count_along, document_along, across = (numbers[i : i + 1] for i in (0, 1, 4))
        same = (document == document_along) & (document >= 0)
        return Exponents(
            within=jnp.where(same, count - count_along, -1),
            within_transposed=jnp.where(same, count_along - count, -1),
            from_start=from_start,
            to_end=to_end,
            across=across[:, :1],
        )

    def powers(self, log_decay: Float[Array, ""]) -> "Exponents":
        """The powers of gamma with these exponents."""
        return Exponents(
            *(jnp.where(x >= 0, jnp.exp(log_decay * x.astype(jnp.float32)), 0.0) for x in self)
        )


def document_numbers(documents: Documents, size: int) -> Int[Array, "b c 5 l"]:
    """For rows with documents and padding: the numbers from which `Exponents` are computed.

    Each token has the number of real tokens up to it, the number of its document (-1: padding), and
    the exponents `from_start`, `to_end` and `across`: 20 bytes a token, shared by all heads.
    """
    chunks = documents.chunks(size)
    across = jnp.where(chunks.passes, chunks.across, -1)
    numbers = (
        chunks.count,
        jnp.where(chunks.real, chunks.index, -1),
        jnp.where(chunks.reads_start, chunks.from_start, -1),
        jnp.where(chunks.writes_end, chunks.to_end, -1),
        jnp.broadcast_to(across, chunks.count.shape),
    )
    return jnp.stack(numbers, axis=2)
