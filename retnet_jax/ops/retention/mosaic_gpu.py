"""Chunkwise retention on Hopper GPUs: Pallas kernels for H100 and H200, forward and backward.

One kernel, `_walk`, is the whole recurrence. With A the contracted and B the written width,

    y_l = read_l T q_l + sum_s P_ls v_s        T <- across T + sum_s write_s v_s^T k_s

over the chunks of a row, forwards or backwards, with T [B A] the transposed state. It is all four:

               q     k     v     direction   T        A   B
    y          q     k     v     forwards    S^T      k   v
    d_q        d_y   v     k     forwards    S        v   k
    d_k        v     d_y   q     backwards   d_S      v   k
    d_v        k     q     d_y   backwards   d_S^T    k   v

P [64 64] of a chunk are the decayed scores, which `_scores` computes for all chunks at once: those
of (q, k) for y and d_v, those of (d_y, v) for d_q and d_k. So no block needs a number that another
one computes: the columns of B are divided over blocks, and nothing is summed up between them.

How a block works. T stays in the registers of one or two warpgroups, 64 of its rows in each, as
the left operand of T q and as accumulators: 128 float32 a thread for A = 256. A wider A is halved
between two warpgroups, which add their T q through shared memory. One more warpgroup loads tiles of
64 tokens by 64 columns (128 bytes of bfloat16, the widest swizzle) through the TMA, in a ring that
runs ahead by a chunk or two. TMA reads and writes [b t h k] in place; what lies behind the end of a
row or a head it reads as 0 and does not write.

What it costs, in a token and head of width 256/512 and at what an H200 can do, 790 TFLOP/s and
4.3 TB/s (counted; it has not run on a GPU yet):
  forward   `_walk` 4 K V + 128 V FLOPs, 0.75 ns; q, k, v, y and 128 bytes of P, 0.75 ns.
            `_scores` 128 K FLOPs, 0.04 ns; q and k once more and P, 0.27 ns.
  backward  three walks, 12 K V + 256 K + 128 V FLOPs, 2.16 ns; 3.2 KB each, 2.23 ns.
            The scores of (d_y, v) and (q, k), 0.12 ns; 3.3 KB, 0.77 ns.
- Chunks of 64 tokens balance the two. 128 would add 128 V + 128 K FLOPs, a tenth, and halve the
  number of chunks in flight, of which 64 KiB (forward) and 128 KiB (d_q, d_k) are q and k.
- Were P computed where it is used, it would be so by all V / 128 or K / 64 blocks of a head: 0.16
  instead of 0.27 ns forward, 0.9 instead of 0.8 ns backward, of products in warpgroups whose
  registers are full.
- Two multiply-adds of K V more than backward needs, since d_k and d_v each sum up d_S, in the
  orientation that they want it in. With V divided over 4 blocks instead, d_q and d_k would be sums
  of 4 float32 parts each, 8 KiB to be written and read again.

Rows are divided into segments where there are too few blocks for the GPU: a first walk finds the
states of segments that begin empty, which are summed up to those they begin with (retention is
linear in the state). It reads k and v alone and takes half the FLOPs.
"""

import inspect
import itertools
import re
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from retnet_jax.ops.retention.decay import decay_gradient, power_of_decay
from retnet_jax.ops.retention.document_index import Documents
from retnet_jax.ops.retention.xla import zero_state
from retnet_jax.parallel.sharding import backend
from retnet_jax.shapes import Array, Float, Int

TOKENS = 64  # of a chunk: rows of a warpgroup's matrix product
TILE = 64  # columns of a tile
WIDEST = 512  # of a head: two warpgroups with 4 tiles of T each
MULTIPLE = 8  # of head widths: TMA's strides are multiples of 16 bytes
SHARED_MEMORY = 227 * 1024 - 6 * 1024  # bytes of a block, less what Mosaic and barriers take
SHORTEST_SEGMENT = 8  # chunks: less does not pay for the walk that finds states
HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")  # in the names of devices
PROCESSORS = 132  # streaming multiprocessors of an H100 or H200 (SXM)

_WGMMA = plgpu.Layout.WGMMA
_OF_ROW = _WGMMA.reduce(1)  # a vector with a number for each row of a matrix
_OF_COLUMN = _WGMMA.reduce(0)
_SWIZZLE = plgpu.SwizzleTransform(128)
_ROWS = (_SWIZZLE,)
_OPERAND = (plgpu.TilingTransform((8, 64)), _SWIZZLE)


def chunkwise(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    log_decay: Float[Array, " h"],
    state: Float[Array, "b h k v"] | None,
    row: Documents | None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """`xla.chunkwise` in chunks of 64 tokens, of bfloat16 inputs; `state=None` is 0.

    The backward pass keeps the inputs and the final state, and computes all else again.

    Raises:
      NotImplementedError: with the reason that `unsupported` gives.
    """
    if reason := unsupported(q, k, v, chunk_size):
        raise NotImplementedError(reason)
    if state is None:
        state = zero_state(q, v)
    return _retention(q, k, v, log_decay, state, row)


def unsupported(q, k, v, chunk_size: int | None = None) -> str | None:
    """Why `chunkwise` cannot run arrays of such shapes on the backend; None if it can."""
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"q, k and v are {q.dtype}, {k.dtype}, {v.dtype}; only bfloat16 is computed here"
    if chunk_size not in (None, TOKENS):
        return f"chunk_size={chunk_size}; chunks are of {TOKENS} tokens here"
    for name, width in (("key", q.shape[3]), ("value", v.shape[3])):
        if width % MULTIPLE or not TILE <= width <= WIDEST:
            return (
                f"{name} heads are {width} wide; only multiples of {MULTIPLE} from {TILE} to "
                f"{WIDEST} are"
            )
    platform = backend()
    if platform == "cpu":
        if not hasattr(plgpu, "InterpretGPUParams"):
            return f"jax {jax.__version__} has no interpreter for it on a CPU; jax 0.11 has"
        return None
    device = jax.devices()[0] if _mesh().empty else _mesh().abstract_device
    if platform != "gpu" or not HOPPER.search(device.device_kind):
        return f"the backend is {platform} ({device.device_kind}), not a Hopper GPU"
    return None


def _mesh():
    return jax.sharding.get_abstract_mesh()


@jax.custom_vjp
def _retention(q, k, v, log_decay, state, row):
    return _forward(q, k, v, log_decay, state, row)[0]


def _forward(q, k, v, log_decay, state, row):
    chunks = _Chunks.of(row, *q.shape[:2])
    scores = _scores(q, k, log_decay, chunks)
    y, after = _recurrence(q, k, v, scores, log_decay, chunks, state.swapaxes(2, 3))
    after = after.swapaxes(2, 3)
    return (y, after), (q, k, v, log_decay, state, row, after)


def _backward(saved, cotangents):
    q, k, v, log_decay, state, row, after = saved
    d_y, d_after = cotangents
    chunks = _Chunks.of(row, *q.shape[:2])
    backwards = partial(_recurrence, log_decay=log_decay, chunks=chunks, reverse=True)
    scores = _scores(d_y, v, log_decay, chunks)
    d_q, _ = _recurrence(d_y, v, k, scores, log_decay, chunks, state)
    d_k, d_state = backwards(v, d_y, q, scores, state=d_after)
    scores = _scores(q, k, log_decay, chunks)
    d_v, _ = backwards(k, q, d_y, scores, state=d_after.swapaxes(2, 3))
    d_log_decay = decay_gradient(q, d_q, k, d_k, after, d_after, row)
    return d_q, d_k, d_v, d_log_decay, d_state, None


_retention.defvjp(_forward, _backward)


class _Chunks(NamedTuple):
    """The tokens of rows in n chunks of 64, the last one filled up with padding."""

    count: Int[Array, "b n l"]  # real tokens of the row up to this one
    code: Int[Array, "b n l"]  # number of the document, from 1; 0 for padding
    cut_count: Int[Array, "b m"]  # the same at the n + 1 cuts before and after each chunk
    cut_code: Int[Array, "b m"]

    @staticmethod
    def of(row: Documents | None, rows: int, length: int) -> "_Chunks":
        n_chunks = pl.cdiv(length, TOKENS)
        if row is None:
            count = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.int32), (rows, length))
            index, code = jnp.zeros_like(count), jnp.ones_like(count)
        else:
            count, index = row.count, row.index
            code = jnp.where(row.real, index + 1, 0)

        def split(x):
            x = jnp.pad(x, ((0, 0), (0, n_chunks * TOKENS - length)))
            return x.reshape(rows, n_chunks, TOKENS)

        def at_cuts(x, first):
            ends = jnp.concatenate([x[:, TOKENS - 1 : length - 1 : TOKENS], x[:, -1:]], axis=1)
            return jnp.pad(ends, ((0, 0), (1, 0)), constant_values=first)

        return _Chunks(split(count), split(code), at_cuts(count, 0), at_cuts(index + 1, 1))

    def factors(self, log_decay: Float[Array, " h"], reverse: bool) -> Float[Array, "b h n 3 l"]:
        """Powers of gamma in each chunk: of what tokens read, what they write, and across it."""
        before, after = self.cut_count[:, :-1, None], self.cut_count[:, 1:, None]
        opens, closes = self.cut_code[:, :-1, None], self.cut_code[:, 1:, None]
        power = partial(power_of_decay, log_decay)
        from_start = power(self.count - before, self.code == opens)
        to_end = power(after - self.count, self.code == closes)
        across = jnp.broadcast_to(power(after - before, opens == closes), to_end.shape)
        ends = (to_end, from_start) if reverse else (from_start, to_end)
        return jnp.stack([*ends, across], axis=3)

    def between(self, log_decay, start: int, end: int) -> Float[Array, "b h"]:
        """gamma^tokens from one cut to another; 0 if a border lies between them."""
        return power_of_decay(
            log_decay,
            self.cut_count[:, end] - self.cut_count[:, start],
            self.cut_code[:, end] == self.cut_code[:, start],
        )


def _recurrence(
    q: Float[Array, "b t h a"],
    k: Float[Array, "b t h a"],
    v: Float[Array, "b t h c"],
    scores: Float[Array, "b h n l m"],
    log_decay: Float[Array, " h"],
    chunks: _Chunks,
    state: Float[Array, "b h c a"],
    reverse: bool = False,
) -> tuple[Float[Array, "b t h c"], Float[Array, "b h c a"]]:
    """`_walk` over rows in one piece, or in segments of which each begins with its own state."""
    b, _, h, contracted = q.shape
    written = v.shape[3]
    blocks = _blocks(contracted, written)
    n_chunks = chunks.count.shape[1]
    length = _segment_length(b * h * pl.cdiv(written, blocks.rows), n_chunks)
    factors = chunks.factors(log_decay, reverse)
    rows, columns = blocks.whole(written)
    state = jnp.pad(state, ((0, 0), (0, 0), (0, rows - written), (0, columns - contracted)))
    cuts = [*range(0, n_chunks, length), n_chunks]
    segments = list(itertools.pairwise(cuts))
    if reverse:
        segments.reverse()
    states = [state]
    if len(segments) > 1:
        # The states that segments leave when they begin empty, of all but the last one walked.
        left = _walk(None, k, v, None, factors, None, length, reverse)
        if reverse:
            left = left[:, ::-1]
        for i, segment in enumerate(segments[:-1]):
            decay = chunks.between(log_decay, *segment)
            states.append(decay[..., None, None] * states[-1] + left[:, i])
    if reverse:
        states.reverse()
    y, after = _walk(q, k, v, scores, factors, jnp.stack(states, axis=1), length, reverse)
    return y, after[:, 0 if reverse else -1, :, :written, :contracted]


def _segment_length(blocks: int, n_chunks: int) -> int:
    """Chunks in a segment: as many segments as fill the GPU, but none that are short."""
    segments = max(1, min(PROCESSORS // blocks, n_chunks // SHORTEST_SEGMENT))
    return pl.cdiv(n_chunks, segments)


class _Blocks(NamedTuple):
    """How T [B A] lies on warpgroups: 64 rows and up to 4 tiles of columns on each."""

    halves: int  # warpgroups that share rows: 1, or 2 where A is wider than 256
    groups: int  # of 64 rows in a block
    tiles: int  # of columns on a warpgroup
    stages: int  # tiles of q and k, of each half, that the ring holds

    @property
    def warpgroups(self) -> int:
        return self.halves * self.groups

    @property
    def rows(self) -> int:
        return self.groups * TILE

    def whole(self, written: int) -> tuple[int, int]:
        """T's rows and columns, filled up to whole blocks."""
        return pl.cdiv(written, self.rows) * self.rows, self.halves * self.tiles * TILE


def _blocks(contracted: int, written: int) -> _Blocks:
    n_tiles = pl.cdiv(contracted, TILE)
    halves = 1 if n_tiles <= 4 else 2
    groups = 2 if halves == 1 and written > TILE else 1
    tiles = pl.cdiv(n_tiles, halves)
    # For two chunks v of each warpgroup, scores and factors; y of each group.
    tile = 2 * TOKENS * TILE
    others = 2 * ((halves * groups + 1) * tile + 1024) + groups * tile
    others += 2 * tile * (halves - 1)  # a float32 tile to add up halves
    stages = min((SHARED_MEMORY - others) // (halves * tile), 4 * tiles)
    return _Blocks(halves, groups, tiles, stages)


def _walk(q, k, v, scores, factors, states, length, reverse):
    """The recurrence of segments of `length` chunks each, as the module's docstring has it.

    Args:
      q: [b t h a]; None, along with scores and states, for segments that begin empty and of which
        only the states they leave are wanted.
      k: [b t h a].
      v: [b t h c].
      scores: P of each chunk, [b h n 64 64], rows for queries.
      factors: of `_Chunks`, [b h n 3 64].
      states: T before each segment, [b segments h c a], filled up to whole blocks.
      length: chunks in a segment; the last one of a row may have fewer.
      reverse: whether segments are walked from their ends.

    Returns:
      y [b t h c], and the states after the segments, as `states`; or these alone.
    """
    b, _, h, contracted = k.shape
    written, n_chunks = v.shape[3], factors.shape[2]
    blocks = _blocks(contracted, written)
    n_segments, first = pl.cdiv(n_chunks, length), 0
    if q is None:  # no segment begins with what the last one leaves
        n_segments, first = n_segments - 1, int(reverse)
    inputs = {"q": q, "k": k, "v": v, "scores": scores, "factors": factors, "states": states}
    inputs = {name: array for name, array in inputs.items() if array is not None}
    after = (b, n_segments, h, *blocks.whole(written))
    outputs = {"after": jax.ShapeDtypeStruct(after, jnp.float32)}
    if q is not None:
        outputs["y"] = jax.ShapeDtypeStruct(v.shape, v.dtype)

    def walk(*refs, **memory):
        arrays = dict(zip([*inputs, *outputs], refs, strict=True))
        row, segment = jnp.divmod(jax.lax.axis_index("segments"), n_segments)
        start = (segment + first) * length
        block = _Block(
            shape=blocks,
            reverse=reverse,
            row=row,
            head=jax.lax.axis_index("heads"),
            segment=segment,
            columns=jax.lax.axis_index("columns") * blocks.rows,
            start=start,
            n_chunks=jnp.minimum(length, n_chunks - start),
        )
        warpgroup = jax.lax.axis_index("warpgroup")

        @pl.when(warpgroup < blocks.warpgroups)
        def _():
            if blocks.warpgroups > 1:
                plgpu.set_max_registers(240, action="increase")
            _compute(arrays, memory, block, warpgroup)

        @pl.when(warpgroup == blocks.warpgroups)
        def _():
            if blocks.warpgroups > 1:
                plgpu.set_max_registers(24, action="decrease")
            _fetch(arrays, memory, block)

    found = plgpu.kernel(
        walk,
        out_type=tuple(outputs.values()),
        scratch_types=_walk_memory(blocks, q is not None),
        grid=(pl.cdiv(written, blocks.rows), h, b * n_segments),
        grid_names=("columns", "heads", "segments"),
        num_threads=blocks.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_interpreter(),
    )(*inputs.values())
    return (found[1], found[0]) if q is not None else found[0]


class _Block(NamedTuple):
    """What one block of threads works on."""

    shape: _Blocks
    reverse: bool
    row: Array
    head: Array
    segment: Array
    columns: Array  # the first that it writes
    start: Array  # its first chunk
    n_chunks: Array

    def chunk(self, i):
        """The number in the row of the i-th chunk that is walked."""
        return self.start + (self.n_chunks - 1 - i if self.reverse else i)

    def tokens(self, i):
        return pl.ds(self.chunk(i) * TOKENS, TOKENS)


def _walk_memory(blocks: _Blocks, outputs: bool) -> dict:
    """Shared memory and barriers of a block."""
    each = blocks.warpgroups
    memory = {
        "ring": _operand(blocks.stages, blocks.halves),
        "v": _operand(2, each),
        "factors": plgpu.SMEM((2, 3, TOKENS), jnp.float32),
        "chunk_loaded": plgpu.Barrier(num_arrivals=each + 1 + outputs, num_barriers=2),
        "chunk_free": plgpu.Barrier(num_arrivals=each, num_barriers=2),
        "tile_loaded": plgpu.Barrier(num_arrivals=blocks.halves, num_barriers=blocks.stages),
        "tile_free": plgpu.Barrier(num_arrivals=each, num_barriers=blocks.stages),
    }
    if outputs:
        memory["scores"] = _operand(2)
        memory["y"] = plgpu.SMEM((blocks.groups, TOKENS, TILE), jnp.bfloat16, transforms=_ROWS)
    if outputs and _interpreter():
        # The interpreter takes no left operand from registers.
        memory["registers"] = plgpu.SMEM((each, TILE, TILE), jnp.bfloat16, transforms=_OPERAND)
    if outputs and blocks.halves == 2:
        memory["half"] = plgpu.SMEM(
            (TILE, TOKENS), jnp.float32, transforms=(plgpu.TilingTransform((8, 32)), _SWIZZLE)
        )
        memory["half_there"] = plgpu.Barrier()
        memory["half_free"] = plgpu.Barrier()
    return memory


def _fetch(arrays, memory, block: _Block) -> None:
    """The loading warpgroup: all tiles of a segment, as far ahead as shared memory goes."""
    shape = block.shape
    names = [name for name in ("q", "k") if name in arrays]

    def chunk(i, _):
        slot = i % 2
        loaded = memory["chunk_loaded"].at[slot]
        number = block.chunk(i)

        @pl.when(i >= 2)
        def _():
            plgpu.barrier_wait(memory["chunk_free"].at[slot])

        plgpu.copy_gmem_to_smem(
            arrays["factors"].at[block.row, block.head, number], memory["factors"].at[slot], loaded
        )
        if "scores" in arrays:
            rows, _ = _views(memory["scores"])
            plgpu.copy_gmem_to_smem(
                arrays["scores"].at[block.row, block.head, number], rows.at[slot], loaded
            )
        rows, _ = _views(memory["v"])
        for warpgroup in range(shape.warpgroups):
            columns = pl.ds(block.columns + warpgroup // shape.halves * TILE, TILE)
            plgpu.copy_gmem_to_smem(
                arrays["v"].at[block.row, block.tokens(i), block.head, columns],
                rows.at[slot, warpgroup],
                loaded,
            )
        for n, name in enumerate(names):
            first = (len(names) * i + n) * shape.tiles
            jax.lax.fori_loop(0, shape.tiles, partial(tile, arrays[name], i, first), None)

    def tile(array, i, first, j, _):
        number = first + j
        slot = jax.lax.rem(number, shape.stages)

        @pl.when(number >= shape.stages)
        def _():
            plgpu.barrier_wait(memory["tile_free"].at[slot])

        rows, _ = _views(memory["ring"])
        for half in range(shape.halves):
            columns = pl.ds((half * shape.tiles + j) * TILE, TILE)
            plgpu.copy_gmem_to_smem(
                array.at[block.row, block.tokens(i), block.head, columns],
                rows.at[slot, half],
                memory["tile_loaded"].at[slot],
            )

    jax.lax.fori_loop(0, block.n_chunks, chunk, None)


def _compute(arrays, memory, block: _Block, warpgroup) -> None:
    """A computing warpgroup: 64 rows of T, or half of their columns."""
    shape, outputs = block.shape, "y" in arrays
    group, half = jnp.divmod(warpgroup, shape.halves)
    rows = pl.ds(block.columns + group * TILE, TILE)

    def columns(j):
        return pl.ds((half * shape.tiles + j) * TILE, TILE)

    def chunk(i, state):
        slot = i % 2
        plgpu.barrier_wait(memory["chunk_loaded"].at[slot])
        _, v = _views(memory["v"])
        v = v.at[slot, warpgroup]
        first = i * shape.tiles * (2 if outputs else 1)
        if outputs:
            y = _along_columns(factor(slot, 0, _OF_COLUMN)) * from_state(first, state)
            if shape.halves == 1:
                store(i, within(slot, v, y))
            else:
                add_halves(i, y, slot, v)
            first += shape.tiles
        values = _load(v, _WGMMA).astype(jnp.float32) * _along_rows(factor(slot, 1, _OF_ROW))
        across = _along_rows(factor(slot, 2, _OF_ROW))
        v[...] = values.astype(jnp.bfloat16)
        plgpu.commit_smem()  # after all reading of what TMA writes again

        def update(state):
            for j, piece in enumerate(state):
                plgpu.wgmma(piece, v.T, tile(first + j))

        state = _accumulate(update, *(across * piece for piece in state))
        for j in range(shape.tiles):
            free(first + j)
        plgpu.barrier_arrive(memory["chunk_free"].at[slot])
        return state

    def factor(slot, n, layout):
        return _load(memory["factors"].at[slot, n], layout)

    def tile(number):
        slot = jax.lax.rem(number, shape.stages)
        _, ring = _views(memory["ring"])
        plgpu.barrier_wait(memory["tile_loaded"].at[slot])
        return ring.at[slot, half]

    def free(number):
        plgpu.barrier_arrive(memory["tile_free"].at[jax.lax.rem(number, shape.stages)])

    def from_state(first, state):
        """What the queries read from T, [c l]."""

        def products(y):
            for j, piece in enumerate(state):
                q = tile(first + j)
                left = piece.astype(jnp.bfloat16)
                if "registers" in memory:
                    memory["registers"].at[warpgroup][...] = left
                    left = memory["registers"].at[warpgroup]
                plgpu.wgmma(y, left, q.T)
                plgpu.wgmma_wait(0)  # with two under way, registers are spilled
                free(first + j)
            return y[...]

        return pl.run_scoped(products, plgpu.ACC((TILE, TOKENS), jnp.float32))

    def within(slot, v, y):
        """`y` and what the chunk's own tokens give, [c l]."""
        _, scores = _views(memory["scores"])
        scores = scores.at[slot] if block.reverse else scores.at[slot].T
        (y,) = _accumulate(lambda sums: plgpu.wgmma(sums[0], v.T, scores), y)
        return y

    def add_halves(i, y, slot, v):
        """The second half adds what is of the chunk's own tokens, the first one writes the sum."""

        @pl.when(half == 1)
        def _():
            whole = within(slot, v, y)

            @pl.when(i > 0)
            def _():
                plgpu.barrier_wait(memory["half_free"])

            memory["half"][...] = whole
            plgpu.barrier_arrive(memory["half_there"])

        @pl.when(half == 0)
        def _():
            plgpu.barrier_wait(memory["half_there"])
            whole = y + _load(memory["half"], _WGMMA)
            plgpu.barrier_arrive(memory["half_free"])
            store(i, whole)

    def store(i, y):
        tile = memory["y"].at[group]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tile.T[...] = plgpu.layout_cast(y.astype(jnp.bfloat16), plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, arrays["y"].at[block.row, block.tokens(i), block.head, rows])

    if "states" in arrays:
        states = arrays["states"].at[block.row, block.segment, block.head]
        state = tuple(
            _load(states.at[rows, columns(j)], _WGMMA, optimized=False) for j in range(shape.tiles)
        )
    else:
        zeros = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), _WGMMA)
        state = (zeros,) * shape.tiles
    state = jax.lax.fori_loop(0, block.n_chunks, chunk, state)
    after = arrays["after"].at[block.row, block.segment, block.head]
    for j, piece in enumerate(state):
        after[rows, columns(j)] = piece
    plgpu.wait_smem_to_gmem(0)


def _scores(
    q: Float[Array, "b t h a"],
    k: Float[Array, "b t h a"],
    log_decay: Float[Array, " h"],
    chunks: _Chunks,
) -> Float[Array, "b h n l m"]:
    """gamma^(l-m) q_l k_m of the tokens of each chunk, 0 where l does not see m; bfloat16."""
    b, _, h, width = q.shape
    n_chunks = chunks.count.shape[1]
    n_tiles = pl.cdiv(width, TILE)
    stages = min(4, n_tiles)  # 64 KiB: three blocks on a multiprocessor load while others compute

    def scores(q, k, log_decay, count, code, scores, q_tiles, k_tiles, tile, loaded):
        row, head = jax.lax.axis_index("rows"), jax.lax.axis_index("heads")
        chunk = jax.lax.axis_index("chunks")

        def load(j):
            slot = jax.lax.rem(j, stages)
            place = (row, pl.ds(chunk * TOKENS, TOKENS), head, pl.ds(j * TILE, TILE))
            for array, tiles in ((q, q_tiles), (k, k_tiles)):
                rows, _ = _views(tiles)
                plgpu.copy_gmem_to_smem(array.at[place], rows.at[slot], loaded.at[slot])

        def product(total):
            (_, q), (_, k) = _views(q_tiles), _views(k_tiles)

            @pl.loop(0, n_tiles)
            def _(j):
                slot = jax.lax.rem(j, stages)
                plgpu.barrier_wait(loaded.at[slot])
                plgpu.wgmma(total, q.at[slot], k.at[slot].T)
                plgpu.wgmma_wait(0)

                @pl.when(j + stages < n_tiles)
                def _():
                    load(j + stages)

            return total[...]

        pl.loop(0, stages)(load)
        products = pl.run_scoped(product, plgpu.ACC((TOKENS, TOKENS), jnp.float32))

        def of_pair(numbers):
            ends = (
                _load(numbers.at[row, chunk], layout, optimized=False)
                for layout in (_OF_ROW, _OF_COLUMN)
            )
            return [along(x) for along, x in zip((_along_rows, _along_columns), ends, strict=True)]

        (query, key), (query_code, key_code) = of_pair(count), of_pair(code)
        sees = (query_code == key_code) & (query_code > 0) & (query >= key)
        distance = (query - key).astype(jnp.float32)
        decay = jnp.exp(jnp.where(sees, log_decay[head] * distance, -jnp.inf))
        tile[...] = (products * decay).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, scores.at[row, head, chunk])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        scores,
        out_type=jax.ShapeDtypeStruct((b, h, n_chunks, TOKENS, TOKENS), q.dtype),
        scratch_types=(
            _operand(stages),
            _operand(stages),
            plgpu.SMEM((TOKENS, TOKENS), jnp.bfloat16, transforms=_ROWS),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ),
        grid=(n_chunks, h, b),
        grid_names=("chunks", "heads", "rows"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=_interpreter(),
    )(q, k, log_decay, chunks.count, chunks.code)


def _interpreter():
    return plgpu.InterpretGPUParams() if backend() == "cpu" else None


def _accumulate(products, *sums):
    """The float32 matrices `sums` and what `products` adds to accumulators of their values."""
    if not _interpreter():
        return pl.run_state(products)(tuple(map(plgpu.ACC.init, sums)))

    # The interpreter has accumulators that begin with 0 alone.
    def added(*accumulators):
        products(accumulators)
        return [accumulator[...] for accumulator in accumulators]

    zeros = [plgpu.ACC(x.shape, x.dtype) for x in sums]
    return tuple(x + y for x, y in zip(sums, pl.run_scoped(added, *zeros), strict=True))


# jax 0.10 wants an index there.
_EVERYTHING = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()


def _load(ref, layout, optimized=True):
    """A reference into registers; what lies in the GPU's memory has no `optimized` way."""
    return plgpu.load(ref, *_EVERYTHING, layout=layout, optimized=optimized)


def _along_rows(x):
    """A number for each row [m], as a matrix [m n]."""
    return jax.lax.broadcast_in_dim(x, (x.shape[0], TILE), [0])


def _along_columns(x):
    return jax.lax.broadcast_in_dim(x, (TILE, x.shape[0]), [1])


def _operand(*shape: int):
    """Tiles [*shape 64 64] that TMA fills and matrix products take.

    A tile is 64 rows of 128 swizzled bytes, seen in two ways: as rows, which may reach beyond the
    end of an array, and as the 8 blocks of 8 rows that matrix products want. Tiling (8, 64) leaves
    a matrix of 64 columns where it is, but TMA would want the arrays themselves to be so divided.
    """
    rows, operand = (
        plgpu.SMEM((*shape, TOKENS, TILE), jnp.bfloat16, transforms=transforms)
        for transforms in (_ROWS, _OPERAND)
    )
    # The interpreter knows no memory that two have in common, and of these no difference.
    return operand if backend() == "cpu" else plgpu.RefUnion(rows, operand)


def _views(tiles):
    """The rows and the operand that `_operand` made."""
    return (tiles, tiles) if backend() == "cpu" else tiles
