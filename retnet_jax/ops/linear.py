"""The product of activations and a weight, with a gradient that is fast in XLA on CPU."""

import jax
import jax.numpy as jnp

from retnet_jax.shapes import Array, Float


@jax.custom_vjp
def matrix_product(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """The product x W. Its gradient is that of autodiff, except for `materialized`."""
    return x @ kernel


def _forward(x, kernel):
    return x @ kernel, (x, kernel)


def _backward(operands, d_y):
    x, kernel = operands
    x, d_y = materialized((x, d_y))
    # Not flattened to rows: both the rows and their positions may be split over devices.
    leading = tuple(range(x.ndim - 1))
    return d_y @ kernel.T, jnp.tensordot(x, d_y, axes=(leading, leading))


matrix_product.defvjp(_forward, _backward)


def materialized(x):
    """`x`, any tree of arrays; on CPU it is written to memory before it is used.

    The gradient of a matrix product multiplies a transposed operand. XLA on CPU fuses the
    elementwise operations that compute the operand with the transposition, and runs both at the
    speed of strided writes: 60 of the 345 ms of a training step (4 layers, d 128, 2048 tokens) for
    one array of 8 million numbers. Other backends fuse well and get no barrier.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
