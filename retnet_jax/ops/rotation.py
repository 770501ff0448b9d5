"""Rotation of queries and keys by position (arXiv 2104.09864; Eq. 3 of arXiv 2307.08621)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retnet_jax.ops.map_heads import map_heads
from retnet_jax.shapes import Array, Float, Int


class Rotation(NamedTuple):
    """Of each position: x cos + partner(x) sin, where the partner is the other one of a pair."""

    cos: Float[Array, "b t k"]
    sin: Float[Array, "b t k"]  # negative for the first of a pair


def rotation(
    positions: Int[Array, "b t"], head_width: int, convention: str, dtype: str = "float32"
) -> Rotation:
    """The angles position * 10000^-e with k/2 exponents e for a head of width k.

    "rope": e = 2i/k (arXiv 2104.09864). "torchscale": e = i/(k/2 - 1), from 0 to 1 inclusive.
    """
    pairs = head_width // 2
    exponents = np.arange(pairs) / pairs if convention == "rope" else np.linspace(0, 1, pairs)
    angle = positions[..., None] * jnp.asarray(10_000.0**-exponents, dtype)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return Rotation(_in_pairs(cos, cos, convention), _in_pairs(-sin, sin, convention))


def rotate(
    x: Float[Array, "b t h k"], turn: Rotation, convention: str, scale: float = 1.0
) -> Float[Array, "b t h k"]:
    """Turns each pair by its angle: "rope" (x_i, x_{i + k/2}), "torchscale" (x_2i, x_{2i + 1}).

    The result is multiplied by `scale`. Angles are not differentiated.
    """
    return _rotate(convention, scale, x, *jax.lax.stop_gradient(turn))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rotate(convention, scale, x, cos, sin):
    def turned(x, cos, sin):
        return ((x * cos + _partner(x, convention) * sin) * scale,)

    return map_heads(turned, x, x, cos[:, :, None], sin[:, :, None])[0]


def _rotate_forward(convention, scale, x, cos, sin):
    return _rotate(convention, scale, x, cos, sin), (cos, sin)


def _rotate_backward(convention, scale, turn, d_y):
    cos, sin = turn
    return _rotate(convention, scale, d_y, cos, -sin), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)


def _partner(x: Float[Array, "... k"], convention: str) -> Float[Array, "... k"]:
    """X with the two of each pair exchanged."""
    if convention == "rope":
        return jnp.roll(x, x.shape[-1] // 2, axis=-1)
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.where(lane % 2 == 0, jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))


def _in_pairs(first, second, convention: str):
    if convention == "rope":
        return jnp.concatenate([first, second], axis=-1)
    return jnp.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)
