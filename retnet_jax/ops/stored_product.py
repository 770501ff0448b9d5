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

# Up to so many vectors XLA on CPU multiplies int8 weights faster as integers. Measured with a
# weight of 4096 x 1024, times that of converting to float32 and multiplying: 0.1 for one vector,
# 0.25 for 8, 0.4 for 16, 0.9 for 64 (2 cores of an AMD EPYC, jax 0.10.2, 2026-11-26).
_MOST_DIGIT_VECTORS = 32

_DIGITS = 3
_BASE = 254


def stored_product(
    x: Float[Array, "... i"], weight: Float[Array, "o i"] | Int[Array, "o i"]
) -> Float[Array, "... o"]:
    """The product x W^T, summed in float32, or float64 for such x.

    Args:
      x: Activations.
      weight: Weights in the dtype of x, or int8; each row has the weights of one output.
    """
    vectors, wide = x.size // x.shape[-1], np.promote_types(np.float32, x.dtype)
    general = partial(_matrix_product, wide=wide)
    on_cpu = general
    if weight.dtype == jnp.int8 and wide == np.float32 and vectors <= _MOST_DIGIT_VECTORS:
        on_cpu = partial(_flattened, _digits_product)
    elif weight.dtype == jnp.bfloat16:
        on_cpu = partial(_flattened, _bfloat16_product)
    on_gpu = partial(_sums, wide=wide) if vectors == 1 else general
    if on_cpu is general and on_gpu is general:
        return general(x, weight)
    return jax.lax.platform_dependent(
        x, weight, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=general
    )


def _matrix_product(x, weight, wide):
    return _rows_product(x, weight.astype(x.dtype), wide)


def _rows_product(x, weight, result):
    """The sums over the last axes, in the dtype `result`."""
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dimensions, preferred_element_type=result)


def _sums(x, weight, wide):
    """For a single vector XLA on GPUs may first write bfloat16 weights to memory in float32.

    It does where they are large; sums read them as they are.
    """
    return (x.astype(wide)[..., None, :] * weight.astype(wide)).sum(-1)


def _flattened(product, x, weight):
    """`product` of x as [n i]: for more axes XLA on CPU writes the weight transposed to memory."""
    return product(x.reshape(-1, x.shape[-1]), weight).reshape(*x.shape[:-1], -1)


def _bfloat16_product(x, weight):
    """XLA on CPU converts a bfloat16 weight for one vector, and not for two equal ones."""
    rows = jnp.broadcast_to(x, (2, x.shape[1])) if len(x) == 1 else x
    products = _rows_product(rows.astype(weight.dtype), weight, jnp.float32)
    return jax.lax.optimization_barrier(products)[: len(x)]


def _digits_product(x, weight):
    """The product with int8 weights by sums of integers, which need no converted weights.

    Each vector is written as its largest magnitude times digits in base 254, themselves int8. Three
    digits are as precise as float32: they leave out less than 2**-24 of the largest magnitude. A
    vector that is not finite has a product that is not.
    """
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1, keepdims=True)
    unit = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) / 127
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
