"""Reads one safetensors file: memory-mapped, or by byte ranges on an object store."""

import contextlib
import dataclasses
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from retnet_jax.errors import CheckpointError, brief
from retnet_jax.files.paths import is_remote

AnyPath = Path | epath.Path
# Names of dtypes in safetensors; other dtypes hold no parameters.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@contextlib.contextmanager
def opened(path: AnyPath) -> Iterator[Any]:
    """An open safetensors file: `safe_open`, or the same interface for an object store."""
    from safetensors import SafetensorError, safe_open

    with contextlib.ExitStack() as stack:
        try:
            if is_remote(path):
                opened = _RemoteSafetensors(stack.enter_context(path.open("rb")))
            else:
                opened = stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError, ValueError, LookupError, struct.error) as error:
            raise CheckpointError(
                f"{path} is missing, truncated or damaged ({brief(error)}); fetch it again"
            ) from error
        yield opened


class _RemoteSafetensors:
    """The used part of `safe_open`'s interface, for a file that cannot be memory-mapped.

    Args:
      file: Open seekable file.

    Raises:
      ValueError, LookupError, struct.error: if it is not a complete safetensors file.
    """

    def __init__(self, file: Any):
        self._file = file
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        (size,) = struct.unpack("<Q", file.read(8))
        if size > end - 8:
            raise ValueError(f"a header of {size} bytes in a file of {end} bytes")
        header = json.loads(file.read(size))
        self._data_start = 8 + size
        self._tensors = {name: about for name, about in header.items() if name != "__metadata__"}
        needed = max((about["data_offsets"][1] for about in self._tensors.values()), default=0)
        if needed != end - self._data_start:
            raise ValueError(f"expected {needed} bytes of data, found {end - self._data_start}")

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_slice(self, name: str) -> "_RemoteTensor":
        return _RemoteTensor(self._file, self._data_start, **self._tensors[name])

    def get_tensor(self, name: str) -> np.ndarray:
        tensor = self.get_slice(name)
        whole = tensor.shape if tensor.shape else (1,)
        return dataclasses.replace(tensor, shape=whole)[:].reshape(tensor.shape)


@dataclass(frozen=True)
class _RemoteTensor:
    """A tensor in an open file; a slice of its first axis is one range of bytes."""

    file: Any
    data_start: int
    dtype: str
    shape: Sequence[int]
    data_offsets: Sequence[int]

    def get_dtype(self) -> str:
        return self.dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        dtype = DTYPES[self.dtype]
        stride = int(np.prod(self.shape[1:], dtype=np.int64)) * dtype.itemsize
        self.file.seek(self.data_start + self.data_offsets[0] + start * stride)
        data = self.file.read((stop - start) * stride)
        return np.frombuffer(data, dtype).reshape(stop - start, *self.shape[1:])
