"""The kernel of the recurrence over the chunks of rows; the package's docstring has the equations.

A CTA (cooperative thread array) processes the chunks of one segment, for one head and some columns
of the output. Its computing warpgroups hold T in registers; one more warpgroup loads their inputs.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from retnet_jax.ops.retention.mosaic_gpu import memory
from retnet_jax.ops.retention.mosaic_gpu.memory import (
    ACC,
    AS_OPERAND,
    AS_ROWS,
    AS_SUMS,
    OF_COLUMN,
    OF_ROW,
    TILE,
    TOKENS,
    WGMMA,
    Ref,
    accumulate,
    along_columns,
    along_rows,
    load,
    operands,
    views,
)
from retnet_jax.ops.retention.mosaic_gpu.tiling import Segments, Tiling, Work
from retnet_jax.shapes import Array, Float


# A function of its own in the program, so that layers that are written out share one kernel: each
# takes about a second to lower.
@jax.jit(static_argnames=("length", "reverse", "tiling", "interpret"))
def walk_segments(
    q: Float[Array, "b t h a"] | None,
    k: Float[Array, "b t h a"],
    v: Float[Array, "b t h c"],
    scores: Float[Array, "b h n l m"] | None,
    factors: Float[Array, "b h n 3 l"],
    states: Float[Array, "b s h rows columns"] | None,
    length: int,
    reverse: bool,
    tiling: Tiling,
    interpret: Any,
) -> tuple[Float[Array, "b t h c"] | None, Float[Array, "b r h rows columns"]]:
    """The recurrence of segments of `length` chunks each.

    Args:
      q: Array that reads T; None, together with scores and states: segments begin empty, and only
        the states they leave are computed.
      k: Array that updates of T are outer products with.
      v: Array that is written to T, and that P multiplies.
      scores: P of each chunk, rows for queries.
      factors: Powers of gamma for what tokens read, for what they write, and across each chunk.
      states: T before each segment, padded to whole tiles.
      length: Chunks in a segment; the last segment of a row may have fewer.
      reverse: Whether segments are processed from the last chunk to the first.
      tiling: Division of the work.
      interpret: `memory.interpreter()`; static, so that jax.jit keeps a trace for each interpreter.

    Returns:
      y, None without q, and T after each segment, like `states`.
    """
    b, _, h, _ = k.shape
    written = v.shape[3]
    segments = Segments.of(factors.shape[2], length, reverse, states_only=q is None)
    after = (b, segments.n, h, *tiling.whole(written))
    arrays = _Arrays(
        q,
        k,
        v,
        scores,
        factors,
        states,
        after=jax.ShapeDtypeStruct(after, jnp.float32),
        y=None if q is None else jax.ShapeDtypeStruct(v.shape, v.dtype),
    )
    structure = jax.tree.structure(arrays)

    def walk(*refs, **shared):
        _walk(jax.tree.unflatten(structure, refs), _Shared(**shared), tiling, segments)

    found = plgpu.kernel(
        walk,
        out_type=tuple(jax.tree.leaves((arrays.after, arrays.y))),
        scratch_types=_Shared.of(tiling, reads=q is not None),
        grid=(pl.cdiv(written, tiling.cluster * tiling.rows), h, b * segments.n),
        grid_names=("columns", "heads", "segments"),
        cluster=(tiling.cluster,),
        cluster_names=("cluster",),
        num_threads=tiling.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(*jax.tree.leaves(arrays._replace(after=None, y=None)))
    return (None if q is None else found[1]), found[0]


def _walk(arrays: "_Arrays", shared: "_Shared", tiling: Tiling, segments: Segments) -> None:
    """The kernel: what each warpgroup of a CTA does."""
    work = Work.of_this_cta(tiling, segments)
    warpgroup = jax.lax.axis_index("warpgroup")

    @pl.when(warpgroup < tiling.warpgroups)
    def _():
        if tiling.warpgroups > 1:
            plgpu.set_max_registers(240, action="increase")
        _Computing.of(arrays, shared, work, warpgroup).walk()

    @pl.when(warpgroup == tiling.warpgroups)
    def _():
        if tiling.warpgroups > 1:
            plgpu.set_max_registers(24, action="decrease")
        _Loading(arrays, shared, work).walk()


class _Arrays(NamedTuple):
    """Arrays in the GPU's memory: the arguments of `walk_segments` and its results.

    Outside the kernel they are arrays, or shapes of results; inside it they are references.
    """

    q: Ref | None
    k: Ref
    v: Ref
    scores: Ref | None
    factors: Ref
    states: Ref | None
    after: Ref
    y: Ref  # None without q


class _Shared(NamedTuple):
    """Shared memory and barriers of a CTA."""

    ring: Ref  # tiles of q and k
    v: Ref  # v of `Tiling.chunks` chunks, as are factors and scores
    factors: Ref
    chunk_loaded: Ref
    chunk_free: Ref
    tile_loaded: Ref
    tiles_free: Ref  # all tiles of q, and all tiles of k
    # Where there are queries.
    scores: Ref = None
    y: Ref = None
    registers: Ref = None  # for the interpreter, which cannot take a left operand from registers
    # Where two warpgroups add what they read from T.
    half: Ref = None
    half_there: Ref = None
    half_free: Ref = None

    @staticmethod
    def of(tiling: Tiling, reads: bool) -> dict[str, Any]:
        """The memory to allocate, by field."""
        each, chunks, bfloat16 = tiling.warpgroups, tiling.chunks, jnp.bfloat16
        tiles = tiling.tiles * (1 + reads)  # of q and k in a chunk
        in_ring = (tiling.chunks_ahead, tiles)
        free = plgpu.Barrier
        if tiling.cluster > 1:  # what all CTAs receive is overwritten when all have read it
            free = partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
        found = _Shared(
            ring=operands(tiling.chunks_ahead, tiles, tiling.halves),
            v=operands(chunks, each),
            factors=plgpu.SMEM((chunks, 3, TOKENS), jnp.float32),
            chunk_loaded=plgpu.Barrier(num_arrivals=each + 1 + reads, num_barriers=chunks),
            chunk_free=free(num_arrivals=each, num_barriers=chunks),
            tile_loaded=plgpu.Barrier(num_arrivals=tiling.halves, num_barriers=in_ring),
            tiles_free=free(num_arrivals=each, num_barriers=(tiling.chunks_ahead, 1 + reads)),
        )
        if reads:
            y = plgpu.SMEM((tiling.groups, TOKENS, TILE), bfloat16, transforms=AS_ROWS)
            found = found._replace(scores=operands(chunks), y=y)
        if reads and memory.interpreter():
            registers = plgpu.SMEM((each, TILE, TILE), bfloat16, transforms=AS_OPERAND)
            found = found._replace(registers=registers)
        if reads and tiling.halves == 2:
            found = found._replace(
                half=plgpu.SMEM((TILE, TOKENS), jnp.float32, transforms=AS_SUMS),
                half_there=plgpu.Barrier(),
                half_free=plgpu.Barrier(),
            )
        return {name: each for name, each in found._asdict().items() if each is not None}


class _Loading(NamedTuple):
    """The loading warpgroup: loads all tiles of a segment, as far ahead as shared memory allows."""

    arrays: _Arrays
    shared: _Shared
    work: Work

    def walk(self) -> None:
        n_chunks, tiling = self.work.n_chunks, self.work.tiling
        jax.lax.fori_loop(0, n_chunks, self._chunk, None)
        # A CTA must not end before the others of its cluster have arrived at all its barriers.
        pl.loop(n_chunks, n_chunks + tiling.chunks)(self._await_chunk)

        @pl.loop(n_chunks, n_chunks + tiling.chunks_ahead)
        def _(i):
            for n in range(len(self._read)):
                self._await_tiles(i, n)

    @property
    def _read(self) -> list[Ref]:
        return [array for array in (self.arrays.q, self.arrays.k) if array is not None]

    def _await_chunk(self, i) -> None:
        """Waits until the memory for the i-th chunk is free."""
        chunks = self.work.tiling.chunks

        @pl.when(i >= chunks)
        def _():
            plgpu.barrier_wait(self.shared.chunk_free.at[i % chunks])

    def _await_tiles(self, i, n: int) -> None:
        """Waits until the memory for q (n = 0) or k of the i-th chunk is free."""
        ahead = self.work.tiling.chunks_ahead

        @pl.when(i >= ahead)
        def _():
            plgpu.barrier_wait(self.shared.tiles_free.at[i % ahead, n])

    def _load_for_cluster(self, source, target, barrier) -> None:
        """Loads what all CTAs of the cluster need: each loads a part for all."""
        axes = "cluster" if self.work.tiling.cluster > 1 else None
        plgpu.copy_gmem_to_smem(source, target, barrier, collective_axes=axes)

    def _chunk(self, i, _) -> None:
        arrays, shared, work = self
        slot = i % work.tiling.chunks
        loaded = shared.chunk_loaded.at[slot]
        number = work.chunk(i)

        self._await_chunk(i)
        plgpu.copy_gmem_to_smem(
            arrays.factors.at[work.row, work.head, number], shared.factors.at[slot], loaded
        )
        if arrays.scores is not None:
            rows, _ = views(shared.scores)
            self._load_for_cluster(
                arrays.scores.at[work.row, work.head, number], rows.at[slot], loaded
            )
        rows, _ = views(shared.v)
        for warpgroup in range(work.tiling.warpgroups):
            columns = pl.ds(work.columns + warpgroup // work.tiling.halves * TILE, TILE)
            plgpu.copy_gmem_to_smem(
                arrays.v.at[work.row, work.tokens(i), work.head, columns],
                rows.at[slot, warpgroup],
                loaded,
            )
        for n, array in enumerate(self._read):
            self._await_tiles(i, n)
            pl.loop(0, work.tiling.tiles)(partial(self._tile, array, n, i))

    def _tile(self, array, n: int, i, j) -> None:
        """Loads the j-th tile of columns of a chunk of q or k, for each half, into the ring."""
        shared, work, tiling = self.shared, self.work, self.work.tiling
        slot, tile = tiling.place(i, n, j)

        rows, _ = views(shared.ring)
        for half in range(tiling.halves):
            columns = pl.ds((half * tiling.tiles + j) * TILE, TILE)
            self._load_for_cluster(
                array.at[work.row, work.tokens(i), work.head, columns],
                rows.at[slot, tile, half],
                shared.tile_loaded.at[slot, tile],
            )


class _Computing(NamedTuple):
    """A computing warpgroup: 64 rows of T, or half of their columns."""

    arrays: _Arrays
    shared: _Shared
    work: Work
    warpgroup: Array
    group: Array
    half: Array
    rows: Any  # rows of T and columns of y

    @staticmethod
    def of(arrays: _Arrays, shared: _Shared, work: Work, warpgroup) -> "_Computing":
        group, half = jnp.divmod(warpgroup, work.tiling.halves)
        rows = pl.ds(work.columns + group * TILE, TILE)
        return _Computing(arrays, shared, work, warpgroup, group, half, rows)

    def walk(self) -> None:
        arrays, work = self.arrays, self.work
        n_tiles = work.tiling.tiles
        if arrays.states is not None:
            states = arrays.states.at[work.row, work.segment, work.head]
            state = tuple(
                load(states.at[self.rows, self._columns(j)], WGMMA, optimized=False)
                for j in range(n_tiles)
            )
        else:
            zeros = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), WGMMA)
            state = (zeros,) * n_tiles
        state = jax.lax.fori_loop(0, work.n_chunks, self._chunk, state)
        if self.shared.half_free is not None:

            @pl.when(self.half == 1)
            def _():
                plgpu.barrier_wait(self.shared.half_free)

        after = arrays.after.at[work.row, work.segment, work.head]
        for j, piece in enumerate(state):
            after[self.rows, self._columns(j)] = piece
        plgpu.wait_smem_to_gmem(0)

    def _columns(self, j: int):
        """The columns of T in the j-th tile of this half."""
        return pl.ds((self.half * self.work.tiling.tiles + j) * TILE, TILE)

    def _chunk(self, i, state: tuple) -> tuple:
        """Writes y of the i-th chunk, if there are queries, and returns T after the chunk."""
        tiling, shared, reads = self.work.tiling, self.shared, self.arrays.y is not None
        slot = i % tiling.chunks
        plgpu.barrier_wait(shared.chunk_loaded.at[slot])
        _, v = views(shared.v)
        v = v.at[slot, self.warpgroup]
        if reads:
            y = along_columns(self._factor(slot, 0, OF_COLUMN)) * self._from_state(i, state)
            if tiling.halves == 1:
                y = self._within(slot, v, y).astype(jnp.bfloat16)
            else:
                self._add_halves(i, y, slot, v)
        values = load(v, WGMMA).astype(jnp.float32) * along_rows(self._factor(slot, 1, OF_ROW))
        across = along_rows(self._factor(slot, 2, OF_ROW))
        v[...] = values.astype(jnp.bfloat16)
        plgpu.commit_smem()  # after the last read of the memory that TMA will overwrite

        def update(state):
            for j, piece in enumerate(state):
                plgpu.wgmma(piece, v.T, self._tile(i, int(reads), j))
            if reads and tiling.halves == 1:
                self._store(i, y)  # while the products are computed

        state = accumulate(update, *(across * piece for piece in state))
        self._free(i, int(reads))
        plgpu.barrier_arrive(shared.chunk_free.at[slot])
        return state

    def _factor(self, slot, n: int, layout):
        """Powers of gamma of a chunk's tokens: 0 for reading T, 1 for writing it, 2 across."""
        return load(self.shared.factors.at[slot, n], layout)

    def _from_state(self, i, state: tuple):
        """The product T q^T [c l]: what the queries read from T."""
        registers = self.shared.registers

        def products(y):
            for j, piece in enumerate(state):
                q = self._tile(i, 0, j)
                left = piece.astype(jnp.bfloat16)
                if registers is not None:
                    registers.at[self.warpgroup][...] = left
                    left = registers.at[self.warpgroup]
                plgpu.wgmma(y, left, q.T)
                plgpu.wgmma_wait(0)  # two products at a time would spill registers
            self._free(i, 0)
            return y[...]

        return pl.run_scoped(products, ACC((TILE, TOKENS), jnp.float32))

    def _tile(self, i, n: int, j: int):
        """The j-th tile of q (n = 0) or k of the i-th chunk, once it is loaded."""
        slot, tile = self.work.tiling.place(i, n, j)
        _, ring = views(self.shared.ring)
        plgpu.barrier_wait(self.shared.tile_loaded.at[slot, tile])
        return ring.at[slot, tile, self.half]

    def _free(self, i, n: int) -> None:
        """Tells that q (n = 0) or k of the i-th chunk has been read."""
        slot = i % self.work.tiling.chunks_ahead
        plgpu.barrier_arrive(self.shared.tiles_free.at[slot, n])

    def _within(self, slot, v, y):
        """`y` plus the contribution of the chunk's own tokens, [c l]."""
        _, scores = views(self.shared.scores)
        scores = scores.at[slot] if self.work.reverse else scores.at[slot].T
        (y,) = accumulate(lambda sums: plgpu.wgmma(sums[0], v.T, scores), y)
        return y

    def _store(self, i, y) -> None:
        work, tile = self.work, self.shared.y.at[self.group]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        tile.T[...] = plgpu.layout_cast(y, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        place = (work.row, work.tokens(i), work.head, self.rows)
        plgpu.copy_smem_to_gmem(tile, self.arrays.y.at[place])

    def _add_halves(self, i, y, slot, v) -> None:
        """The second half adds the chunk's own tokens; the first half writes the sum of both."""
        shared = self.shared

        @pl.when(self.half == 1)
        def _():
            whole = self._within(slot, v, y)

            @pl.when(i > 0)
            def _():
                plgpu.barrier_wait(shared.half_free)

            shared.half[...] = whole
            plgpu.barrier_arrive(shared.half_there)

        @pl.when(self.half == 0)
        def _():
            plgpu.barrier_wait(shared.half_there)
            whole = y + load(shared.half, WGMMA)
            plgpu.barrier_arrive(shared.half_free)
            self._store(i, whole.astype(jnp.bfloat16))
