"""The parts that both models share: linear maps, norms, feed-forward, rotation.

Parameters are float32; a layer computes in the dtype of its input, norms in float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from retnet_jax.compiler import materialized
from retnet_jax.shapes import Array, Float, Int


class Linear(nnx.Module):
    """x W, with W drawn from a normal distribution of deviation `scale / sqrt(inputs)`."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs, scale: float = 1.0):
        deviation = scale * inputs**-0.5
        self.kernel = nnx.Param(deviation * jax.random.normal(rngs.params(), (inputs, outputs)))

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        return _product(x, self.kernel[...].astype(x.dtype))


@jax.custom_vjp
def _product(x: Float[Array, "... i"], kernel: Float[Array, "i o"]) -> Float[Array, "... o"]:
    return x @ kernel


def _product_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _product_backward(operands, d_y):
    # What autodiff would do, but for `materialized`.
    x, kernel = operands
    x, d_y = materialized((x, d_y))
    d_x = d_y @ kernel.T
    d_kernel = x.reshape(-1, x.shape[-1]).T @ d_y.reshape(-1, d_y.shape[-1])
    return d_x, d_kernel


_product.defvjp(_product_forward, _product_backward)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon), times a learned scale (arXiv 1910.07467)."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        return (normalize(x, "rms", self.epsilon) * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + epsilon), times a learned scale, plus a learned bias."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        x32 = normalize(x, "layer", self.epsilon)
        return (x32 * self.scale[...] + self.bias[...]).astype(x.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


def normalize(x: Float[Array, "... d"], kind: str, epsilon: float) -> Float[Array, "... d"]:
    """A norm over the last axis without learned parameters, in float32."""
    x = x.astype(jnp.promote_types(jnp.float32, x.dtype))
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)


class FeedForward(nnx.Module):
    """gelu(x W1) W2, or swiglu: (swish(x W1) * x W3) W2 (arXiv 2002.05202)."""

    def __init__(self, kind: str, width: int, inner: int, *, rngs: nnx.Rngs, out_scale: float):
        self.up = Linear(width, inner, rngs=rngs)
        if kind == "swiglu":
            self.linear = Linear(width, inner, rngs=rngs)
        self.down = Linear(inner, width, rngs=rngs, scale=out_scale)
        self.kind = kind

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        if self.kind == "swiglu":
            inner = jax.nn.silu(self.up(x)) * self.linear(x)
        else:
            inner = jax.nn.gelu(self.up(x), approximate=False)
        return self.down(inner)


def rotation(
    positions: Int[Array, "b t"], head_width: int
) -> tuple[Float[Array, "b t i"], Float[Array, "b t i"]]:
    """Cosine and sine of position * 10000^(-2i/k), k the head width (arXiv 2104.09864)."""
    frequency = 10_000.0 ** -(jnp.arange(0, head_width, 2) / head_width)
    angle = positions[..., None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "b t h k"], cos: Float[Array, "b t i"], sin: Float[Array, "b t i"]
) -> Float[Array, "b t h k"]:
    """Turns each pair (x_i, x_{i + k/2}) by its angle, in float32."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def split_heads(x: Float[Array, "b t w"], n_heads: int) -> Float[Array, "b t h k"]:
    """Head h owns the h-th of `n_heads` equal parts of the last axis."""
    return x.reshape(*x.shape[:2], n_heads, -1)
