"""How rows are divided into segments, and T over warpgroups."""

from typing import NamedTuple

from jax.experimental import pallas as pl

from retnet_jax.ops.retention.mosaic_gpu.memory import TILE, TOKENS

SHARED_MEMORY = 227 * 1024 - 6 * 1024  # bytes of a CTA, less what Mosaic and barriers take


class Tiling(NamedTuple):
    """How T [B A] is divided over warpgroups: 64 rows and up to 4 tiles of columns in each."""

    halves: int  # warpgroups that share rows: 1, or 2 where A is wider than 256
    groups: int  # groups of 64 rows in a CTA
    tiles: int  # tiles of columns in a warpgroup
    stages: int  # tiles of q and k, for each half, that the ring holds

    @staticmethod
    def of(contracted: int, written: int) -> "Tiling":
        """The tiling for T of these sizes."""
        n_tiles = pl.cdiv(contracted, TILE)
        halves = 1 if n_tiles <= 4 else 2
        groups = 2 if halves == 1 and written > TILE else 1
        tiles = pl.cdiv(n_tiles, halves)
        # Shared memory besides the ring: for two chunks each warpgroup's v, the scores and factors;
        # y of each group.
        tile = 2 * TOKENS * TILE
        others = 2 * ((halves * groups + 1) * tile + 1024) + groups * tile
        others += 2 * tile * (halves - 1)  # a float32 tile to add halves
        stages = min((SHARED_MEMORY - others) // (halves * tile), 4 * tiles)
        return Tiling(halves, groups, tiles, stages)

    @property
    def warpgroups(self) -> int:
        return self.halves * self.groups

    @property
    def rows(self) -> int:
        return self.groups * TILE

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
