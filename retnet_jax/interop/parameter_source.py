"""Sources of parameters, read one at a time, and a model built from one."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from retnet_jax.config import ModelConfig
from retnet_jax.errors import ConfigError
from retnet_jax.interop.tensor_files import TensorInfo
from retnet_jax.model import DecodingModel, LanguageModel
from retnet_jax.model.parameters import abstract_model, parameter_shapes
from retnet_jax.parallel.mesh import first_device
from retnet_jax.parallel.sharding import with_shardings
from retnet_jax.trees import leaf_name, named_leaves


@dataclass(frozen=True)
class Description:
    """The content of a checkpoint's config that conversions keep."""

    model: ModelConfig
    context_length: int = 2048  # training length in tokens
    bos_id: int | None = None
    eos_id: int | list[int] | None = None


class Source(Protocol):
    """Parameters to load, save or convert, in this project's orientation."""

    @property
    def description(self) -> Description:
        """What the checkpoint's config says."""
        ...

    def info(self, own: str, layer: int | None) -> TensorInfo:
        """Shape and dtype of a parameter; `layer` as in `read`."""
        ...

    def read(self, own: str, layer: int | None) -> np.ndarray:
        """Reads the parameter with this project's name `own`.

        `layer` selects one layer of a parameter stacked over layers; None: all of it.
        """
        ...


class ModelSource:
    """The parameters of a model in memory, fetched from its devices one by one."""

    def __init__(self, model: LanguageModel):
        """Raises `ConfigError` for a model prepared for decoding."""
        if isinstance(model, DecodingModel):
            raise ConfigError(
                "a model from for_decoding() cannot be saved, because its weights are rounded and "
                "joined; save the model it was made from"
            )
        self.description = Description(model.config)
        self._leaves = named_leaves(model)
        self._fetched: tuple[str, np.ndarray] | None = None

    def info(self, own: str, layer: int | None) -> TensorInfo:
        leaf = self._leaves[own]
        return TensorInfo(leaf.shape if layer is None else leaf.shape[1:], np.dtype(leaf.dtype))

    def read(self, own: str, layer: int | None) -> np.ndarray:
        if self._fetched is None or self._fetched[0] != own:
            self._fetched = own, np.asarray(self._leaves[own])
        array = self._fetched[1]
        return array if layer is None else array[layer]


_HEAD_NORM_SCALE = "mixer/head_norm/scale"
_OUT_KERNEL = "mixer/out/kernel"


class HeadNormFolded:
    """The parameters of a source, with the head norm's scale folded into the output projection.

    Between the two there is only the elementwise gate, so y W = (y / scale) (scale W). The product
    is rounded to the stored dtype of the output projection.
    """

    def __init__(self, source: Source):
        """Raises `ConfigError` for a model whose head norm has no scale."""
        model = source.description.model
        if not model.head_norm_scale:
            raise ConfigError(
                "fold_head_norm: the head norm of this model has no scale; leave it out"
            )
        self._source = source
        self._n_heads = model.n_heads
        # Attention layers of a hybrid have none.
        self._scales = {x for x in parameter_shapes(model) if x.endswith(_HEAD_NORM_SCALE)}
        self.description = dataclasses.replace(
            source.description, model=dataclasses.replace(model, head_norm_scale=False)
        )

    def info(self, own: str, layer: int | None) -> TensorInfo:
        return self._source.info(own, layer)

    def read(self, own: str, layer: int | None) -> np.ndarray:
        array = self._source.read(own, layer)
        scales = own.removesuffix(_OUT_KERNEL) + _HEAD_NORM_SCALE
        if not own.endswith(_OUT_KERNEL) or scales not in self._scales:
            return array
        scale = np.tile(self._source.read(scales, layer).astype(np.float32), self._n_heads)
        return (scale[:, None] * array.astype(np.float32)).astype(array.dtype)


def load_model(source: Source, mesh: Mesh | None = None, **changes: Any) -> LanguageModel:
    """Builds the model with the parameters of a source.

    The host holds one parameter at a time, and each device receives only its shard.

    Args:
      source: Source of the parameters.
      mesh: Devices for the parameters, sharded as in training; None: the first device.
      changes: Fields of `ModelConfig` that change no parameter, such as dtype.

    Raises:
      ConfigError: if a change needs other parameters.
    """
    config = changed(source.description.model, changes)
    mesh = first_device() if mesh is None else mesh

    def array(path, leaf):
        name = leaf_name(path)
        if name.startswith("layers/"):
            whole = np.empty(leaf.shape, leaf.dtype)
            for layer in range(leaf.shape[0]):
                whole[layer] = source.read(name, layer)
        else:
            whole = np.asarray(source.read(name, None), leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: whole[index])

    return jax.tree_util.tree_map_with_path(array, with_shardings(abstract_model(config), mesh))


def changed(config: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    """A config with new values in fields that change no parameter.

    Raises:
      ConfigError: for an unknown field, and for one that changes parameters.
    """
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    for name in changes:
        if name not in known:
            raise ConfigError(f"{name}={changes[name]!r}: model has no such field")
    new = dataclasses.replace(config, **changes)
    new.check()
    if parameter_shapes(new) != parameter_shapes(config):
        given = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        raise ConfigError(
            f"{given} needs other parameters than those of the checkpoint; dtype, remat, "
            "scan_layers, chunk_size and score_clamp can be changed"
        )
    return new
