"""What the kernels share: tiles in shared memory, loads into registers, sums of matrix products."""

import inspect

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from retnet_jax.parallel.mesh import backend

TOKENS = 64  # of a chunk: rows of a warpgroup's matrix product
TILE = 64  # columns of a tile

WGMMA = plgpu.Layout.WGMMA
OF_ROW = WGMMA.reduce(1)  # a vector with a number for each row of a matrix
OF_COLUMN = WGMMA.reduce(0)
SWIZZLE = plgpu.SwizzleTransform(128)
AS_ROWS = (SWIZZLE,)
AS_OPERAND = (plgpu.TilingTransform((8, 64)), SWIZZLE)


def operands(*shape: int):
    """Tiles [*shape 64 64] that TMA fills and matrix products take.

    A tile is 64 rows of 128 swizzled bytes, seen in two ways: as rows, which may reach beyond the
    end of an array, and as the 8 blocks of 8 rows that matrix products want. Tiling (8, 64) leaves
    a matrix of 64 columns where it is, but TMA would want the arrays themselves to be so divided.
    """
    rows, operand = (
        plgpu.SMEM((*shape, TOKENS, TILE), jnp.bfloat16, transforms=transforms)
        for transforms in (AS_ROWS, AS_OPERAND)
    )
    # The interpreter knows no memory that two have in common, and of these no difference.
    return operand if backend() == "cpu" else plgpu.RefUnion(rows, operand)


def views(tiles):
    """The rows and the operand that `operands` made."""
    return (tiles, tiles) if backend() == "cpu" else tiles


# jax 0.10 wants an index there.
_EVERYTHING = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()


def load(ref, layout, optimized=True):
    """A reference into registers; what lies in the GPU's memory has no `optimized` way."""
    return plgpu.load(ref, *_EVERYTHING, layout=layout, optimized=optimized)


def along_rows(x):
    """A number for each row [m], as a matrix [m n]."""
    return jax.lax.broadcast_in_dim(x, (x.shape[0], TILE), [0])


def along_columns(x):
    """A number for each column [n], as a matrix [m n]."""
    return jax.lax.broadcast_in_dim(x, (TILE, x.shape[0]), [1])


def accumulate(products, *sums):
    """The float32 matrices `sums` and what `products` adds to accumulators of their values."""
    if not interpreter():
        return pl.run_state(products)(tuple(map(plgpu.ACC.init, sums)))

    # The interpreter has accumulators that begin with 0 alone.
    def added(*accumulators):
        products(accumulators)
        return [accumulator[...] for accumulator in accumulators]

    zeros = [plgpu.ACC(x.shape, x.dtype) for x in sums]
    return tuple(x + y for x, y in zip(sums, pl.run_scoped(added, *zeros), strict=True))


def interpreter():
    """Pallas's interpreter, where the program runs on a CPU; None on a GPU."""
    return plgpu.InterpretGPUParams() if backend() == "cpu" else None
