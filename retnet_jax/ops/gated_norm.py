"""After retention: the row normaliser, a norm of each head, and the swish gate if any (Eq. 8).

It is one function with a custom gradient, so that forward and backward are one pass each over
memory in the dtype of the activations. The backward pass keeps y and the gate and recomputes the
statistics.
"""

from functools import partial

import jax
import jax.numpy as jnp

from retnet_jax.ops.map_heads import map_heads
from retnet_jax.shapes import Array, Float


def gated_norm(
    y: Float[Array, "b t h v"],
    gate: Float[Array, "b t h v"] | None,
    row_scale: Float[Array, "b t h"] | None,
    kind: str | None,
    epsilon: float,
) -> Float[Array, "b t h v"]:
    """swish(gate) * norm(row_scale * y), the norm over v without learned parameters.

    Args:
      y: Outputs of retention.
      gate: Projections, before their activation; in y's dtype. None: the norm is not multiplied.
      row_scale: `row_normalizer`, which is not differentiated; None: 1.
      kind: Kind of the norm, "layer" or "rms"; None: there is no norm.
      epsilon: Number added to the variance or the mean square.
    """
    if row_scale is not None:
        row_scale = jax.lax.stop_gradient(row_scale)
    return _gated_norm(kind, epsilon, y, gate, row_scale)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gated_norm(kind, epsilon, y, gate, row_scale):
    return map_heads(partial(_value, kind, epsilon), y, y, gate, row_scale)[0]


def _gated_norm_forward(kind, epsilon, *inputs):
    return _gated_norm(kind, epsilon, *inputs), inputs


def _gated_norm_backward(kind, epsilon, inputs, d_out):
    y, gate, _ = inputs
    gradients = partial(_gradients, kind, epsilon)
    d_y, *d_gate = map_heads(gradients, y, *inputs, d_out, outputs=1 if gate is None else 2)
    return d_y, d_gate[0] if d_gate else None, None


_gated_norm.defvjp(_gated_norm_forward, _gated_norm_backward)


def _value(kind, epsilon, y, gate, row_scale):
    normed, _ = _normed(kind, epsilon, y, row_scale)
    if gate is None:
        return (normed,)
    return (gate * jax.nn.sigmoid(gate) * normed,)


def _gradients(kind, epsilon, y, gate, row_scale, d_out):
    normed, shrink = _normed(kind, epsilon, y, row_scale)
    d_normed, d_gate = d_out, ()
    if gate is not None:
        sigmoid = jax.nn.sigmoid(gate)
        d_gate = (d_out * normed * sigmoid * (1 + gate * (1 - sigmoid)),)
        d_normed = d_out * gate * sigmoid
    d_y = d_normed
    if kind is not None:
        d_y = d_normed - normed * jnp.mean(d_normed * normed, -1, keepdims=True)
        if kind == "layer":
            d_y -= d_normed.mean(-1, keepdims=True)
        d_y *= shrink
    return d_y if row_scale is None else d_y * row_scale, *d_gate


def _normed(kind, epsilon, y, row_scale):
    """The norm of the scaled y, and the factor 1 / (standard deviation or root mean square)."""
    if row_scale is not None:
        y = y * row_scale
    if kind is None:
        return y, 1.0
    if kind == "layer":
        y = y - y.mean(-1, keepdims=True)
    shrink = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)
    return y * shrink, shrink
