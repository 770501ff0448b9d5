"""Cross-entropy of an output head without the logits of all tokens in memory.

For a vocabulary of 100,000 the float32 logits of a batch are larger than everything else in a
training step. Here they exist for one chunk of positions at a time, and the gradient is computed
along with the loss: three matrix products with the head in all, as many as with all logits kept.
"""

from functools import partial

import jax
import jax.numpy as jnp

from retnet_jax.compiler import materialized
from retnet_jax.shapes import Array, Float, Int


def logits_at_once() -> int:
    """Most logits to hold, over all devices.

    Accelerators: 2^25, 128 MiB in float32; not yet measured. CPU: 2^21, which stay in its caches:
    68 ms against 105 for the loss and gradients of 2048 tokens, d 128 and a vocabulary of 4096, of
    2^18 to 2^25 (2 cores, float32).
    """
    return 2**21 if jax.default_backend() == "cpu" else 2**25


@jax.custom_vjp
def cross_entropy_sum(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "w d"],
    targets: Int[Array, "b t"],
    weights: Float[Array, "b t"],
) -> Float[Array, ""]:
    """Sum over positions of weight times -log softmax(hidden head^T)[target], in nats, float32."""
    return _loss_and_gradients(hidden, head, targets, weights)[0]


def token_cross_entropy(
    hidden: Float[Array, "b t d"], head: Float[Array, "w d"], targets: Int[Array, "b t"]
) -> Float[Array, "b t"]:
    """-log softmax(hidden head^T)[target] of each position, in nats, float32."""

    def chunk(_, inputs):
        hidden, targets = inputs
        log_normalizer = jax.nn.logsumexp(_logits(hidden, head), axis=-1)
        return None, log_normalizer - _target_logits(hidden, head, targets)

    size = _chunk_size(hidden.shape, head.shape[0])
    _, losses = jax.lax.scan(chunk, None, (_chunks(hidden, size), _chunks(targets, size)))
    return _join(losses, targets.shape[1])


def _loss_and_gradients(hidden, head, targets, weights):
    def chunk(carry, inputs):
        loss, d_head = carry
        hidden, targets, weights = inputs
        logits = _logits(hidden, head)
        # The exponentials serve the sum and the gradient; logits are not looked at again.
        top = logits.max(-1, keepdims=True)
        exponentials = jnp.exp(logits - top)
        total = exponentials.sum(-1, keepdims=True)
        losses = (jnp.log(total) + top)[..., 0] - _target_logits(hidden, head, targets)

        weights = weights[..., None]
        is_target = targets[..., None] == jnp.arange(head.shape[0])
        d_logits = exponentials * (weights / total) - jnp.where(is_target, weights, 0)
        d_logits = materialized(d_logits.astype(hidden.dtype))
        d_hidden = jnp.einsum("bcw,wd->bcd", d_logits, head.astype(hidden.dtype))
        d_head += _head_gradient(hidden, d_logits, head.dtype)
        return (loss + (losses * weights[..., 0]).sum(), d_head), d_hidden

    size = _chunk_size(hidden.shape, head.shape[0])
    start = (jnp.zeros((), jnp.promote_types(jnp.float32, hidden.dtype)), jnp.zeros_like(head.T))
    inputs = tuple(_chunks(x, size) for x in (hidden, targets, weights))
    (loss, d_head), d_hidden = jax.lax.scan(chunk, start, inputs)
    return loss, (_join(d_hidden, hidden.shape[1]), d_head.T)


def _head_gradient(hidden, d_logits, dtype):
    """The transposed gradient of the head, [d w]."""
    product = partial(jnp.einsum, "bcd,bcw->dw", preferred_element_type=dtype)
    # XLA on CPU cannot multiply transposed bfloat16 with a float32 sum ("Unsupported element type
    # for DotThunk::Execute", jax 0.10.2).
    return jax.lax.platform_dependent(
        hidden,
        d_logits,
        cpu=lambda hidden, d_logits: product(hidden.astype(dtype), d_logits.astype(dtype)),
        default=product,
    )


def _scale(gradients, cotangent):
    d_hidden, d_head = gradients
    scaled = (cotangent * d_hidden).astype(d_hidden.dtype), cotangent * d_head
    return (*scaled, None, None)


cross_entropy_sum.defvjp(_loss_and_gradients, _scale)


def _logits(hidden, head):
    dtype = jnp.promote_types(jnp.float32, hidden.dtype)
    return jnp.einsum(
        "bcd,wd->bcw", hidden, head.astype(hidden.dtype), preferred_element_type=dtype
    )


def _target_logits(hidden, head, targets):
    # Computed again, which costs less than picking them out of the logits.
    dtype = jnp.promote_types(jnp.float32, hidden.dtype)
    rows = head[targets].astype(hidden.dtype).astype(dtype)  # rounded as in the logits
    return (hidden.astype(dtype) * rows).sum(-1)


def _chunk_size(shape: tuple[int, int, int], vocabulary: int) -> int:
    batch, length, _ = shape
    n_chunks = -(-batch * length * vocabulary // logits_at_once())
    return max(1, -(-length // n_chunks))


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
