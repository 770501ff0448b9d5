"""Dropout (JMLR 15:1929) with masks that depend only on the random key of each row.

    keys = row_keys(seed, step, rows)          # [b], one for each row of the whole batch
    keys = layer_keys(keys, number)            # [b], those of one layer
    x = dropout(x, keys, place, 0.1, "btd")

A row has the same mask in every batch, micro-batch and mesh: its bits are drawn from its own key,
each from the number of its element, so every device draws the bits of its own part.
"""

import jax
import jax.numpy as jnp

from retnet_jax.parallel.sharding import constrain
from retnet_jax.shapes import Array, Float, Int, RandomKeys

# Initial parameters are drawn from the same seed; this number keeps their keys apart.
_PURPOSE = int.from_bytes(b"drop")


def dropout(
    x: Float[Array, "b *rest"], keys: RandomKeys | None, place: int, rate: float, dimensions: str
) -> Float[Array, "b *rest"]:
    """Sets each number to 0 with probability `rate` and divides the others by 1 - rate.

    Args:
      x: Activations.
      keys: Random key of each row; None: nothing is dropped.
      place: Number of the place in the layer. Places of one layer have independent masks.
      rate: Probability in [0, 1), which is rounded to a multiple of 2^-32.
      dimensions: A letter for each dimension of x, as for `constrain`.
    """
    if keys is None or rate == 0:
        return x
    bits = jax.vmap(lambda key: jax.random.bits(key, x.shape[1:], jnp.uint32))(_folded(keys, place))
    dropped = min(round(rate * 2**32), 2**32 - 1)  # so many of the 2^32 values
    kept = constrain(bits >= jnp.uint32(dropped), dimensions)
    return jnp.where(kept, x * (1 / (1 - rate)), jnp.zeros((), x.dtype))


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


def layer_keys(keys: RandomKeys | None, number: int | Int[Array, ""] | None) -> RandomKeys | None:
    """The keys of a layer, from those of the rows; None: nothing is dropped.

    Args:
      keys: Keys of the rows, from which the embedding's mask (place 0) is drawn too.
      number: Number of the layer; the first is 0.
    """
    return None if keys is None else _folded(keys, 1 + number)


def _folded(keys: RandomKeys, number: int | Int[Array, ""]) -> RandomKeys:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
