"""Initial parameters of the layers, the embedding and the head: the rules of `config.init`.

| `init` | kernels [i o] | embedding and head |
|---|---|---|
| scaled | normal, i^-1/2; `out` and `down`: (2 n i)^-1/2 | normal, 0.02 |
| zero_outputs | as scaled, but 0 in `out` and `down` | as scaled |
| torchscale | mixer: Xavier-uniform, gains below; rest: uniform in +-i^-1/2 | normal, d^-1/2 |
| deepnet | Xavier-normal; `v`, `out`, `up`, `down`: gain (8 n)^-1/4, others: 1 | as scaled |

n is the number of layers, a second number the standard deviation; `out` and `down` are the output
projections of mixer and feed-forward layer. Xavier's standard deviation is gain (2 / (i + o))^1/2.
Biases begin at 0, except torchscale's. Norms, convolutions and feature maps begin the same way
under all rules. The embedding of a model with `embedding_scale` has d^-1/2 under all rules.

`deepnorm` changes two rules: "scaled" has (8 n)^-1/4 i^-1/2 for `v`, `out`, `up` and `down`, and
"torchscale" divides these four by (8 n)^1/4, as torchscale does.

"torchscale" is the initialisation of microsoft/torchscale at 4d1e0e8: `reset_parameters` in
multiscale_retention.py (`out` has gain 1/2 since 2023-11-24, gain 1 before) and, for attention, in
multihead_attention.py; PyTorch's default for the feed-forward layer (gate_linear_unit.py,
feedforward_network.py); embedding and head of retnet.py. "deepnet" is that of arXiv 2203.00555
(Figure 2, decoder only), which has no gates; they have gain 1, as torchscale leaves them unscaled.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from retnet_jax.config import ModelConfig
from retnet_jax.model.attention import Attention
from retnet_jax.model.layers import Linear, Projections
from retnet_jax.shapes import Array, Float

OUTPUTS = ("out", "down")
DEEPNORM_SCALED = ("v", "out", "up", "down")
RETENTION_GAINS = {"q": 2**-2.5, "k": 2**-2.5, "v": 2**-2.5, "gate": 2**-2.5, "out": 2**-1}
ATTENTION_GAINS = {"q": 2**-0.5, "k": 2**-0.5, "v": 2**-0.5, "out": 1.0}


def scales(config: ModelConfig) -> dict[str, float]:
    """The `value_scale` and `out_scale` with which the modules of a layer draw their kernels."""
    n = config.n_layers
    if config.deepnorm:
        return {"value_scale": (8 * n) ** -0.25, "out_scale": (8 * n) ** -0.25}
    # Each layer adds twice to the residual stream, which should not grow with the depth.
    return {"value_scale": 1.0, "out_scale": (2 * n) ** -0.5}


def table_deviations(config: ModelConfig) -> tuple[float, float]:
    """Standard deviations of the embedding and of the head."""
    wide = config.d_model**-0.5
    if config.init == "torchscale":
        return wide, wide
    return wide if config.embedding_scale else 0.02, 0.02


def redraw(mixer: Projections, ffn: Projections, config: ModelConfig, rngs: nnx.Rngs) -> None:
    """Gives the Linears of a layer, drawn as "scaled", the parameters of `config.init`."""
    if config.init == "zero_outputs":
        for name, linear in (*_linears(mixer), *_linears(ffn)):
            if name in OUTPUTS:
                linear.kernel = nnx.Param(jnp.zeros_like(linear.kernel[...]))
    elif config.init == "torchscale":
        _redraw_as_torchscale(mixer, ffn, config, rngs)
    elif config.init == "deepnet":
        beta = (8 * config.n_layers) ** -0.25
        for name, linear in (*_linears(mixer), *_linears(ffn)):
            gain = beta if name in DEEPNORM_SCALED else 1.0
            shape = linear.kernel.shape
            kernel = jax.random.normal(rngs.params(), shape, jnp.float32)
            linear.kernel = nnx.Param(gain * (2 / sum(shape)) ** 0.5 * kernel)


def _redraw_as_torchscale(
    mixer: Projections, ffn: Projections, config: ModelConfig, rngs: nnx.Rngs
) -> None:
    gains = ATTENTION_GAINS if isinstance(mixer, Attention) else RETENTION_GAINS
    for name, linear in _linears(mixer):
        shape = linear.kernel.shape
        linear.kernel = nnx.Param(_uniform(rngs, shape, gains[name] * (6 / sum(shape)) ** 0.5))
    for _, linear in _linears(ffn):
        shape = linear.kernel.shape
        linear.kernel = nnx.Param(_uniform(rngs, shape, shape[0] ** -0.5))
    for name, linear in (*_linears(mixer), *_linears(ffn)):
        if linear.has_bias and name != "out":
            bound = linear.kernel.shape[0] ** -0.5
            linear.bias = nnx.Param(_uniform(rngs, linear.bias.shape, bound))
        if config.deepnorm and name in DEEPNORM_SCALED:
            factor = (8 * config.n_layers) ** -0.25
            linear.kernel = nnx.Param(factor * linear.kernel[...])
            if linear.has_bias:
                linear.bias = nnx.Param(factor * linear.bias[...])


def _linears(module: Projections) -> Iterator[tuple[str, Linear]]:
    """The Linears of a module, by their names."""
    return ((name, part) for name, part in vars(module).items() if isinstance(part, Linear))


def _uniform(rngs: nnx.Rngs, shape: tuple[int, ...], bound: float) -> Float[Array, "..."]:
    """Float32 parameters drawn from a uniform distribution in +-bound."""
    return jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
