"""The parameters of a model by name and shape, without allocating them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from retnet_jax.config import ModelConfig
from retnet_jax.model.lm import LanguageModel, build_model
from retnet_jax.trees import named_leaves


def abstract_model(config: ModelConfig) -> Any:
    """Shapes and dtypes of a model's parameters, in the structure of the model."""
    return jax.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter, by its name in this package."""
    # The cache needs a copy that the caller cannot change; float64 would need a setting of jax.
    return _parameter_shapes(dataclasses.replace(config, dtype="float32"))


def parameter_shape(config: ModelConfig, own: str, layer: int | None) -> tuple[int, ...]:
    """The shape of a parameter, or of one layer's part of it if `layer` is given."""
    shape = parameter_shapes(config)[own]
    return shape if layer is None else shape[1:]


def why_not_finite(model: LanguageModel) -> str:
    """Why a model's outputs are NaN or infinite: because of a parameter, or of the activations."""
    for name, leaf in named_leaves(model).items():
        if count := int((~jnp.isfinite(leaf)).sum()):
            return f"{count} of the {leaf.size} numbers of its parameter {name} are NaN or infinite"
    return f"its parameters are finite, so its activations leave the range of {model.config.dtype}"


@functools.cache
def _parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in named_leaves(abstract_model(config)).items()}
