"""Files on local disk by path, and on gs://, s3:// and the like by URL, through fsspec."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from etils import epath

from retnet_jax.errors import ConfigError

AnyPath = str | os.PathLike[str]


def is_remote(path: AnyPath) -> bool:
    """Whether a path is a URL."""
    return "://" in str(path)


def expanded(path: AnyPath) -> str:
    """A path as a person types it, with `~` and `~user` replaced; a URL stays as it is."""
    return str(path) if is_remote(path) else os.path.expanduser(path)


def place(path: AnyPath) -> epath.Path:
    """A directory or file as a person types it, local or remote, with `~` replaced."""
    return epath.Path(expanded(path))


def local(path: AnyPath) -> Path:
    """A path on local disk as a person types it, with `~` and `~user` replaced."""
    return Path(expanded(path))


def printable(name: str) -> str:
    """A name with the bytes escaped that are no UTF-8, which Python has as lone surrogates."""
    return name.encode("utf-8", "backslashreplace").decode()


def exists(path: AnyPath) -> bool:
    """Whether there is a file or directory."""
    if is_remote(path):
        system, inner = _remote(path)
        return system.exists(inner)
    return os.path.exists(path)


def size(path: AnyPath) -> int:
    """Bytes of a file."""
    if is_remote(path):
        system, inner = _remote(path)
        return system.size(inner)
    return os.path.getsize(path)


def sizes(directory: str) -> dict[str, int]:
    """Bytes of each file in a directory and below, by its path from there: one request."""
    if is_remote(directory):
        system, inner = _remote(directory)
        found = system.find(inner, detail=True)
        root = inner.rstrip("/") + "/"
        return {path.removeprefix(root): about["size"] for path, about in found.items()}
    paths = (Path(parent) / name for parent, _, names in os.walk(directory) for name in names)
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in paths}


def read_bytes(path: AnyPath) -> bytes:
    """The contents of a file."""
    if is_remote(path):
        system, inner = _remote(path)
        return system.cat_file(inner)
    return Path(path).read_bytes()


def open_binary(path: AnyPath):
    """A file to read from, buffered."""
    if is_remote(path):
        system, inner = _remote(path)
        return system.open(inner, "rb")
    return open(path, "rb")


def matches(pattern: str) -> list[str]:
    """The files that a URL with wildcards matches; one that exists is taken as it is."""
    system, inner = _remote(pattern)
    if system.isfile(inner):
        return [system.unstrip_protocol(inner)]
    return [system.unstrip_protocol(path) for path in system.glob(inner) if system.isfile(path)]


def open_array(path: str) -> np.ndarray | RemoteArray:
    """A one-dimensional .npy file: mapped to memory, or read by byte ranges."""
    return RemoteArray(path) if is_remote(path) else np.load(path, mmap_mode="r")


class RemoteArray:
    """A one-dimensional .npy file on remote storage; each slice is one request."""

    def __init__(self, path: str):
        self._system, self._path = _remote(path)
        with self._system.open(self._path, "rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"{path} is .npy of version {version}, not 1.0")
            self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(file)
            self._data_start = file.tell()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"a slice with the step {step}; only 1 is read at once")
        first, last = (
            self._data_start + i * self.dtype.itemsize for i in (start, max(start, stop))
        )
        data = self._system.cat_file(self._path, first, last) if last > first else b""
        return np.frombuffer(data, self.dtype)


def _remote(path: AnyPath):
    import fsspec

    try:
        return fsspec.core.url_to_fs(str(path))
    except (ImportError, ValueError) as error:  # no package for it; no such protocol
        raise ConfigError(f"{path} cannot be read: {error}") from error
