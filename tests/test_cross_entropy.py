"""The chunked cross-entropy equals the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tolerances import assert_close

from retnet_jax.ops import cross_entropy
from retnet_jax.ops.cross_entropy import cross_entropy_sum, token_cross_entropy


def problem(b=3, t=10, d=8, w=23):
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((b, t, d), (w, d)))
    targets = jnp.asarray(rng.integers(0, w, (b, t)))
    weights = jnp.asarray(rng.uniform(size=(b, t)), jnp.float32)
    return hidden, head, targets, weights


def plain_sum(hidden, head, targets, weights):
    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ head.T, targets)
    return (losses * weights).sum()


@pytest.mark.parametrize("most", [10**6, 3 * 23 * 4, 1])
def test_chunks_do_not_change_loss_or_gradients(monkeypatch, most):
    monkeypatch.setattr(cross_entropy, "logits_at_once", lambda: most)
    hidden, head, targets, weights = problem()
    loss = jax.jit(jax.value_and_grad(lambda *a: 3 * cross_entropy_sum(*a), argnums=(0, 1)))
    expected = jax.jit(jax.value_and_grad(lambda *a: 3 * plain_sum(*a), argnums=(0, 1)))
    assert_close(loss(hidden, head, targets, weights), expected(hidden, head, targets, weights))
    losses = jax.jit(token_cross_entropy)(hidden, head, targets)
    assert_close((losses * weights).sum(), jax.jit(plain_sum)(hidden, head, targets, weights))


def test_bfloat16_activations_give_float32_losses_close_to_those_of_float32():
    hidden, head, targets, weights = problem()
    loss = jax.jit(jax.value_and_grad(cross_entropy_sum, argnums=(0, 1)))
    rounded = hidden.astype(jnp.bfloat16)
    value, (d_hidden, d_head) = loss(rounded, head, targets, weights)
    assert (value.dtype, d_hidden.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    expected = loss(rounded.astype(jnp.float32), head, targets, weights)
    assert_close((value, (d_hidden, d_head)), expected, "bfloat16")


def test_large_logits_stay_finite():
    hidden, head, targets, weights = problem()
    both = jax.jit(jax.value_and_grad(cross_entropy_sum))
    loss, gradient = both(1e4 * hidden, head, targets, weights)
    assert_close(loss, jax.jit(plain_sum)(1e4 * hidden, head, targets, weights))
    assert np.isfinite(gradient).all()


def test_logits_of_all_positions_are_never_held():
    """With a vocabulary of 100,352 forward and backward take less memory than all logits."""
    d, w, b, t = 16, 100_352, 4, 512

    def memory(function):
        shapes = [
            jax.ShapeDtypeStruct(s, kind)
            for s, kind in (
                ((b, t, d), "float32"),
                ((w, d), "float32"),
                ((b, t), "int32"),
                ((b, t), "float32"),
            )
        ]
        compiled = jax.jit(jax.grad(function, argnums=(0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    all_logits = b * t * w * 4
    assert memory(cross_entropy_sum) < all_logits
    assert memory(plain_sum) > all_logits
