"""One line of a layout's table: a parameter's name here and there, and how its arrays differ."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from retnet_jax.config import ModelConfig


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
      own: This project's name of a parameter; "layers/..." are stacked over layers: [n ...].
      foreign: The layout's name. With "{layer}" in it, each layer is a separate tensor.
      transposed: Whether the layout stores [out, in] where this project's kernels are [in, out].
      depthwise: Whether the layout stores [c, 1, w], as PyTorch's Conv1d with a group for each
        channel, where this project's convolutions are [c, w].
      when: Whether the line is for a model with this config; of several for one parameter at most
        one is.
      first: The layer that is the first in the parameter's stack.
      step: Number of layers from one in the stack to the next.
    """

    own: str
    foreign: str
    transposed: bool = False
    depthwise: bool = False
    when: Callable[[ModelConfig], bool] = lambda _: True
    first: int = 0
    step: int = 1

    def foreign_name(self, layer: int | None) -> str:
        """The layout's name of the tensor of a layer, numbered in the parameter's stack."""
        return self.foreign.format(layer=None if layer is None else self.first + layer * self.step)

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        """One layer's parameter as the layout stores it."""
        array = array.T if self.transposed else array
        return array[:, None] if self.depthwise else array

    def to_own(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_foreign`."""
        array = array[:, 0] if self.depthwise else array
        return array.T if self.transposed else array

    def foreign_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that `to_foreign` gives an array of this shape."""
        shape = shape[::-1] if self.transposed else shape
        return (shape[0], 1, *shape[1:]) if self.depthwise else shape
