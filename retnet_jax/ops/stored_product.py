"""The product of activations and a weight, read as decoding stores it: rows of floats or int8.

Decoding reads each weight once per token, so its time is that of reading them. Compilers may first
write a weight to memory in another dtype, which takes longer than the product; this module avoids
that on CPUs and GPUs.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from retnet_jax.shapes import Array, Float, Int

# The most vectors for which XLA on CPU multiplies int8 weights as integers. Measured with a
# weight of 4096 x 1024, times that of converting to float32 and multiplying: 0.1 for one vector,
# 0.25 for 8, 0.4 for 16, 0.9 for 64 (2 cores of an AMD EPYC, jax 0.10.2, 2026-11-26).
_MOST_DIGIT_VECTORS = 32

_DIGITS = 3
_BASE = 254


@jax.custom_vjp
def stored_product(
    x: Float[Array, "... i"], weight: Float[Array, "o i"] | Int[Array, "o i"]
) -> Float[Array, "... o"]:
    """The product x W^T, summed in float32, or float64 for such x.

    Args:
      x: Activations.
      weight: Weights in the dtype of x, or int8; each row has the weights of one output.
    """
    vectors, wide = x.size // x.shape[-1], np.promote_types(np.float32, x.dtype)
    on_cpu = on_gpu = _matrix_product
    if weight.dtype == jnp.int8 and wide == np.float32 and vectors <= _MOST_DIGIT_VECTORS:
        on_cpu = partial(_flattened, _digits_product)
    elif weight.dtype == x.dtype == jnp.bfloat16:
        on_cpu = partial(_flattened, _bfloat16_product)
    if vectors == 1:
        on_gpu = _sums
    if on_cpu is on_gpu:
        return _matrix_product(x, weight)
    return jax.lax.platform_dependent(
        x, weight, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=_matrix_product
    )


def _forward(x, weight):
    return stored_product(x, weight), (x, weight)


def _backward(operands, d_y):
    """The gradient of `_matrix_product`: digits, rounded, have none."""
    x, weight = operands
    if weight.dtype == jnp.int8:
        return *jax.vjp(lambda x: _matrix_product(x, weight), x)[1](d_y), None
    return jax.vjp(_matrix_product, x, weight)[1](d_y)


stored_product.defvjp(_forward, _backward)


def _matrix_product(x, weight):
    return _rows_product(x, weight.astype(x.dtype), np.promote_types(np.float32, x.dtype))


def _rows_product(x, weight, result):
    """The sums over the last axes, in the dtype `result`."""
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dimensions, preferred_element_type=result)


def _sums(x, weight):
    """For a single vector XLA on GPUs may first write bfloat16 weights to memory in float32.

    It does where they are large; sums read them as they are.
    """
    wide = np.promote_types(np.float32, x.dtype)
    return (x.astype(wide)[..., None, :] * weight.astype(wide)).sum(-1)


def _flattened(product, x, weight):
    """`product` of x as [n i]: for more axes XLA on CPU writes the weight transposed to memory."""
    flat = x.reshape(x.size // x.shape[-1], x.shape[-1])
    return product(flat, weight).reshape(*x.shape[:-1], len(weight))


def _bfloat16_product(x, weight):
    """XLA on CPU converts a bfloat16 weight for one vector, and not for two equal ones."""
    rows = jnp.broadcast_to(x, (2, x.shape[1])) if len(x) == 1 else x
    products = _rows_product(rows, weight, jnp.float32)
    return jax.lax.optimization_barrier(products)[: len(x)]


def _digits_product(x, weight):
    """The product with int8 weights by sums of integers, which need no converted weights.

    Each vector is written as its largest magnitude times digits in base 254, themselves int8. Three
    digits are within 2**-23 of the largest magnitude, so small numbers beside an outlier keep fewer
    bits than in float32. A vector that is not finite has a product that is not.
    """
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1, keepdims=True)
    unit = jnp.maximum(largest / 127, jnp.finfo(jnp.float32).tiny)
    rest, digits = x / unit, []
    for _ in range(_DIGITS):
        digit = jnp.round(rest)
        digits.append(digit.astype(jnp.int8))
        rest = (rest - digit) * _BASE
    sums = _rows_product(jnp.concatenate(digits), weight, jnp.int32)
    parts = jnp.split(jax.lax.optimization_barrier(sums).astype(jnp.float32), _DIGITS)
    places = [float(_BASE) ** -place for place in range(_DIGITS)]
    # The smallest first, so that least is lost.
    total = sum(part * place for part, place in reversed(list(zip(parts, places, strict=True))))
    return total * unit
