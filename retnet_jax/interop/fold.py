"""What can be folded into other parameters without a change of what is computed."""

import dataclasses

import numpy as np

from retnet_jax.errors import ConfigError
from retnet_jax.interop.parameter_source import Source
from retnet_jax.interop.tensor_files import TensorInfo

_SCALE = "layers/mixer/head_norm/scale"
_OUT = "layers/mixer/out/kernel"


class HeadNormFolded:
    """The parameters of a source with the head norm's scale multiplied into the output projection.

    The gate comes between the two and is elementwise, so y W = (y / scale) (scale W). The product
    is rounded to the dtype that the output projection is stored in.
    """

    def __init__(self, source: Source):
        model = source.description.model
        if not model.head_norm_scale:
            raise ConfigError("there is no scale in the head norm of this model to fold")
        self._source = source
        self._n_heads = model.n_heads
        self.description = dataclasses.replace(
            source.description, model=dataclasses.replace(model, head_norm_scale=False)
        )

    def info(self, own: str, layer: int | None) -> TensorInfo:
        return self._source.info(own, layer)

    def read(self, own: str, layer: int | None) -> np.ndarray:
        array = self._source.read(own, layer)
        if own != _OUT:
            return array
        scale = np.tile(self._source.read(_SCALE, layer).astype(np.float32), self._n_heads)
        return (scale[:, None] * array.astype(np.float32)).astype(array.dtype)
