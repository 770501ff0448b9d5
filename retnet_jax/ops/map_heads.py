"""A function of each token and head, in one pass over memory: on TPUs a kernel.

XLA for TPU stores [b t h v] in tiles of heads and width, but [b t (h v)], which matrix products
read and write, in tiles of positions and width. It copies between the two, in float32 where a norm
needs that. The kernel reads and writes [b t (h v)], so that nothing is copied.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from retnet_jax.parallel.mesh import backend, many_devices
from retnet_jax.parallel.sharding import activation_spec, local_shape
from retnet_jax.shapes import Array

LANES = 128
VMEM = 16 * 2**20  # bytes that a kernel can use on any TPU
LONGEST_TILE = 256  # tokens


def map_heads(function: Callable, like: Array, *arrays: Array | None, outputs: int = 1) -> tuple:
    """Applies `function` to each token and head.

    Args:
      function: Function from arrays of one head, in float32 (or float64), to a tuple of [... v].
        For arrays [b t h v] it gets [... v], for [b t h] it gets [... 1], for [b t 1 k] [... k],
        and for None None.
      like: Array with the shape [b t h v] and dtype of the results.
      arrays: Arrays [b t h v] or [b t h], or [b t 1 k] that all heads share.
      outputs: Number of results of `function`.
    """
    if backend() == "tpu" and like.dtype == jnp.bfloat16 and like.shape[-1] % LANES == 0:
        return on_tpu(function, like, *arrays, outputs=outputs)
    wide = np.promote_types(np.float32, like.dtype)

    def operand(x):
        if x is None:
            return None
        return (x[..., None] if x.ndim == 3 else x).astype(wide)

    return tuple(x.astype(like.dtype) for x in function(*map(operand, arrays)))


def on_tpu(function: Callable, like: Array, *arrays: Array | None, outputs: int = 1) -> tuple:
    """`map_heads` as a kernel; a CPU interprets it."""
    given = [x for x in arrays if x is not None]

    def of_given(*operands):
        operands = iter(operands)
        return function(*(None if x is None else next(operands) for x in arrays))

    of_heads = PartitionSpec(*activation_spec("bth", like.shape[:3]))
    n_heads = local_shape("bth", like.shape[:3])[2]
    shared = [x.ndim == 4 and x.shape[2] == 1 for x in given]
    run = partial(_call, of_given, n_heads, shared, like.shape[3], like.dtype, outputs)
    if many_devices():
        run = jax.shard_map(
            run,
            in_specs=tuple(PartitionSpec(*of_heads[:2]) if x else of_heads for x in shared),
            out_specs=(of_heads,) * outputs,
            check_vma=False,
        )
    # Flattened outside the kernel too: XLA would store a product that is reshaped to [b t h v] in
    # tiles of heads and width.
    results = run(*(x.reshape(*x.shape[:2], -1) for x in given))
    return tuple(x.reshape(like.shape) for x in results)


def _call(function, n_heads, shared, width, dtype, outputs, *arrays):
    from jax.experimental import pallas as pl  # here, because models import this module everywhere
    from jax.experimental.pallas import tpu as pltpu

    b, t = arrays[0].shape[:2]
    out = jax.ShapeDtypeStruct((b, t, n_heads * width), dtype)
    moved = [*arrays, *[out] * outputs]
    lanes = sum(-(-x.shape[2] // LANES) * LANES for x in moved)
    size = LONGEST_TILE
    while size > 16 and 2 * size * lanes * dtype.itemsize > VMEM // 2:
        size //= 2
    size = min(size, t)
    tiles = [pl.BlockSpec((1, size, x.shape[2]), lambda row, step: (row, step, 0)) for x in moved]

    def kernel(*refs):
        inputs, results = refs[: len(arrays)], refs[len(arrays) :]
        for head in range(n_heads):
            operands = (
                ref[0, :, _lanes(ref, 1, 0) if one else _lanes(ref, n_heads, head)]
                for ref, one in zip(inputs, shared, strict=True)
            )
            values = function(*(x.astype(jnp.float32) for x in operands))
            for ref, y in zip(results, values, strict=True):
                ref[0, :, _lanes(ref, n_heads, head)] = y.astype(dtype)

    return pl.pallas_call(
        kernel,
        grid=(b, -(-t // size)),
        in_specs=tiles[: len(arrays)],
        out_specs=tiles[len(arrays) :],
        out_shape=(out,) * outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
        ),
        interpret=backend() == "cpu",
        name="map_heads",
    )(*arrays)


def _lanes(ref, n_heads: int, head: int) -> slice:
    """The lanes of one of the heads that share a tile."""
    width = ref.shape[2] // n_heads
    return slice(head * width, (head + 1) * width)
