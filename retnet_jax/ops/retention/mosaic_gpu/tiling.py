"""How rows are divided into segments, T over warpgroups, and the work over CTAs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from retnet_jax.ops.retention.mosaic_gpu.memory import TILE, TOKENS
from retnet_jax.shapes import Array

SHARED_MEMORY = 227 * 1024 - 6 * 1024  # bytes of a CTA, less what Mosaic and barriers take
MOST_WARPGROUPS = 2  # that compute, with up to 240 registers a thread


class Tiling(NamedTuple):
    """How T [B A] is divided over warpgroups: 64 rows and up to 4 tiles of columns in each.

    The first two follow from A. The others have no effect on the results, to the bit.
    """

    halves: int  # warpgroups that share rows: 1, or 2 where A is wider than 256
    tiles: int  # tiles of columns in a warpgroup
    groups: int  # groups of 64 rows in a CTA
    cluster: int  # CTAs that load q, k and P together, because they differ only in their columns
    chunks_ahead: int  # chunks whose tiles of q and k the ring holds

    @staticmethod
    def of(contracted: int, written: int) -> "Tiling":
        """The tiling for T of these sizes where `tuned.json` has none.

        On an H100, forward and backward of heads of 256/512 took 5.8 ms without clusters, 4.4 ms
        with clusters of 2 and 4.8 ms with clusters of 4 (65,536 tokens of 8 heads).
        """
        n_tiles = pl.cdiv(contracted, TILE)
        halves = 1 if n_tiles <= 4 else 2
        groups = 2 if halves == 1 and written > TILE else 1
        cluster = 1 + (pl.cdiv(written, groups * TILE) % 2 == 0)
        found = Tiling(halves, pl.cdiv(n_tiles, halves), groups, cluster, chunks_ahead=2)
        # Whole chunks, so that each tile of a chunk has its own place.
        return found if found.shared_memory <= SHARED_MEMORY else found._replace(chunks_ahead=1)

    def refused(self, written: int) -> str | None:
        """Why the kernel cannot run with this tiling; None if it can."""
        if self.warpgroups > MOST_WARPGROUPS:
            return (
                f"{self.warpgroups} computing warpgroups; a CTA has registers for {MOST_WARPGROUPS}"
            )
        if (ctas := pl.cdiv(written, self.rows)) % self.cluster:
            return f"{ctas} CTAs for a head do not divide into clusters of {self.cluster}"
        if self.shared_memory > SHARED_MEMORY:
            return f"{self.shared_memory} bytes of shared memory; a CTA has {SHARED_MEMORY}"
        return None

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory, without what Mosaic and barriers take."""
        tile = 2 * TOKENS * TILE
        ring = self.chunks_ahead * 2 * self.tiles * self.halves * tile
        chunk = (self.warpgroups + 1) * tile + 1024  # each warpgroup's v, the scores, the factors
        half = 2 * tile * (self.halves - 1)  # a float32 tile to add halves
        return ring + self.chunks * chunk + self.groups * tile + half

    @property
    def chunks(self) -> int:
        """Chunks whose v, scores and factors are in shared memory."""
        return max(2, self.chunks_ahead)

    @property
    def warpgroups(self) -> int:
        return self.halves * self.groups

    @property
    def rows(self) -> int:
        return self.groups * TILE

    def place(self, i, n: int, j):
        """Where the ring holds the j-th tile of q (n = 0) or k of the i-th chunk.

        Tiles rotate from chunk to chunk. If they had fixed places, the compiler would keep the
        places' descriptors in registers, and spill others.
        """
        return i % self.chunks_ahead, n * self.tiles + (i + j) % self.tiles

    def whole(self, written: int) -> tuple[int, int]:
        """The rows and columns of T, padded to whole CTAs."""
        return pl.cdiv(written, self.rows) * self.rows, self.halves * self.tiles * TILE


class Segments(NamedTuple):
    """The segments of each row that are processed."""

    n: int
    first: int  # number of the first segment in its row
    length: int  # chunks in a segment
    n_chunks: int  # in a row
    reverse: bool

    @staticmethod
    def of(n_chunks: int, length: int, reverse: bool, states_only: bool) -> "Segments":
        n = pl.cdiv(n_chunks, length)
        if states_only:  # no segment begins with the state of the last one
            return Segments(n - 1, int(reverse), length, n_chunks, reverse)
        return Segments(n, 0, length, n_chunks, reverse)


class Work(NamedTuple):
    """The part of the work that one CTA does."""

    tiling: Tiling
    reverse: bool
    row: Array
    head: Array
    segment: Array
    columns: Array  # first column that it writes
    start: Array  # first chunk
    n_chunks: Array

    @staticmethod
    def of_this_cta(tiling: Tiling, segments: Segments) -> "Work":
        row, segment = jnp.divmod(jax.lax.axis_index("segments"), segments.n)
        start = (segment + segments.first) * segments.length
        columns = jax.lax.axis_index("columns") * tiling.cluster + jax.lax.axis_index("cluster")
        return Work(
            tiling=tiling,
            reverse=segments.reverse,
            row=row,
            head=jax.lax.axis_index("heads"),
            segment=segment,
            columns=columns * tiling.rows,
            start=start,
            n_chunks=jnp.minimum(segments.length, segments.n_chunks - start),
        )

    def chunk(self, i):
        """The number in its row of the i-th chunk in the order of processing."""
        return self.start + (self.n_chunks - 1 - i if self.reverse else i)

    def tokens(self, i):
        """The tokens of the i-th chunk in the order of processing."""
        return pl.ds(self.chunk(i) * TOKENS, TOKENS)
