"""Cross-entropy of an output head without the logits of all tokens in memory.

For a vocabulary of 100,000 the float32 logits of a batch are larger than everything else in a
training step. Here they exist for one chunk of positions at a time, and the gradient is computed
together with the loss. That takes three matrix products with the head, the same number as with all
logits in memory.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from retnet_jax.ops.linear import materialized
from retnet_jax.parallel.mesh import axis_size, backend, many_devices
from retnet_jax.parallel.sharding import WORDS, activation_spec, axes_of
from retnet_jax.shapes import Array, Float, Int


def logits_at_once() -> int:
    """The largest number of logits that a device holds at a time.

    GPUs: 2^28, 1 GiB in float32. The gradient of a head of 100,000 words is then read and written
    once for 2,000 tokens. TPUs, which have less memory: half of that. CPU: 2^21, which stay in its
    caches: the loss and gradients of 2048 tokens, with d 128 and a vocabulary of 4096, took 68 ms,
    and up to 105 ms with other sizes from 2^18 to 2^25 (2 cores, float32).
    """
    return {"cpu": 2**21, "gpu": 2**28}.get(backend(), 2**27)


def cross_entropy_sum(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "w d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
) -> Float[Array, ""]:
    """Sum over positions of weight times -log softmax(hidden head^T)[target], in nats, float32."""
    return objective_sum(hidden, head, targets, weights, 0.0)[0]


def objective_sum(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "w d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
    z_loss: float,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The training objective, and the cross-entropy it contains, as of `cross_entropy_sum`.

    The objective is the cross-entropy plus `z_loss` times the weighted sum of the squared log
    normalisers, which keeps logits from drifting (arXiv 2204.02311, section 5). Only the objective
    is differentiated. On a mesh (`jax.set_mesh`) each device has its part of the rows, positions
    and vocabulary.
    """
    return _objective(hidden, head, targets, weights, z_loss)


def token_cross_entropy(
    hidden: Float[Array, "b t d"], head: Float[Array, "w d"], targets: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    """-log softmax(hidden head^T)[target] of each position, in nats, float32."""

    def chunk(_, inputs):
        hidden, targets = inputs
        log_normalizer = jax.nn.logsumexp(_logits(hidden, head), axis=-1)
        return None, log_normalizer - _target_logits(hidden, head, targets)

    b, t, d = hidden.shape
    size = _chunk_size((b, t, d), head.shape[0])
    _, losses = jax.lax.scan(chunk, None, (_chunks(hidden, size), _chunks(targets, size)))
    return _join(losses, t)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _objective(hidden, head, targets, weights, z_loss):
    return _objective_and_gradients(hidden, head, targets, weights, z_loss)[0]


def _objective_and_gradients(hidden, head, targets, weights, z_loss):
    if not many_devices():
        return _of_this_device(hidden, head, targets, weights, z_loss, _Split())
    tokens = activation_spec("bt", targets.shape)
    words = PartitionSpec(activation_spec("w", head.shape[:1])[0], None)
    over = axes_of(tokens)
    # The head's gradient is returned with the sharding of the head itself where that is possible.
    scattered = "fsdp" in over and head.shape[0] % math.prod(map(axis_size, WORDS)) == 0
    split = _Split(
        tokens=tuple(axis for axis in over if not (scattered and axis == "fsdp")),
        scattered="fsdp" if scattered else None,
        words=words[0],
    )
    return jax.shard_map(
        partial(_of_this_device, z_loss=z_loss, split=split),
        in_specs=(PartitionSpec(*tokens, None), words, tokens, tokens),
        out_specs=(
            (PartitionSpec(), PartitionSpec()),
            (PartitionSpec(*tokens, None), PartitionSpec(WORDS if scattered else words[0], None)),
        ),
        check_vma=False,
    )(hidden, head, targets, weights)


_TILE = 64  # rows of a matrix that a matrix unit takes at a time


class _Split(NamedTuple):
    """Mesh axes along which the devices have different tokens and different words."""

    tokens: tuple[str, ...] = ()  # the head's gradient is summed over these
    scattered: str | None = None  # and over this one, where each device keeps its words of the sum
    words: str | None = None


def _of_this_device(hidden, head, targets, weights, z_loss, split):
    """Objective, cross-entropy and gradients, from this device's tokens and words."""
    over_words = partial(_over, split.words)
    first_word = 0 if split.words is None else jax.lax.axis_index(split.words) * head.shape[0]
    rounded = head.astype(hidden.dtype)  # once for all chunks

    def chunk(carry, inputs):
        sums, d_head = carry  # [2], [d w]
        hidden, targets, weights = inputs  # [b c d], [b c], [b c]
        logits = _logits(hidden, rounded)  # [b c w]
        # The exponentials are used for the sum and the gradient; the logits are read only once.
        top = over_words(jax.lax.pmax, logits.max(-1, keepdims=True))  # [b c 1]
        exponentials = jnp.exp(logits - top)
        total = over_words(jax.lax.psum, exponentials.sum(-1, keepdims=True))
        log_normalizer = jnp.log(total) + top  # [b c 1]
        word = targets - first_word  # [b c]
        own = (word >= 0) & (word < head.shape[0])
        target_logits = _target_logits(hidden, rounded, jnp.where(own, word, 0))
        target_logits = over_words(jax.lax.psum, jnp.where(own, target_logits, 0))
        losses = log_normalizer[..., 0] - target_logits  # [b c]
        squares = jnp.square(log_normalizer[..., 0])

        weights = weights[..., None]  # [b c 1]
        is_target = word[..., None] == jnp.arange(head.shape[0])  # [b c w]
        scale = weights * (1 + 2 * z_loss * log_normalizer) / total  # [b c 1]
        d_logits = exponentials * scale - jnp.where(is_target, weights, 0)
        d_logits = materialized(d_logits.astype(hidden.dtype))
        d_hidden = jnp.einsum("bcw,wd->bcd", d_logits, rounded)
        d_head += _head_gradient(hidden, d_logits, head.dtype)
        sums += jnp.stack([(x * weights[..., 0]).sum() for x in (losses, squares)])
        return (sums, d_head), over_words(jax.lax.psum, d_hidden)

    size = _chunk_size(hidden.shape, head.shape[0])
    start = (jnp.zeros(2, np.promote_types(np.float32, hidden.dtype)), jnp.zeros_like(head.T))
    inputs = tuple(_chunks(x, size) for x in (hidden, targets, weights))
    (sums, d_head), d_hidden = jax.lax.scan(chunk, start, inputs)
    if split.scattered is not None:
        sums = jax.lax.psum(sums, split.scattered)
        d_head = jax.lax.psum_scatter(d_head, split.scattered, scatter_dimension=1, tiled=True)
    if split.tokens:
        sums, d_head = jax.lax.psum((sums, d_head), split.tokens)
    cross_entropy, squares = sums
    gradients = _join(d_hidden, hidden.shape[1]), d_head.T
    return (cross_entropy + z_loss * squares, cross_entropy), gradients


def _over(axis, reduce, x):
    return x if axis is None else reduce(x, axis)


def _head_gradient(hidden, d_logits, dtype):
    """The transposed gradient of the head, [d w]."""
    product = partial(jnp.einsum, "bcd,bcw->dw", preferred_element_type=dtype)
    # XLA on CPU cannot multiply transposed bfloat16 matrices with float32 accumulation
    # ("Unsupported element type for DotThunk::Execute", jax 0.10.2).
    return jax.lax.platform_dependent(
        hidden,
        d_logits,
        cpu=lambda hidden, d_logits: product(hidden.astype(dtype), d_logits.astype(dtype)),
        default=product,
    )


def _scale(z_loss, gradients, cotangents):
    cotangent, _ = cotangents
    d_hidden, d_head = ((cotangent * x).astype(x.dtype) for x in gradients)
    return d_hidden, d_head, None, None


_objective.defvjp(_objective_and_gradients, _scale)


def _logits(hidden, head):
    dtype = np.promote_types(np.float32, hidden.dtype)
    return jnp.einsum(
        "bcd,wd->bcw", hidden, head.astype(hidden.dtype), preferred_element_type=dtype
    )


def _target_logits(hidden, head, targets):
    # Recomputing them costs less than gathering them from the logits.
    dtype = np.promote_types(np.float32, hidden.dtype)
    rows = head[targets].astype(hidden.dtype).astype(dtype)  # [b c d], rounded as in the logits
    return (hidden.astype(dtype) * rows).sum(-1)


def _chunk_size(shape: tuple[int, int, int], vocabulary: int) -> int:
    batch, length, _ = shape
    fewest = -(-batch * length * vocabulary // logits_at_once())
    # Chunks of equal length that fill whole tiles of a matrix unit, if they are not much shorter.
    for n_chunks in range(fewest, 2 * fewest + 1):
        if length % (n_chunks * _TILE) == 0:
            return length // n_chunks
    return max(1, -(-length // fewest))


def _chunks(x, size):
    """[b t ...] -> [n b c ...], the last chunk filled with zeros."""
    batch, length = x.shape[:2]
    n_chunks = -(-length // size)
    x = jnp.pad(x, [(0, 0), (0, n_chunks * size - length)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(batch, n_chunks, size, *x.shape[2:]).swapaxes(0, 1)


def _join(chunks, length):
    """The inverse of `_chunks`."""
    x = chunks.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
