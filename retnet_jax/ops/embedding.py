"""The look-up of token embeddings, on one device and on a mesh."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from retnet_jax.parallel.mesh import axis_size, many_devices
from retnet_jax.parallel.sharding import WORDS, activation_spec, axes_of, constrain
from retnet_jax.shapes import Array, Float, Int


def look_up(
    table: Float[Array, "w d"], tokens: Int[Array, "b t"], dtype: str
) -> Float[Array, "b t d"]:
    """Rows of a table, in `dtype`; their gradient is summed in the dtype of the table.

    On a mesh (`jax.set_mesh`) a device gathers the words of its part of the axis "tensor", and
    receives the gradient of only those words that it stores.
    """
    split = math.prod(map(axis_size, WORDS))
    if not many_devices() or table.shape[0] % split:
        return constrain(table, "wd")[tokens].astype(dtype)
    return _look_up(table, tokens, dtype)


def look_up_stored(table: Float[Array, "w d"], tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    """Rows of a table, in its dtype.

    On one device bfloat16 rows are gathered as integers: XLA on CPU would convert the whole table.
    """
    if many_devices() or table.dtype != jnp.bfloat16:
        return look_up(table, tokens, str(table.dtype))
    return _bfloat16_rows(table, tokens)


@jax.custom_vjp
def _bfloat16_rows(table, tokens):
    integers = jax.lax.bitcast_convert_type(table, jnp.uint16)[tokens]
    return jax.lax.bitcast_convert_type(integers, jnp.bfloat16)


def _bfloat16_rows_forward(table, tokens):
    return _bfloat16_rows(table, tokens), (table, tokens)


def _bfloat16_rows_backward(operands, d_rows):
    table, tokens = operands
    return *jax.vjp(lambda table: table[tokens], table)[1](d_rows), None


_bfloat16_rows.defvjp(_bfloat16_rows_forward, _bfloat16_rows_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(table, tokens, dtype):
    return _forward(table, tokens, dtype)[0]


def _forward(table, tokens, dtype):
    places = activation_spec("bt", tokens.shape)

    @partial(
        jax.shard_map,
        in_specs=(PartitionSpec(WORDS, None), places),
        out_specs=PartitionSpec(*places, None),
        check_vma=False,
    )
    def rows(table, tokens):
        table = jax.lax.all_gather(table.astype(dtype), "fsdp", tiled=True)
        own, word = _own_words(tokens, table.shape[0])
        return jax.lax.psum(jnp.where(own[..., None], table[word], 0), "tensor")

    return rows(table, tokens), (tokens, jnp.zeros((0, table.shape[0]), table.dtype))


def _backward(dtype, residuals, d_rows):
    tokens, like = residuals
    words = like.shape[1]
    places = activation_spec("bt", tokens.shape)
    others = tuple(axis for axis in axes_of(places) if axis != "fsdp")

    @partial(
        jax.shard_map,
        in_specs=(places, PartitionSpec(*places, None)),
        out_specs=PartitionSpec(WORDS, None),
        check_vma=False,
    )
    def sums(tokens, d_rows):
        count = words // axis_size("tensor")
        own, word = _own_words(tokens, count)
        d_rows = jnp.where(own[..., None], d_rows.astype(like.dtype), 0)
        d_table = jnp.zeros((count, d_rows.shape[-1]), like.dtype).at[word].add(d_rows)
        if "fsdp" in axes_of(places):
            d_table = jax.lax.psum_scatter(d_table, "fsdp", tiled=True)
        else:  # rows that fsdp does not divide have a copy on each of its devices
            size = count // axis_size("fsdp")
            start = jax.lax.axis_index("fsdp") * size
            d_table = jax.lax.dynamic_slice_in_dim(d_table, start, size)
        return jax.lax.psum(d_table, others) if others else d_table

    return sums(tokens, d_rows), None


_look_up.defvjp(_forward, _backward)


def _own_words(tokens, count):
    """Whether each token is among this device's words, and its row there; row 0 if it is not."""
    word = tokens - jax.lax.axis_index("tensor") * count
    own = (word >= 0) & (word < count)
    return own, jnp.where(own, word, 0)
