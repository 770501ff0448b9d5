"""Helpers of both kernels: tiles in shared memory, loads into registers, sums of products."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from retnet_jax.parallel.mesh import backend

TOKENS = 64  # tokens of a chunk: rows of a warpgroup's matrix product
TILE = 64  # columns of a tile

Ref = Any  # memory or a barrier that a kernel refers to; Pallas has no public type for them
ACC = plgpu.ACC  # pyright: ignore[reportPrivateImportUsage] (jax imports it without __all__)

WGMMA = plgpu.Layout.WGMMA
OF_ROW = WGMMA.reduce(1)  # a vector with a number for each row of a matrix
OF_COLUMN = WGMMA.reduce(0)
# jax 0.12 declares abstract methods that these classes get elsewhere.
SWIZZLE = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
AS_ROWS = (SWIZZLE,)
AS_OPERAND = (plgpu.TilingTransform((8, 64)), SWIZZLE)  # pyright: ignore[reportAbstractUsage]
AS_SUMS = (plgpu.TilingTransform((8, 32)), SWIZZLE)  # pyright: ignore[reportAbstractUsage]


def operands(*shape: int):
    """Shared memory for tiles [*shape 64 64], which TMA fills and matrix products read.

    A tile is 64 rows of 128 swizzled bytes, with two views: as rows, which may reach beyond the end
    of an array, and as the 8 groups of 8 rows that matrix products take. Tiling (8, 64) does not
    move the elements of a matrix of 64 columns, but TMA would require it of the arrays themselves.
    """
    rows, operand = (
        plgpu.SMEM((*shape, TOKENS, TILE), jnp.bfloat16, transforms=transforms)
        for transforms in (AS_ROWS, AS_OPERAND)
    )
    # The interpreter has no RefUnion, and does not distinguish the two views.
    return operand if interpreter() else plgpu.RefUnion(rows, operand)


def views(tiles):
    """The two views of tiles from `operands`: as rows, and as the operand of a product."""
    return (tiles, tiles) if interpreter() else tiles


# jax 0.10 requires an index argument, which later versions warn of.
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_EVERYTHING = ((),) if _INDEX is not None and _INDEX.default is inspect.Parameter.empty else ()


def load(ref, layout, optimized=True):
    """Loads a reference into registers; references to the GPU's memory need `optimized=False`."""
    return plgpu.load(ref, *_EVERYTHING, layout=layout, optimized=optimized)


def along_rows(x):
    """Broadcasts one number for each row [m] to a matrix [m n]."""
    return jax.lax.broadcast_in_dim(x, (x.shape[0], TILE), [0])


def along_columns(x):
    """Broadcasts one number for each column [n] to a matrix [m n]."""
    return jax.lax.broadcast_in_dim(x, (TILE, x.shape[0]), [1])


def accumulate(products, *sums) -> tuple[Any, ...]:
    """Adds matrix products to float32 matrices.

    Args:
      products: A function of accumulators with the values of `sums`, which adds products to them.
      sums: The matrices to begin with.

    Returns:
      The matrices with the products added.
    """
    if not interpreter():
        return pl.run_state(products)(tuple(map(ACC.init, sums)))

    # In the interpreter accumulators always begin with 0.
    def added(*accumulators):
        products(accumulators)
        return [accumulator[...] for accumulator in accumulators]

    zeros = [ACC(x.shape, x.dtype) for x in sums]
    return tuple(x + y for x, y in zip(sums, pl.run_scoped(added, *zeros), strict=True))


def interpreter():
    """Pallas's interpreter, where the program runs on a CPU; None on a GPU."""
    if backend() != "cpu":
        return None
    return plgpu.InterpretGPUParams()  # pyright: ignore[reportAttributeAccessIssue] (jax 0.11)
