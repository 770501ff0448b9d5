"""A hint to XLA that the models and the loss share."""

import jax


def materialized(x):
    """`x`, any tree of arrays, written to memory before it is used, on CPU.

    The gradient of a matrix product with a weight multiplies a transposed operand. XLA on CPU fuses
    the elementwise work that leads to the operand with the transposition, and runs both at the
    speed of strided writes: 60 of the 345 ms of a training step (4 layers, d 128, 2048 tokens) for
    one array of 8 million numbers. Other backends fuse well and see no barrier.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
