"""The product of activations with a weight, with a gradient that XLA on CPU runs fast."""

import jax
import jax.numpy as jnp

from retnet_jax.shapes import Array, Float


@jax.custom_vjp
def matrix_product(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    """The product x W. Its gradient is what autodiff would give, but for `materialized`."""
    return x @ kernel


def _forward(x, kernel):
    return x @ kernel, (x, kernel)


def _backward(operands, d_y):
    x, kernel = operands
    x, d_y = materialized((x, d_y))
    # Not of rows flattened: a row's positions and the rows may be split over devices, both.
    leading = tuple(range(x.ndim - 1))
    return d_y @ kernel.T, jnp.tensordot(x, d_y, axes=(leading, leading))


matrix_product.defvjp(_forward, _backward)


def materialized(x):
    """`x`, any tree of arrays, written to memory before it is used, on CPU.

    The gradient of a matrix product with a weight multiplies a transposed operand. XLA on CPU fuses
    the elementwise work that leads to the operand with the transposition, and runs both at the
    speed of strided writes: 60 of the 345 ms of a training step (4 layers, d 128, 2048 tokens) for
    one array of 8 million numbers. Other backends fuse well and see no barrier.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
