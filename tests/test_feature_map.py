"""Feature maps against the values that flash-linear-attention computed."""

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import RELATIVE, assert_close, relative_difference

from retnet_jax.ops.feature_map import FEATURE_MAPS, feature_map, prelu, xielu

RECORDED = np.load(Path(__file__).parent / "fixtures/feature_maps.npz")


def test_every_recorded_name_exists_and_no_other_but_linear():
    assert set(FEATURE_MAPS) == {*RECORDED.files, "linear"} - {"input"}


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_values_are_those_recorded(name):
    x = RECORDED["input"]
    expected = x if name == "linear" else RECORDED[name]
    with jax.enable_x64(True):
        actual = feature_map(name)(jnp.asarray(x))
        assert actual.dtype == jnp.float64
        # gelu_fast was recorded with 0.7978845608 for sqrt(2 / pi).
        assert relative_difference(actual, expected) <= 1e-10
    actual = feature_map(name)(jnp.asarray(x, jnp.float32))
    assert relative_difference(actual, expected) <= 1e-6


def test_bfloat16_is_rounded_once():
    x = jnp.linspace(-6, 6, 999, dtype=jnp.bfloat16)
    for name in FEATURE_MAPS:
        y = feature_map(name)(x)
        assert y.dtype == jnp.bfloat16
        exact = np.asarray(feature_map(name)(x.astype(jnp.float32)))
        error = np.abs(np.asarray(y, np.float32) - exact)
        assert (error <= 2.0**-8 * np.abs(exact)).all(), name


def test_gradients_at_zero_are_those_of_torch():
    """The slope of the negative side, as torch has it; by default jax takes the mean of both."""
    slope = {name: float(jax.grad(feature_map(name))(jnp.asarray(0.0))) for name in KINKS}
    assert slope == pytest.approx(KINKS)
    assert jax.grad(feature_map("relu6"))(jnp.asarray(6.0)) == 0
    assert jax.grad(lambda x: prelu(x, jnp.array([0.25])))(jnp.asarray(0.0)) == 0.25


KINKS = {"relu": 0.0, "relu2": 0.0, "relu6": 0.0, "leaky_relu": 0.01}


def test_sqrtsoftplus_and_its_gradient_are_exact_where_softplus_is_tiny():
    function = feature_map("sqrtsoftplus")
    x = jnp.asarray([-150.0, -104.0, -41.0, -40.0, -39.0, -10.0, 30.0])
    exact = np.sqrt(np.log1p(np.exp(np.asarray(x, np.float64))))
    slope = 0.5 / exact / (1 + np.exp(-np.asarray(x, np.float64)))
    np.testing.assert_allclose(function(x), exact, rtol=RELATIVE["float32"])
    np.testing.assert_allclose(jax.vmap(jax.grad(function))(x), slope, rtol=RELATIVE["float32"])


def test_learned_maps_follow_their_formulas():
    x = np.linspace(-4, 4, 33)
    weight, alpha_p, alpha_n = np.array([0.3]), np.array([0.7]), np.array([-0.4])
    p, n = np.log1p(np.exp(alpha_p)), 0.5 + np.log1p(np.exp(alpha_n))
    formulas = {
        prelu: ((weight,), np.where(x > 0, x, 0.3 * x)),
        xielu: (
            (alpha_p, alpha_n),
            0.5 * x + np.where(x > 0, p * x**2, n * (np.exp(np.minimum(x, -1e-6)) - 1 - x)),
        ),
    }
    for function, (parameters, expected) in formulas.items():
        with jax.enable_x64(True):
            assert_close(function(*map(jnp.asarray, (x, *parameters))), expected, "float64")
        single = [jnp.asarray(a, jnp.float32) for a in (x, *parameters)]
        assert_close(function(*single), expected)
        half = function(single[0].astype(jnp.bfloat16), *single[1:])
        assert half.dtype == jnp.bfloat16
        assert_close(half, expected, "bfloat16")


def test_gradients_of_the_learned_parameters():
    """The derivatives of the formulas: x below 0, and x^2 or e^x - 1 - x times a sigmoid."""
    x = jnp.linspace(-3, 3, 13)
    total = lambda function: lambda *parameters: function(x, *parameters).sum()  # noqa: E731
    assert_close(jax.grad(total(prelu))(jnp.array([0.3])), np.minimum(x, 0).sum()[None])
    found = jax.grad(total(xielu), argnums=(0, 1))(jnp.array([0.7]), jnp.array([-0.4]))
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    below = np.minimum(x, 0).astype(np.float64)
    assert_close(
        found,
        (
            np.array([sigmoid(0.7) * (np.maximum(x, 0) ** 2).sum()]),
            np.array([sigmoid(-0.4) * (np.expm1(below) - below).sum()]),
        ),
    )


def test_other_names_are_refused():
    unchecked = inspect.unwrap(feature_map)
    with pytest.raises(
        ValueError, match=r"'elu' is not one of linear, relu, .*sqrtsoftplus.*xielu"
    ):
        unchecked("elu")
    with pytest.raises(ValueError, match=r"feature_map='prelu' has parameters: call .*'prelu'"):
        unchecked("prelu")
