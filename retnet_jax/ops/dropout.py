"""Dropout (JMLR 15:1929) with masks that depend only on the random key of each row.

    keys = row_keys(seed, step, rows)                 # [b], one for each row of the whole batch
    embedding, layers = place_keys(keys, n_layers)    # [b], and [n b] for each place in a layer
    x = dropout(x, embedding, 0.1, "btd")

A row has the same mask in every batch, micro-batch and mesh: its bits are drawn from its own key,
each from the number of its element, so every device draws the bits of its own part.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from retnet_jax.parallel.sharding import constrain
from retnet_jax.shapes import Array, Float, Int, Key, RandomKeys

# Initial parameters are drawn from the same seed; this number keeps their keys apart.
_PURPOSE = int.from_bytes(b"drop")


class LayerKeys(NamedTuple):
    """The random keys of the places in a layer where numbers are dropped; None: none are."""

    mixer: Key[Array, "*n b"] | None = None  # output of the mixer
    inner: Key[Array, "*n b"] | None = None  # inside the feed-forward layer
    ffn: Key[Array, "*n b"] | None = None  # output of the feed-forward layer

    def of(self, layer: int) -> "LayerKeys":
        """The keys of one layer."""
        return jax.tree.map(lambda x: x[layer], self)

    def periods(self, repeats: int) -> "LayerKeys":
        """The keys of a hybrid's layers as [repeats period b]."""
        return jax.tree.map(lambda x: x.reshape(repeats, -1, x.shape[-1]), self)


def dropout(
    x: Float[Array, "b *rest"], keys: RandomKeys | None, rate: float, dimensions: str
) -> Float[Array, "b *rest"]:
    """Sets each number to 0 with probability `rate`, and multiplies the others by 1 / (1 - rate).

    Args:
      x: Activations.
      keys: Random key of each row; None: nothing is dropped.
      rate: Probability in [0, 1), which is rounded to a multiple of 2^-32.
      dimensions: A letter for each dimension of x, as for `constrain`.
    """
    if keys is None or rate == 0:
        return x
    bits = jax.vmap(lambda key: jax.random.bits(key, x.shape[1:], jnp.uint32))(keys)
    dropped = min(round(rate * 2**32), 2**32 - 1)  # bits below this number
    kept = constrain(bits >= jnp.uint32(dropped), dimensions)
    # In bfloat16 the factor itself would be rounded, which would shift the mean.
    wide = x.astype(np.promote_types(np.float32, x.dtype))
    return jnp.where(kept, wide * (1 / (1 - rate)), 0).astype(x.dtype)


def row_keys(seed: int, step: int | Int[Array, ""], rows: Int[Array, " b"]) -> RandomKeys:
    """The random key of each row in a training step.

    Args:
      seed: Seed of the run.
      step: Number of the step.
      rows: Numbers of the rows in the whole batch.
    """
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _PURPOSE)
    key = jax.random.fold_in(key, step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def place_keys(keys: RandomKeys | None, n_layers: int) -> tuple[RandomKeys | None, LayerKeys]:
    """The keys of the embedding, and those of all layers, stacked.

    Args:
      keys: Key of each row; None: nothing is dropped.
      n_layers: Number of layers.
    """
    if keys is None:
        return None, LayerKeys()
    of_rows = jax.vmap(jax.random.fold_in, (0, None))
    each = jax.vmap(of_rows, (None, 0))(keys, jnp.arange(1 + 3 * n_layers))  # [(1 + 3 n) b]
    mixer, inner, ffn = (each[1 + place :: 3] for place in range(3))
    return each[0], LayerKeys(mixer, inner, ffn)
