"""Initial parameters under each rule of `init`: moments and bounds, and a layer of torchscale's."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx
from foreign_checkpoints import FIXTURES
from safetensors.numpy import load_file

from retnet_jax import ModelConfig
from retnet_jax.model import build_model
from retnet_jax.model.initial import RETENTION_GAINS
from retnet_jax.trees import named_leaves

# All kinds of Linears; widths that differ, so that no two fans are the same.
RETNET = ModelConfig(
    vocab_size=61, d_model=32, n_layers=3, n_heads=4, key_dim=24, value_dim=48, n_kv_heads=2,
    ffn="swiglu", ffn_dim=40, mixer_bias=True, ffn_bias=True,
)  # fmt: skip
TRANSFORMER = dataclasses.replace(
    RETNET, mixer="attention", key_dim=None, value_dim=None, ffn="gelu"
)

BOTH = [
    pytest.param(RETNET, id="retnet"),
    pytest.param(TRANSFORMER, id="transformer", marks=pytest.mark.slow),
]


def random_source():
    """Random bits of XLA's own generator, which compiles in a fraction of threefry's time."""
    return nnx.Rngs(params=jax.random.key(0, impl="rbg"))


@functools.cache
def parameters(config):
    """The parameters of three layers, as numpy arrays by name."""
    built = jax.jit(lambda: build_model(config, rngs=random_source()))()
    return {name: np.asarray(x, np.float64) for name, x in named_leaves(built).items()}


def fans(x):
    return x.shape[-2], x.shape[-1]


def assert_normal(x, deviation, name):
    """Moments of a normal distribution, within five standard errors; its tails are there."""
    assert abs(x.mean()) < 5 * deviation / math.sqrt(x.size), name
    assert abs(x.std() / deviation - 1) < 5 / math.sqrt(2 * x.size), name
    if x.size > 1000:
        assert np.abs(x).max() > 2.5 * deviation, name


def assert_uniform(x, bound, name):
    """Nothing is outside of +-bound, the extremes are near, and the deviation is bound / 3^1/2."""
    assert bound * (1 - 40 / x.size) < np.abs(x).max() <= bound * (1 + 1e-6), name
    assert abs(x.std() * math.sqrt(3) / bound - 1) < 5 / math.sqrt(5 * x.size) + 1e-6, name


@pytest.mark.parametrize("config", [RETNET, TRANSFORMER], ids=["retnet", "transformer"])
@pytest.mark.parametrize("deepnorm", [pytest.param(False, marks=pytest.mark.slow), True])
def test_torchscale(config, deepnorm):
    found = parameters(dataclasses.replace(config, init="torchscale", deepnorm=deepnorm))
    xavier = RETENTION_GAINS
    assert xavier == {"q": 2**-2.5, "k": 2**-2.5, "v": 2**-2.5, "gate": 2**-2.5, "out": 0.5}
    if config.mixer == "attention":
        xavier = {"q": 2**-0.5, "k": 2**-0.5, "v": 2**-0.5, "out": 1.0}
    for name, x in found.items():
        part = name.split("/")[-2] if "/" in name else name
        divided = (8 * 3) ** 0.25 if deepnorm and part in ("v", "out", "up", "down") else 1
        if name in ("embedding", "head"):
            assert_normal(x, 32**-0.5, name)
        elif name.endswith("kernel") and "/mixer/" in name:
            assert_uniform(x, xavier[part] * math.sqrt(6 / sum(fans(x))) / divided, name)
        elif name.endswith("kernel"):
            assert_uniform(x, fans(x)[0] ** -0.5 / divided, name)
        elif name.endswith("mixer/out/bias"):
            assert not x.any(), name
        elif name.endswith("bias") and "norm" not in name:
            inputs = fans(found[name.replace("bias", "kernel")])[0]
            assert_uniform(x, inputs**-0.5 / divided, name)
        else:
            assert (x == ("scale" in name)).all(), name


@pytest.mark.parametrize("case", RETENTION_GAINS)
def test_torchscales_recorded_layer_has_these_gains(case):
    """The fixture is a layer as torchscale made it."""
    recorded = load_file(FIXTURES / "torchscale_head" / "msr_init" / "retention.safetensors")
    name = {"gate": "g"}.get(case, case)
    x = recorded[f"weight.{name}_proj.weight"].astype(np.float64)
    assert_uniform(x, RETENTION_GAINS[case] * math.sqrt(6 / sum(x.shape)), case)


@pytest.mark.parametrize("config", BOTH)
def test_deepnet(config):
    found = parameters(dataclasses.replace(config, init="deepnet"))
    scaled = parameters(config)
    for name, x in found.items():
        if name.endswith("kernel"):
            gain = (8 * 3) ** -0.25 if name.split("/")[-2] in ("v", "out", "up", "down") else 1
            assert_normal(x, gain * math.sqrt(2 / sum(fans(x))), name)
        else:
            np.testing.assert_array_equal(x, scaled[name], name)


@pytest.mark.parametrize("config", BOTH)
def test_scaled_and_zero_outputs(config):
    scaled = parameters(config)
    zeros = parameters(dataclasses.replace(config, init="zero_outputs"))
    for name, x in scaled.items():
        if name.endswith(("out/kernel", "down/kernel")):
            assert_normal(x, (2 * 3 * fans(x)[0]) ** -0.5, name)
            assert not zeros[name].any(), name
            continue
        np.testing.assert_array_equal(x, zeros[name], name)
        if name.endswith("kernel"):
            assert_normal(x, fans(x)[0] ** -0.5, name)


def test_deepnorm_as_it_was():
    """`deepnorm` scales four kernels of "scaled": it did before there were other rules."""
    plain = parameters(RETNET)
    for name, x in parameters(dataclasses.replace(RETNET, deepnorm=True)).items():
        part = name.split("/")[-2] if "/" in name else name
        factor = (8 * 3) ** -0.25 if part in ("v", "up", "out", "down") else 1
        if part in ("out", "down"):
            factor *= (2 * 3) ** 0.5
        np.testing.assert_allclose(x, factor * plain[name], rtol=1e-6, err_msg=name)
