"""Cross-entropy of an output head without the logits of all tokens in memory.

For a vocabulary of 100,000 the float32 logits of a batch are larger than everything else in a
training step. Here they exist for one chunk of positions at a time, and the gradient is computed
along with the loss: three matrix products with the head in all, as many as with all logits kept.
"""

import jax
import jax.numpy as jnp

from retnet_jax.shapes import Array, Float, Int

# Largest number of logits held at once, 128 MiB in float32 over all devices; a batch with fewer,
# such as the quickstart's, is one chunk.
_LOGITS_AT_ONCE = 2**25


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
        return None, _token_losses(_logits(hidden, head), targets)[0]

    size = _chunk_size(hidden.shape, head.shape[0])
    _, losses = jax.lax.scan(chunk, None, (_chunks(hidden, size), _chunks(targets, size)))
    return _join(losses, targets.shape[1])


def _loss_and_gradients(hidden, head, targets, weights):
    def chunk(carry, inputs):
        loss, d_head = carry
        hidden, targets, weights = inputs
        logits = _logits(hidden, head)
        losses, log_normalizer, is_target = _token_losses(logits, targets)
        d_logits = jnp.exp(logits - log_normalizer[..., None]) - is_target
        d_logits = (d_logits * weights[..., None]).astype(hidden.dtype)
        d_hidden = jnp.einsum("bcw,wd->bcd", d_logits, head.astype(hidden.dtype))
        d_head += jnp.einsum("bcw,bcd->wd", d_logits, hidden, preferred_element_type=head.dtype)
        return (loss + (losses * weights).sum(), d_head), d_hidden

    size = _chunk_size(hidden.shape, head.shape[0])
    start = (jnp.zeros((), jnp.promote_types(jnp.float32, hidden.dtype)), jnp.zeros_like(head))
    inputs = tuple(_chunks(x, size) for x in (hidden, targets, weights))
    (loss, d_head), d_hidden = jax.lax.scan(chunk, start, inputs)
    return loss, (_join(d_hidden, hidden.shape[1]), d_head)


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


def _token_losses(logits, targets):
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    # A comparison instead of a gather: it fuses with its neighbours and splits over a vocabulary
    # that is spread over devices.
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    target_logit = jnp.where(is_target, logits, 0).sum(-1)
    return log_normalizer - target_logit, log_normalizer, is_target


def _chunk_size(shape: tuple[int, int, int], vocabulary: int) -> int:
    batch, length, _ = shape
    n_chunks = -(-batch * length * vocabulary // _LOGITS_AT_ONCE)
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
