"""The limits of the device, measured by the simplest programs."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp

from benchmarks.accelerator.cases import Case
from benchmarks.accelerator.timing import device_time, memory_limit


def cases(tiny: bool) -> Iterator[Case]:
    """Copying an array (bytes read and written), and a product of square bfloat16 matrices."""
    count = 2**20 if tiny else min(2**30, (memory_limit() or 2**35) // 64)
    width = 256 if tiny else 8192
    yield Case("copy", partial(bandwidth, jnp.copy, count))
    yield Case("negation", partial(bandwidth, jnp.negative, count))
    yield Case("matrix", partial(matrix_rate, width))


def bandwidth(function, count: int) -> dict:
    """The record of a function that reads and writes `count` bfloat16 numbers."""
    sets = [(x,) for x in _random((count,))]
    found = device_time(function, sets).times
    moved = 2 * sets[0][0].nbytes
    return found | {"bytes": moved, "bytes_per_second": moved / (found["ms"] / 1000)}


def matrix_rate(width: int) -> dict:
    """The record of a matrix product of random numbers; zeros would be faster."""
    sets = [(x, x) for x in _random((width, width))]
    found = device_time(jnp.matmul, sets).times
    flops = 2 * width**3
    return found | {"flops": flops, "flops_per_second": flops / (found["ms"] / 1000)}


def _random(shape: tuple[int, ...]) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) for seed in range(2)]
