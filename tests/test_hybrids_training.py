"""Training of hybrids: eight devices equal one, and windows are carried from step to step."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from test_hybrids import WINDOWED
from test_train_step import CONFIG, batch, losses_of, sums_of_gradients
from tolerances import assert_close

from retnet_jax.config import DataConfig, MeshConfig
from retnet_jax.errors import ConfigError
from retnet_jax.training.step import initial_state


def hybrid_run(entry=WINDOWED, n_layers=4, **changes):
    model = dataclasses.replace(
        CONFIG.model, n_layers=n_layers, attention_layers=(entry,), **changes
    )
    return dataclasses.replace(CONFIG, model=model)


MESHES = [
    pytest.param({"data": 2, "seq": 2, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param({"seq": 4}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_training_on_eight_devices_equals_one(axes):
    entry = dataclasses.replace(WINDOWED, layers=(1,), bias=True)
    config = hybrid_run(entry, n_layers=2, remat="q,k,v,up")
    one = losses_of(config, MeshConfig(), jax.devices()[:1])
    mesh = MeshConfig(**({"data": 1} | axes))
    devices = jax.devices()[: np.prod(list(axes.values()))]
    assert_close(losses_of(config, mesh, devices), one)


@pytest.mark.slow
def test_eight_devices_carry_windows():
    config = dataclasses.replace(
        hybrid_run(dataclasses.replace(WINDOWED, n_kv_heads=1)),
        data=DataConfig(windows="contiguous"),
        train=dataclasses.replace(CONFIG.train, carry_state=True),
    )
    config.check()
    one = losses_of(config, MeshConfig(), jax.devices()[:1])
    assert_close(losses_of(config, MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()), one)
    config.train = dataclasses.replace(config.train, carry_state=False)
    assert abs(losses_of(config, MeshConfig(), jax.devices()[:1])[2] - one[2]) > 1e-5


@pytest.mark.slow
def test_micro_batches_carry_windows():
    config = hybrid_run()
    model = jax.jit(partial(initial_state, config))().model
    model.embedding = nnx.Param(50 * model.embedding[...])
    carry = model.init_state(8, capacity=0)
    carry = sums_of_gradients(model, batch(0), 1, carry)[1].carry
    expected = sums_of_gradients(model, batch(1), 1, carry)
    assert_close(sums_of_gradients(model, batch(1), 2, carry), expected)
    config = dataclasses.replace(
        config,
        data=DataConfig(windows="contiguous"),
        train=dataclasses.replace(config.train, carry_state=True),
    )
    config.check()
    unlimited = dataclasses.replace(WINDOWED, window=None)
    config.model = dataclasses.replace(config.model, attention_layers=(unlimited,))
    with pytest.raises(ConfigError, match=r"cache of model.attention_layers\[0\] grows"):
        config.check()
