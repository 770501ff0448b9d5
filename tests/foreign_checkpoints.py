"""Checkpoints of other implementations in tests/fixtures: copied, changed and compared."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from retnet_jax.interop.tables import config_values
from retnet_jax.model import build_model

FIXTURES = Path(__file__).parent / "fixtures"


def new(config):
    """A model at the start of its training."""
    return jax.jit(lambda: build_model(config, rngs=nnx.Rngs(0)))()


def tensors(directory):
    """All tensors of a directory's safetensors files."""
    names = ("weights.safetensors", "model*.safetensors")
    return {
        name: value
        for pattern in names
        for path in sorted(directory.glob(pattern))
        for name, value in load_file(path).items()
    }


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape), name
        if "retnet_rel_pos" in name:  # derived; torch computes it in float32
            np.testing.assert_allclose(actual[name], value, rtol=1e-6)
        else:
            assert actual[name].tobytes() == value.tobytes(), name


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


def copy_of(case, directory):
    shutil.copytree(FIXTURES / case, directory, ignore=shutil.ignore_patterns("io.*", "grads*"))
    return directory


def edit_config(directory, **values):
    config = config_values(directory) | values
    (directory / "config.json").write_text(json.dumps(config))


def edit_tensors(directory, change):
    (path,) = directory.glob("*.safetensors")
    found = load_file(path)
    change(found)
    save_file({name: np.ascontiguousarray(value) for name, value in found.items()}, path)
