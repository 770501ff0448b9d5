"""Checkpoints of this project: training runs, and safetensors files with the same parameter names.

A conversion writes the latter: config.json with the section "model" of a run's config,
model.safetensors, and the tokenizer's files. It is the smaller one to publish.
"""

import dataclasses
import json
from typing import Any

import numpy as np

from retnet_jax.config import Config, ModelConfig
from retnet_jax.config.as_json import config_from_json, read_config
from retnet_jax.interop.parameter_source import Description
from retnet_jax.interop.safetensors_reader import AnyPath
from retnet_jax.interop.tables import Layout, Rule
from retnet_jax.interop.tensor_files import TensorInfo
from retnet_jax.model.parameters import abstract_model, parameter_shapes


def own_layout(config: ModelConfig) -> Layout:
    """This project's layout, for one model: its table is the identity."""
    return Layout(
        name="own",
        rules=tuple(Rule(name, name) for name in parameter_shapes(config)),
        read_config=lambda values, _: describe(config_of(values)),
        write_config=write_config,
    )


def config_of(values: dict[str, Any]) -> Config:
    """The checked config in a `config.json` of this project."""
    config = config_from_json(json.dumps(values), origin="config.json")
    config.check()
    return config


def describe(config: Config) -> Description:
    """The description of a model trained by this project."""
    return Description(config.model, context_length=config.data.sequence_length)


def write_config(description: Description) -> dict[str, Any]:
    """The `config.json`: the model, and its training length."""
    return {
        "model": dataclasses.asdict(description.model),
        "data": {"sequence_length": description.context_length},
    }


class RunSource:
    """The parameters of a training run's newest checkpoint, read one by one.

    Attributes:
      step: Step of the checkpoint.
    """

    def __init__(self, workdir: AnyPath):
        from retnet_jax.runs.checkpoint import ParameterReader

        self.description = describe(read_config(workdir / "config.json"))
        model = abstract_model(self.description.model)
        self._reader = ParameterReader(workdir / "checkpoints", model)
        self.step = self._reader.step
        self._read: tuple[str, np.ndarray] | None = None

    def info(self, own: str, layer: int | None) -> TensorInfo:
        shape = parameter_shapes(self.description.model)[own]
        return TensorInfo(shape if layer is None else shape[1:], np.dtype(np.float32))

    def read(self, own: str, layer: int | None) -> np.ndarray:
        if self._read is None or self._read[0] != own:
            self._read = None  # frees it before the next one is read
            self._read = own, self._reader.read(own)
        array = self._read[1]
        return array if layer is None else array[layer]
