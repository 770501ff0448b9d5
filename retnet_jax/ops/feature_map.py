"""Feature maps: elementwise functions of queries and keys (flash-linear-attention's `feature_map`).

The names and functions are those of transformers' activations (transformers/activations.py).
"""

import math
from collections.abc import Callable
from functools import wraps

import jax
import jax.numpy as jnp
import numpy as np

from retnet_jax.shapes import Array, Float


def feature_map(name: str) -> Callable[[Array], Array]:
    """The function with this name, from an array to one of the same shape and dtype.

    It computes in float32, or float64 for float64 inputs.

    Raises:
      ValueError: for other names. The maps with parameters are the functions `prelu` and `xielu`.
    """
    if name in LEARNED:
        raise ValueError(
            f"feature_map={name!r} has parameters: call the function {name!r} of "
            f"{__name__} with them"
        )
    if name not in FEATURE_MAPS:
        raise ValueError(
            f"feature_map={name!r} is not one of {', '.join(FEATURE_MAPS)}, nor one of those with "
            f"parameters, {' and '.join(LEARNED)}"
        )
    return FEATURE_MAPS[name]


def _in_float32(function: Callable) -> Callable:
    """`function`, computed in float32 or float64; the result has the dtype of x."""

    @wraps(function)
    def computed(x, *parameters):
        wide = np.promote_types(np.float32, x.dtype)
        return function(x.astype(wide), *(p.astype(wide) for p in parameters)).astype(x.dtype)

    return computed


@_in_float32
def prelu(x: Float[Array, "..."], weight: Float[Array, " 1"]) -> Float[Array, "..."]:
    """PReLU: x where it is positive, else weight * x (arXiv 1502.01852)."""
    return jnp.where(x > 0, x, weight.squeeze() * x)


@_in_float32
def xielu(
    x: Float[Array, "..."], alpha_p: Float[Array, " 1"], alpha_n: Float[Array, " 1"]
) -> Float[Array, "..."]:
    """The activation xIELU (arXiv 2411.13010) of transformers, with b = 1/2 and e = -10^-6:

    softplus(alpha_p) x^2 + b x                                 for x > 0, else
    (b + softplus(alpha_n)) (exp(min(x, e)) - 1 - x) + b x
    """
    positive = jax.nn.softplus(alpha_p.squeeze())
    negative = _BETA + jax.nn.softplus(alpha_n.squeeze())
    return _BETA * x + jnp.where(
        x > 0, positive * x * x, negative * (jnp.expm1(jnp.minimum(x, _EPSILON)) - x)
    )


_BETA = 0.5
_EPSILON = -1e-6


def _linear(x):
    return x


def _relu2(x):
    return jnp.square(jax.nn.relu(x))


def _relu6(x):
    return jnp.where(x < 6, jax.nn.relu(x), 6)


def _leaky_relu(x):
    return jnp.where(x > 0, x, 0.01 * x)


def _gelu(x):
    return jax.nn.gelu(x, approximate=False)


def _gelu_tanh(x):
    return jax.nn.gelu(x, approximate=True)


def _gelu_10(x):
    return jnp.clip(_gelu(x), -10, 10)


def _quick_gelu(x):
    return x * jax.nn.sigmoid(1.702 * x)


def _hardswish(x):
    return x * _relu6(x + 3) / 6


def _laplace(x):
    """The normal distribution function with mean sqrt(1/2) and variance 1/(4 pi), rounded."""
    return 0.5 * (1 + jax.lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


def _sqrtsoftplus(x):
    """sqrt(log(1 + e^x)). It is e^(x/2) for very negative x, where softplus would become 0."""
    tiny = x < _TINY
    return jnp.where(
        tiny,
        jnp.exp(0.5 * jnp.minimum(x, _TINY)),
        jnp.sqrt(jax.nn.softplus(jnp.where(tiny, _TINY, x))),
    )


_TINY = -40.0  # below it log(1 + e^x) is e^x, in float64 too


# Name -> function without parameters.
FEATURE_MAPS = {
    name: _in_float32(function)
    for function, names in {
        _linear: ("linear",),
        jax.nn.relu: ("relu",),
        _relu2: ("relu2",),
        _relu6: ("relu6",),
        _leaky_relu: ("leaky_relu",),
        jax.nn.sigmoid: ("sigmoid",),
        jnp.tanh: ("tanh",),
        jax.nn.silu: ("silu", "swish"),
        _gelu: ("gelu", "gelu_python"),
        _gelu_tanh: (
            *("gelu_new", "gelu_fast", "gelu_accurate"),
            *("gelu_pytorch_tanh", "gelu_python_tanh"),
        ),
        _gelu_10: ("gelu_10",),
        _quick_gelu: ("quick_gelu",),
        jax.nn.mish: ("mish",),
        _hardswish: ("hardswish",),
        _laplace: ("laplace",),
        _sqrtsoftplus: ("sqrtsoftplus",),
    }.items()
    for name in names
}
LEARNED = ("prelu", "xielu")  # names of functions with parameters
