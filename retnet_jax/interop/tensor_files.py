"""Named tensors in files: safetensors and PyTorch's format, in one file or several.

Tensors are read one at a time, or some rows of one, and written one at a time, so that a conversion
never holds a whole model in memory.
"""

import contextlib
import json
import os
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from retnet_jax.errors import CheckpointError
from retnet_jax.files.paths import is_remote
from retnet_jax.interop.safetensors_reader import DTYPES, AnyPath, opened

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SAFETENSORS = (INDEX, SINGLE, "weights.safetensors")
TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_SINGLE = "pytorch_model.bin"
TORCH = ("*.pt", "*.pth", "*.bin")
NESTED = ("model", "state_dict", "model_state_dict")  # keys under which PyTorch files nest tensors


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TensorFiles(Protocol):
    """Open files: the tensors in them by name."""

    infos: dict[str, TensorInfo]

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Reads a tensor, or some of its rows."""
        ...


def has_tensor_files(directory: AnyPath) -> bool:
    """Whether there are files that `open_tensor_files` would open or raise an error for."""
    names = (*SAFETENSORS, TORCH_INDEX)
    return any((directory / name).is_file() for name in names) or bool(_torch_files(directory))


def open_tensor_files(directory: AnyPath) -> TensorFiles:
    """Opens the tensors in a directory: safetensors if there are any, else PyTorch's.

    Raises:
      CheckpointError: if there are no files, several candidates, or a damaged file; naming it.
    """
    if (directory / INDEX).is_file():
        return _indexed(directory / INDEX, directory / SINGLE, SafetensorsFiles)
    for name in SAFETENSORS[1:]:
        if (directory / name).is_file():
            return SafetensorsFiles([directory / name])
    if (directory / TORCH_INDEX).is_file():
        return _indexed(directory / TORCH_INDEX, directory / TORCH_SINGLE, TorchFiles)
    torch_files = _torch_files(directory)
    if len(torch_files) == 1:
        return TorchFile(torch_files[0])
    if torch_files:
        names = ", ".join(path.name for path in torch_files)
        raise CheckpointError(
            f"{directory} has several PyTorch files ({names}); copy the right one to a new "
            "directory with its config.json"
        )
    raise CheckpointError(f"{directory} has no weights: expected {weights_files()}")


def weights_files() -> str:
    """The possible names of weights files, for messages."""
    return f"{', '.join(SAFETENSORS)}, {TORCH_INDEX}, or one PyTorch file ({', '.join(TORCH)})"


def _indexed(
    index: AnyPath,
    single: AnyPath,
    open_files: Callable[[Sequence[AnyPath], Mapping[str, AnyPath] | None], TensorFiles],
) -> TensorFiles:
    """The tensors that an index names; `single` may be a file of the whole model beside it.

    Either may be a leftover of another model. An index without its files is ignored; otherwise
    both must hold the same tensors.
    """
    path_of = {name: index.parent / file for name, file in _weight_map(index).items()}
    absent = sorted({path for path in path_of.values() if not path.is_file()})
    if single.is_file() and absent:
        warnings.warn(
            f"{single} is read and {index} is ignored: {absent[0]}, a file that it names, does not "
            "exist",
            stacklevel=3,
        )
        return open_files([single], None)
    divided = open_files(sorted(set(path_of.values())), path_of)
    if single.is_file() and single not in path_of.values():
        differing = _first_difference(open_files([single], None), divided)
        if differing is not None:
            raise CheckpointError(
                f"{single} and the files that {index} names hold different models "
                f"(the first difference is in {differing}): delete the wrong one"
            )
    return divided


def _first_difference(one: TensorFiles, other: TensorFiles) -> str | None:
    """The name of the first tensor that differs between two sets of files; None: none does."""
    for name in sorted(one.infos | other.infos):
        if one.infos.get(name) != other.infos.get(name):
            return name
        if one.read(name).tobytes() != other.read(name).tobytes():
            return name
    return None


def _check_complete(
    infos: Mapping[str, TensorInfo], path_of: Mapping[str, AnyPath], index: str
) -> None:
    """Raises `CheckpointError` if a tensor is not in the file that the index names."""
    absent = sorted(set(path_of) - set(infos))
    if absent:
        raise CheckpointError(
            f"{path_of[absent[0]]} does not hold {absent[0]}, although {index} says so; "
            "download both again"
        )


class SafetensorsFiles:
    """Tensors of one or more safetensors files.

    A file is memory-mapped only while a tensor is read, because mapped pages count as memory.

    Args:
      paths: The files.
      path_of: The file of each tensor, from an index; other tensors are ignored. None: all tensors.

    Raises:
      CheckpointError: for a missing or damaged file, and for a tensor that is not in the file that
        the index names.
    """

    def __init__(self, paths: Sequence[AnyPath], path_of: Mapping[str, AnyPath] | None = None):
        self.infos: dict[str, TensorInfo] = {}
        self._path_of: dict[str, AnyPath] = {}
        for path in paths:
            with opened(path) as file:
                for name in file.keys():  # noqa: SIM118
                    if path_of is not None and path_of.get(name) != path:
                        continue
                    tensor = file.get_slice(name)
                    dtype = tensor.get_dtype()
                    if dtype not in DTYPES:
                        raise CheckpointError(
                            f"{path}: {name} has dtype {dtype}, which is not one of "
                            f"{', '.join(DTYPES)}"
                        )
                    self.infos[name] = TensorInfo(tuple(tensor.get_shape()), DTYPES[dtype])
                    self._path_of[name] = path
        _check_complete(self.infos, path_of or {}, INDEX)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        with opened(self._path_of[name]) as file:
            return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]


class TorchFile:
    """Tensors of a file that `torch.save` wrote.

    They may be nested: fairseq's under ["model"], with "decoder." before their names, Lightning's
    and others' under ["state_dict"]. Only tensors and plain values are unpickled
    (`weights_only=True`).
    """

    def __init__(self, path: AnyPath):
        torch = _torch(f"reading {path}")
        import argparse

        try:
            # fairseq's options are an argparse.Namespace, which holds only data.
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.serialization.safe_globals([argparse.Namespace]))
                mapped = not is_remote(path) and zipfile.is_zipfile(path)
                content = torch.load(
                    path if mapped else stack.enter_context(path.open("rb")),
                    map_location="cpu",
                    weights_only=True,
                    mmap=mapped,  # older files are no zip archives, and are read as a whole
                )
        except Exception as error:  # torch raises errors of many types
            first = str(error).strip().split("\n")[0]
            raise CheckpointError(
                f"{path} cannot be loaded as tensors only ({type(error).__name__}: {first}); if "
                "it holds other objects, save only its state dictionary"
            ) from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, no dictionary")
        self.options = _fairseq_options(content)
        nested = next((content[x] for x in NESTED if isinstance(content.get(x), dict)), content)
        self._tensors = {
            name.removeprefix("decoder."): tensor
            for name, tensor in nested.items()
            if isinstance(tensor, torch.Tensor)
        }
        if not self._tensors:
            keys = ", ".join(sorted(map(str, content))[:8]) or "nothing"
            raise CheckpointError(
                f"{path} holds no named tensors, neither at the top level nor under "
                f"{' or '.join(NESTED)}; found {keys}"
            )
        dtypes = {
            torch.float64: DTYPES["F64"],
            torch.float32: DTYPES["F32"],
            torch.float16: DTYPES["F16"],
            torch.bfloat16: DTYPES["BF16"],
        }
        self.infos = {}
        for name, tensor in self._tensors.items():
            if tensor.dtype not in dtypes:
                raise CheckpointError(f"{path}: {name} is {tensor.dtype}, no floating-point dtype")
            self.infos[name] = TensorInfo(tuple(tensor.shape), dtypes[tensor.dtype])

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        torch = _torch(f"reading {name}")
        tensor = self._tensors[name].detach()
        tensor = (tensor if rows is None else tensor[rows]).contiguous()
        if tensor.dtype == torch.bfloat16:  # torch cannot convert it to numpy's (ml_dtypes)
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


class TorchFiles:
    """Tensors of several files that `torch.save` wrote; arguments and errors as SafetensorsFiles.

    Zip archives, which PyTorch has written since version 1.6, are mapped to memory; older files
    are all in memory at once.
    """

    def __init__(self, paths: Sequence[AnyPath], path_of: Mapping[str, AnyPath] | None = None):
        self.infos: dict[str, TensorInfo] = {}
        self._file_of: dict[str, TorchFile] = {}
        for path in paths:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing, although {TORCH_INDEX} names it")
            file = TorchFile(path)
            for name, info in file.infos.items():
                if path_of is None or path_of.get(name) == path:
                    self.infos[name], self._file_of[name] = info, file
        _check_complete(self.infos, path_of or {}, TORCH_INDEX)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self._file_of[name].read(name, rows)


@dataclass(frozen=True)
class TensorToWrite:
    """A tensor to write; its pieces, along the first axis, are made while it is written."""

    name: str
    info: TensorInfo
    pieces: Iterable[np.ndarray]

    @property
    def bytes(self) -> int:
        """Size in a file."""
        return int(np.prod(self.info.shape, dtype=np.int64)) * self.info.dtype.itemsize


def write_safetensors(
    directory: Path, tensors: Sequence[TensorToWrite], max_file_bytes: int
) -> None:
    """Writes one safetensors file, or several and an index if it would exceed `max_file_bytes`.

    The `safetensors` package needs all tensors in memory, so the format is written here: the
    length of a JSON header, the header, and the bytes of the tensors one after the other.

    Raises:
      CheckpointError: if the disk has too little space.
    """
    needed, free = sum(tensor.bytes for tensor in tensors), shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"{directory}: {needed:,} bytes are needed, but only {free:,} are free on the disk"
        )
    # Wide dtypes first, so that each tensor is aligned.
    tensors = sorted(tensors, key=lambda tensor: -tensor.info.dtype.itemsize)
    groups = list(_grouped(tensors, max_file_bytes))
    if len(groups) == 1:
        _write_file(directory / SINGLE, tensors)
        return
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        _write_file(directory / name, group)
        weight_map |= {tensor.name: name for tensor in group}
    index = {"metadata": {"total_size": needed}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_torch(path: Path, tensors: Sequence[TensorToWrite]) -> None:
    """Writes a file for fairseq's loader, {"model": {"decoder.NAME": tensor}}, from memory."""
    torch = _torch(f"writing {path}")

    def tensor_of(tensor: TensorToWrite):
        whole = np.concatenate([piece.reshape(-1) for piece in tensor.pieces])
        if whole.dtype == ml_dtypes.bfloat16:
            flat = torch.from_numpy(whole.view(np.int16)).view(torch.bfloat16)
        else:
            flat = torch.from_numpy(whole)
        return flat.reshape(tensor.info.shape)

    torch.save({"model": {f"decoder.{t.name}": tensor_of(t) for t in tensors}}, path)


def _fairseq_options(content: dict) -> dict | None:
    """The model's options in a fairseq file: under ["cfg"]["model"], in old ones ["args"]."""
    cfg = content.get("cfg")
    options = cfg.get("model") if isinstance(cfg, dict) else content.get("args")
    if hasattr(options, "__dict__"):
        options = vars(options)
    return options if isinstance(options, dict) else None


def _torch_files(directory: AnyPath) -> list[AnyPath]:
    return sorted(path for pattern in TORCH for path in directory.glob(pattern))


def _weight_map(index: AnyPath) -> dict[str, str]:
    """The file of each tensor, from an index."""
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is not an index of tensors ({type(error).__name__}: {error})"
        ) from error


def _grouped(
    tensors: Sequence[TensorToWrite], max_file_bytes: int
) -> Iterator[list[TensorToWrite]]:
    group: list[TensorToWrite] = []
    for tensor in tensors:
        if group and sum(t.bytes for t in group) + tensor.bytes > max_file_bytes:
            yield group
            group = []
        group.append(tensor)
    yield group


def _write_file(path: Path, tensors: Sequence[TensorToWrite]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    # PyTorch's readers, such as transformers, require this entry.
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.bytes
        header[tensor.name] = {
            "dtype": names[tensor.info.dtype],
            "shape": list(tensor.info.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # data begins at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            for piece in tensor.pieces:
                file.write(np.ascontiguousarray(piece, tensor.info.dtype).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _torch(purpose: str):
    try:
        import torch  # pyright: ignore[reportMissingImports] (optional)
    except ImportError as error:
        raise CheckpointError(
            f"{purpose} needs PyTorch: pip install torch; safetensors files do not need it"
        ) from error
    return torch
