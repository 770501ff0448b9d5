"""Products with weights as decoding stores them: precise, finite only for finite inputs, and read
without being written to memory in another dtype.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close

from retnet_jax.ops.embedding import look_up_stored
from retnet_jax.ops.stored_product import stored_product

product = jax.jit(stored_product)


def operands(shape, dtype, outputs=24):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * np.exp(2 * rng.normal(size=shape))  # of unlike magnitudes
    weight = rng.normal(size=(outputs, shape[-1]))
    if dtype == "int8":
        weight, dtype = np.round(30 * weight).clip(-127, 127).astype(np.int8), "float32"
        return x.astype(dtype), weight
    return x.astype(dtype), weight.astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(1, 1, 96), (3, 1, 96), (2, 24, 96)])
def test_a_product_is_that_of_the_stored_numbers(shape, dtype):
    x, weight = operands(shape, jnp.dtype(dtype))
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    found = product(x, weight)
    assert found.dtype == np.float32
    assert_close(found, expected)


def test_int8_products_are_of_float64_for_such_activations():
    x, weight = operands((1, 1, 96), "int8")
    with jax.enable_x64(True):
        found = product(x.astype(np.float64), weight)
    assert found.dtype == np.float64
    assert_close(found, x.astype(np.float64) @ weight.astype(np.float64).T, "float64")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_int8_product_is_not_finite_where_its_input_is_not(value):
    x, weight = operands((2, 1, 96), "int8")
    x[1, 0, 5] = value
    found = np.asarray(product(x, weight))
    assert np.isfinite(found[0]).all()
    assert not np.isfinite(found[1]).any()


@pytest.mark.parametrize("scale", [0, 1e-35, 3e38])
def test_an_int8_product_of_the_least_and_the_largest_numbers(scale):
    x, weight = operands((1, 1, 96), "int8")
    x = (np.sign(x) * scale).astype(np.float32)
    weight = np.sign(weight) * (np.arange(96) == 7)  # one number of each row: no sum overflows
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    found = np.asarray(product(x, weight), np.float64)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_on_a_cpu_no_weight_is_converted(dtype):
    x, weight = operands((1, 1, 96), jnp.dtype(dtype), outputs=160)
    text = product.lower(x, weight).compile().as_text()
    assert not re.search(r"[fs]32\[(160,96|96,160)\]", text)


def test_bfloat16_rows_are_looked_up_without_converting_the_table():
    _, table = operands((1, 1, 96), jnp.dtype("bfloat16"), outputs=160)
    tokens = np.array([[3, 159, 0]])
    rows = jax.jit(look_up_stored)
    assert (np.asarray(rows(table, tokens)) == table[tokens]).all()
    assert "f32[160,96]" not in rows.lower(table, tokens).compile().as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_no_vectors_have_no_products(dtype):
    x, weight = operands((1, 1, 96), jnp.dtype(dtype))
    assert product(x[:0], weight).shape == (0, 1, 24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_gradient_is_that_of_a_matrix_product(dtype):
    x, weight = operands((1, 1, 96), jnp.dtype(dtype))
    gradient = jax.jit(jax.grad(lambda x, weight: stored_product(x, weight).sum()))(x, weight)
    assert_close(gradient[0, 0], weight.astype(np.float64).sum(0), x.dtype)


def test_the_gradient_of_a_bfloat16_table_is_of_the_rows_that_were_looked_up():
    _, table = operands((1, 1, 4), jnp.dtype("bfloat16"), outputs=5)
    tokens = np.array([[3, 1, 3]])
    gradient = jax.jit(jax.grad(lambda x, y: look_up_stored(x, y).sum()))(table, tokens)
    assert gradient.astype(np.float32)[:, 0].tolist() == [0, 1, 0, 2, 0]
