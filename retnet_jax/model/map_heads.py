"""A function of each token and head, in one pass over memory: on TPUs a kernel.

XLA for TPU lays [b t h v] out in tiles of heads and width, and [b t (h v)], which matrix products
read and write, in tiles of positions and width. Between the two it copies, in float32 where a norm
wants it. The kernel reads and writes [b t (h v)] and leaves everything in its place.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from retnet_jax.shapes import Array
from retnet_jax.sharding import backend, layout, local_shape, many_devices

LANES = 128
VMEM = 16 * 2**20  # bytes that a kernel can have on all TPUs
LONGEST_BLOCK = 256  # tokens


def map_heads(function: Callable, like: Array, *arrays: Array | None, outputs: int = 1) -> tuple:
    """`function` of each token and head.

    Args:
      function: of one head's [... v] in float32 (or float64), `[... 1]` where it has one number a
        head, and [... k] where all heads share it; to a tuple of [... v]. `None` comes as it is.
      like: the shape [b t h v] and dtype of the results.
      arrays: [b t h v], [b t h], or [b t 1 k] for all heads.
      outputs: results that `function` returns.
    """
    if backend() == "tpu" and like.dtype == jnp.bfloat16 and like.shape[-1] % LANES == 0:
        return on_tpu(function, like, *arrays, outputs=outputs)
    wide = jnp.promote_types(jnp.float32, like.dtype)

    def operand(x):
        if x is None:
            return None
        return (x[..., None] if x.ndim == 3 else x).astype(wide)

    return tuple(x.astype(like.dtype) for x in function(*map(operand, arrays)))


def on_tpu(function: Callable, like: Array, *arrays: Array | None, outputs: int = 1) -> tuple:
    """`map_heads` as a kernel, which a CPU interprets."""
    run = partial(_call, function, outputs)
    if not many_devices():
        return run(like, *arrays)
    places = layout("bth.", like.shape)
    of_shared = PartitionSpec(*places[:2], None, None)

    def place(x):
        if x is None:
            return None
        return of_shared if x.ndim == 4 and x.shape[2] == 1 else PartitionSpec(*places[: x.ndim])

    empty = jax.ShapeDtypeStruct(local_shape("bth.", like.shape), like.dtype)
    return jax.shard_map(
        partial(run, empty),
        in_specs=tuple(map(place, arrays)),
        out_specs=(places,) * outputs,
        check_vma=False,
    )(*arrays)


def _call(function, outputs, like, *arrays):
    b, t, h, width = like.shape
    given = [x for x in arrays if x is not None]
    widths = [math.prod(x.shape[2:]) for x in given] + [h * width] * outputs
    lanes = sum(-(-w // LANES) * LANES for w in widths)
    size = LONGEST_BLOCK
    while size > 16 and 2 * size * lanes * like.dtype.itemsize > VMEM // 2:
        size //= 2
    size = min(size, t)
    blocks = [pl.BlockSpec((1, size, w), lambda row, step: (row, step, 0)) for w in widths]

    def kernel(*refs):
        for head in range(h):
            operands = [_of_head(ref, x, head) for ref, x in zip(refs, given, strict=False)]
            values = iter(operands)
            results = function(*(None if x is None else next(values) for x in arrays))
            for ref, y in zip(refs[len(given) :], results, strict=True):
                ref[0, :, head * width : (head + 1) * width] = y.astype(ref.dtype)

    results = pl.pallas_call(
        kernel,
        grid=(b, -(-t // size)),
        in_specs=blocks[: len(given)],
        out_specs=blocks[len(given) :],
        out_shape=[jax.ShapeDtypeStruct((b, t, h * width), like.dtype)] * outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*given, *[like] * outputs)),
        ),
        interpret=backend() == "cpu",
        name="map_heads",
    )(*(x.reshape(b, t, -1) for x in given))
    return tuple(x.reshape(like.shape) for x in results)


def _of_head(ref, x, head: int):
    """What a block has of one head, in float32."""
    width = 1 if x.ndim == 3 else x.shape[3]
    start = 0 if x.ndim == 4 and x.shape[2] == 1 else head * width
    return ref[0, :, start : start + width].astype(jnp.float32)
