"""Rotation of queries and keys by position (arXiv 2104.09864; Eq. 3 of arXiv 2307.08621)."""

from fractions import Fraction
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retnet_jax.ops.map_heads import map_heads
from retnet_jax.shapes import Array, Float, Int


class Rotation(NamedTuple):
    """Rotation of each position: x cos + partner(x) sin, where partner swaps the two of a pair."""

    cos: Float[Array, "b t #k"]
    sin: Float[Array, "b t #k"]  # negative for the first of a pair


# Below this position angles are float32 products of position and frequency, off by at most
# 0.001 rad; from it on they are exact. Models were trained with these products, and the measured
# training steps, of rows up to this length, use them.
FLOAT_POSITIONS = 8192


def rotation(
    positions: Int[Array, "b t"],
    head_width: int,
    convention: str,
    dtype: str = "float32",
    longest: int | None = None,
    base: float = 10_000.0,
) -> Rotation:
    """The rotation by the angles position * base^-e, with k/2 exponents e for a head of width k.

    "rope": e = 2i/k (arXiv 2104.09864). "torchscale": e = i/(k/2 - 1), from 0 to 1 inclusive.
    "none": there is no rotation, and all cos are 1, with one column for all of a head.

    Float32 angles are off by at most 0.001 rad at positions below `FLOAT_POSITIONS`, and by 3e-7
    from there to 2^31 - 1, the last position possible. Float64 angles are off by 1e-6 there.

    Args:
      positions: Position of each token, 0 or more.
      head_width: Width of a query or key; it is even.
      convention: Exponents and pairs, "rope" or "torchscale"; or "none".
      dtype: Dtype of the angles, "float32" or "float64".
      longest: Upper bound that all positions are known to be below; None: there is none.
      base: Base of the angles, greater than 0.
    """
    if convention == "none":
        one = jnp.ones((*positions.shape, 1), dtype)
        return Rotation(one, jnp.zeros_like(one))
    pairs = head_width // 2
    exponents = np.arange(pairs) / pairs if convention == "rope" else np.linspace(0, 1, pairs)
    frequencies = base**-exponents
    angle = positions[..., None].astype(dtype) * jnp.asarray(frequencies, dtype)[None, None]
    if dtype == "float32" and (longest is None or longest > FLOAT_POSITIONS):
        near = positions[..., None] < FLOAT_POSITIONS
        angle = jnp.where(near, angle, _exact_angles(positions, frequencies))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return Rotation(_in_pairs(cos, cos, convention), _in_pairs(-sin, sin, convention))


def _exact_angles(positions: Int[Array, "b t"], frequencies: np.ndarray) -> Float[Array, "b t i"]:
    """Angles in -pi ... pi, computed in integers: a fraction of a turn in units of 2^-32.

    A frequency is a fraction of a turn in units of 2^-64. In its product with a position whole
    turns overflow, which drops them; the high 32 bits of the rest are the angle.
    """
    turns = [round(Fraction(float(f)) * 2**64 / _TWO_PI) for f in frequencies]
    high, middle, low = (
        np.array([[[n >> shift & mask for n in turns]]], np.uint32)
        for shift, mask in ((32, 2**32 - 1), (16, 2**16 - 1), (0, 2**16 - 1))
    )
    p = positions[..., None].astype(jnp.uint32)
    upper, lower = p >> 16, p & 0xFFFF
    turn = p * high + upper * middle + (upper * low >> 16) + (lower * middle >> 16)
    signed = jax.lax.bitcast_convert_type(turn, jnp.int32)  # the nearest whole turn is 0
    return signed.astype(jnp.float32) * np.float32(2 * np.pi * 2**-32)


# To 2^-70: more digits than a float64 has.
_TWO_PI = Fraction("6.283185307179586476925286766559")


def rotate(
    x: Float[Array, "b t h k"], turn: Rotation, convention: str, scale: float = 1.0
) -> Float[Array, "b t h k"]:
    """Rotates each pair by its angle: "rope" (x_i, x_{i + k/2}), "torchscale" (x_2i, x_{2i + 1}).

    "none" rotates nothing. The result is multiplied by `scale`. Angles are not differentiated.
    """
    if convention == "none":
        return (x * (scale * jax.lax.stop_gradient(turn.cos)[:, :, None])).astype(x.dtype)
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
    """`x` with the two of each pair exchanged."""
    if convention == "rope":
        return jnp.roll(x, x.shape[-1] // 2, axis=-1)
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.where(lane % 2 == 0, jnp.roll(x, -1, axis=-1), jnp.roll(x, 1, axis=-1))


def _in_pairs(first, second, convention: str):
    if convention == "rope":
        return jnp.concatenate([first, second], axis=-1)
    return jnp.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)
