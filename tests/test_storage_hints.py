"""Hints of how arrays are stored change no number."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from retnet_jax.ops.storage_hints import named_bits

POLICY = jax.checkpoint_policies.save_only_these_names("retention")


def test_bits_are_stored_without_rounding_them_again():
    x = jnp.linspace(-3, 3, 64, dtype=jnp.bfloat16)

    def gradient(named):
        def loss(x):
            return jnp.sin(named(jnp.cos(x))).sum()

        return jax.grad(jax.checkpoint(loss, policy=POLICY))

    as_bits, as_numbers = (
        gradient(named) for named in (named_bits, lambda y: checkpoint_name(y, "retention"))
    )
    text = {name: str(jax.make_jaxpr(f)(x)) for name, f in (("b", as_bits), ("n", as_numbers))}
    assert "reduce_precision" in text["n"]
    assert "reduce_precision" not in text["b"]
    # Stored, and not computed again.
    assert text["b"].count("= cos") == text["n"].count("= cos")
    assert jnp.array_equal(as_bits(x), as_numbers(x))
