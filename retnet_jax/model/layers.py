"""Layers that both models share: linear maps, norms, feed-forward.

Parameters are float32; a layer computes in the dtype of its input, norms in float32. (In float64
for float64 input, which reference computations use.)
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from retnet_jax.config import ModelConfig
from retnet_jax.model.places import Branches
from retnet_jax.ops.dropout import dropout
from retnet_jax.ops.linear import matrix_product
from retnet_jax.ops.retention import SplitDocuments
from retnet_jax.ops.short_convolution import convolution_of_branches, short_convolution
from retnet_jax.shapes import Activations, Array, Float, RandomKeys


class Linear(nnx.Module):
    """x W, plus a bias if there is one.

    W is drawn from a normal distribution of standard deviation `scale / sqrt(inputs)`; the initial
    bias is 0.
    """

    def __init__(
        self, inputs: int, outputs: int, *, rngs: nnx.Rngs, scale: float = 1.0, bias: bool = False
    ):
        self.kernel = nnx.Param(normal(rngs, (inputs, outputs), scale * inputs**-0.5))
        if bias:
            self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))
        self.has_bias = bias

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        y = matrix_product(x, self.kernel[...].astype(x.dtype))
        return y + along(y, self.bias).astype(x.dtype) if self.has_bias else y


class Projections(nnx.Module):
    """Base of a module that applies several Linears to its input, the attributes in `inputs`.

    In a model for decoding one module replaces them, so that XLA does not join their weights again
    for every token.
    """

    inputs: tuple[str, ...] = ()
    joined: nnx.Module | None = None  # all of `inputs` in one
    joined_widths: tuple[int, ...] = ()  # widths of their outputs

    def project(self, x: Activations) -> list[Float[Array, "b t _"]]:
        """The outputs of the Linears of `inputs`."""
        if self.joined is None:
            return [checkpoint_name(getattr(self, name)(x), name) for name in self.inputs]
        return jnp.split(self.joined(x), np.cumsum(self.joined_widths)[:-1].tolist(), axis=-1)

    def replace_linears(self, join: Callable[[list[Linear]], nnx.Module]) -> None:
        """Replaces the Linears of this module, those of `inputs` by one module.

        Args:
          join: Function that makes one module of several Linears with the same input.
        """
        linears = {name: part for name, part in vars(self).items() if isinstance(part, Linear)}
        for name, linear in linears.items():
            if name not in self.inputs:
                setattr(self, name, join([linear]))
        parts = [linears[name] for name in self.inputs]
        for name in self.inputs:
            delattr(self, name)
        if parts:
            self.joined = join(parts)
            self.joined_widths = tuple(part.kernel.shape[1] for part in parts)


class ShortConvolution(nnx.Module):
    """`short_convolution` of projections, for which the last inputs have their heads split.

    A weight is drawn from a normal distribution of standard deviation `width ** -0.5`.
    """

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(normal(rngs, (channels, width), width**-0.5))

    def __call__(
        self,
        u: Float[Array, "b t _"],
        last: Float[Array, "b last h _"] | None,
        documents: SplitDocuments | None,
        n_heads: int,
    ) -> tuple[Float[Array, "b t _"], Float[Array, "b last h _"]]:
        """The convolution, and the last `width - 1` inputs after it; `last`: those before it."""
        before = None if last is None else last.reshape(*last.shape[:2], -1)  # [b last (h k)]
        y, after = short_convolution(u, self.weight[...], before, documents)
        return y, split_heads(after, n_heads)

    def of_branches(
        self, u: Float[Array, "b t _"], last: Float[Array, "b last h _"] | None, branches: Branches
    ) -> Float[Array, "b t _"]:
        """The convolution of rows of branches; `last` as in a call."""
        before = None if last is None else last.reshape(*last.shape[:2], -1)  # [b last (h k)]
        return convolution_of_branches(u, self.weight[...], branches.previous, before)


def convolve(
    convolutions: Sequence[ShortConvolution],
    inputs: Sequence[Float[Array, "b t _"]],
    before: Sequence[Array | None],
    documents: SplitDocuments | None,
    n_heads: Sequence[int],
) -> tuple[list[Float[Array, "b t _"]], tuple[Float[Array, "b last h _"], ...]]:
    """The convolutions of q, k and v, and the last inputs of each.

    Args:
      convolutions: One for each input.
      inputs: q, k and v with their heads joined.
      before: Last inputs of each before the tokens; None: there were none.
      documents: Documents of the rows; None: each row is one document.
      n_heads: Number of heads of each input.
    """
    of_each = [
        convolution(u, last, documents, heads)
        for convolution, u, last, heads in zip(convolutions, inputs, before, n_heads, strict=True)
    ]
    return [y for y, _ in of_each], tuple(last for _, last in of_each)


def along(x: Float[Array, "... d"], parameter: nnx.Param) -> Float[Array, "... d"]:
    """A parameter [d], broadcast to the shape of x, to be added to it."""
    return jnp.broadcast_to(parameter[...], x.shape)


@jax.custom_vjp
def scaled(x: Float[Array, "... d"], scale: Float[Array, " d"]) -> Float[Array, "... d"]:
    """The product of x and a scale. Its gradient keeps no more than these two.

    By autodiff the scale's gradient of a batch of one row would be summed over the tokens only: XLA
    on CPU takes 3.4 ms for 2048 x 256 numbers, where the sum over rows and tokens takes 0.2.
    """
    return x * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


def _scaled_forward(x, scale):
    return scaled(x, scale), (x, scale)


def _scaled_backward(operands, d_y):
    x, scale = operands
    d_scale = (d_y * x).sum(tuple(range(x.ndim - 1)))
    return scaled(d_y, scale).astype(x.dtype), d_scale.astype(scale.dtype)


scaled.defvjp(_scaled_forward, _scaled_backward)


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], deviation: float) -> Float[Array, "..."]:
    """Float32 parameters drawn from a normal distribution."""
    return deviation * jax.random.normal(rngs.params(), shape, jnp.float32)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon), times a learned scale (arXiv 1910.07467)."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        return scaled(normalize(x, "rms", self.epsilon), self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + epsilon), times a learned scale, plus a learned bias."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        x32 = normalize(x, "layer", self.epsilon)
        return (scaled(x32, self.scale[...]) + along(x, self.bias)).astype(x.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


def normalize(x: Float[Array, "... d"], kind: str, epsilon: float) -> Float[Array, "... d"]:
    """A norm over the last axis without learned parameters, in float32."""
    x = x.astype(np.promote_types(np.float32, x.dtype))
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)


@jax.custom_vjp
def gelu(x: Float[Array, "... f"]) -> Float[Array, "... f"]:
    """The exact x Phi(x), where Phi is the normal distribution function (arXiv 1606.08415).

    It uses erf, one polynomial, where `jax.nn.gelu` uses erfc, several. The backward pass keeps
    only x and recomputes the rest in float32.
    """
    return _gelu_forward(x)[0]


def _gelu_forward(x):
    wide = x.astype(np.promote_types(np.float32, x.dtype))
    return (wide * _normal_cdf(wide)).astype(x.dtype), x


def _gelu_backward(x, d_y):
    wide = x.astype(np.promote_types(np.float32, x.dtype))
    density = jnp.exp(-0.5 * jnp.square(wide)) * (2 * np.pi) ** -0.5
    slope = _normal_cdf(wide) + wide * density
    return ((slope * d_y.astype(wide.dtype)).astype(x.dtype),)


def _normal_cdf(x):
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


gelu.defvjp(_gelu_forward, _gelu_backward)


ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": gelu,
    "swish": jax.nn.silu,
    "reglu": jax.nn.relu,
    "geglu": gelu,
    "swiglu": jax.nn.silu,
}


class FeedForward(Projections):
    """act(x W1) W2, or with a gate (act(x W1) * x W3) W2 (arXiv 2002.05202)."""

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, value_scale: float, out_scale: float
    ):
        width, inner, bias = config.d_model, config.ffn_width, config.ffn_bias
        self.up = Linear(width, inner, rngs=rngs, scale=value_scale, bias=bias)
        if config.ffn_gated:
            self.linear = Linear(width, inner, rngs=rngs, bias=bias)
        if config.ffn_norm is not None:
            self.norm = NORMS[config.ffn_norm](inner, config.norm_epsilon)
        self.down = Linear(inner, width, rngs=rngs, scale=out_scale, bias=bias)
        self.config = config

    @property
    def inputs(self) -> tuple[str, ...]:
        """The Linears that are applied to the input."""
        return ("up", "linear") if self.config.ffn_gated else ("up",)

    def __call__(self, x: Activations, dropout_keys: RandomKeys | None = None) -> Activations:
        up, *linear = self.project(x)  # [b t f] each
        inner = ACTIVATIONS[self.config.ffn](up)
        if linear:
            inner = inner * linear[0]
        inner = dropout(inner, dropout_keys, self.config.activation_dropout, "btf")
        if self.config.ffn_norm is not None:
            inner = self.norm(inner)
        return self.down(inner)


def split_heads(x: Float[Array, "b t w"], n_heads: int) -> Float[Array, "b t h k"]:
    """Head h owns the h-th of `n_heads` equal parts of the last axis."""
    return x.reshape(*x.shape[:2], n_heads, -1)
