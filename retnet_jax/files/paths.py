"""Reads files on local disks by path, and on gs://, s3:// and others by URL, through fsspec."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from etils import epath

from retnet_jax.errors import ConfigError

AnyPath = str | os.PathLike[str]


def is_remote(path: AnyPath) -> bool:
    """Whether a path is a URL."""
    return "://" in str(path)


def expanded(path: AnyPath) -> str:
    """A path as a user types it, with `~` and `~user` replaced; a URL stays as it is."""
    return str(path) if is_remote(path) else os.path.expanduser(path)


def place(path: AnyPath) -> epath.Path:
    """A local or remote path as a user types it, with `~` replaced.

    Raises:
      ConfigError: for a URL whose package, such as gcsfs, is not installed, and for a protocol
        that is not that of a storage, such as https.
    """
    if is_remote(path) and importlib.util.find_spec("tensorflow") is None:
        _remote(path)  # epath, which reads by tensorflow or fsspec, fails only when it is used
    try:
        return epath.Path(expanded(path))
    except KeyError as error:  # epath does not know the protocol
        raise ConfigError(
            f"{path} is neither a local path nor a URL such as gs://bucket/run or s3://bucket/run"
        ) from error


def local(path: AnyPath) -> Path:
    """A local path as a user types it, with `~` and `~user` replaced.

    Raises:
      ConfigError: for a URL, of which `Path` would make a directory "gs:".
    """
    if is_remote(path):
        raise ConfigError(
            f"{path} is a URL, but this file or directory must be on a local disk: give a path "
            "there, and copy it"
        )
    return Path(expanded(path))


def printable(name: str) -> str:
    """A name with bytes that are not UTF-8 escaped; Python has them as lone surrogates."""
    return name.encode("utf-8", "backslashreplace").decode()


def exists(path: AnyPath) -> bool:
    """Whether a file or directory exists."""
    if is_remote(path):
        system, inner = _remote(path)
        return system.exists(inner)
    return os.path.exists(path)


def entries(directory: epath.Path) -> list[epath.Path]:
    """The files and directories in a directory; none if it does not exist.

    On an object store a directory exists only while there is a file in it, also after `mkdir`.
    """
    try:
        return list(directory.iterdir())
    except FileNotFoundError:
        return []


def missing_directories(path: Path | epath.Path) -> list[Path | epath.Path]:
    """Those of a path and its parents that do not exist, the deepest first; none of a URL.

    `remove_empty` removes them again after a failure.
    """
    if is_remote(path):
        return []
    return list(itertools.takewhile(lambda x: not x.exists(), [path, *path.parents]))


def remove_empty(directories: Iterable[Path | epath.Path]) -> None:
    """Removes the directories that exist and are empty, in this order."""
    for directory in directories:
        with contextlib.suppress(OSError):
            os.rmdir(directory)


def size(path: AnyPath) -> int:
    """Size of a file in bytes."""
    if is_remote(path):
        system, inner = _remote(path)
        return system.size(inner)
    return os.path.getsize(path)


def sizes(directory: str) -> dict[str, int]:
    """Size in bytes of each file below a directory, by its path from there; one request."""
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
    """A file opened for buffered reading."""
    if is_remote(path):
        system, inner = _remote(path)
        return system.open(inner, "rb")
    return open(path, "rb")


def matches(pattern: str) -> list[str]:
    """The files that match a URL with wildcards; the URL of an existing file matches that file."""
    system, inner = _remote(pattern)
    if system.isfile(inner):
        return [system.unstrip_protocol(inner)]
    return [system.unstrip_protocol(path) for path in system.glob(inner) if system.isfile(path)]


def open_bytes(path: str) -> np.ndarray | RemoteBytes:
    """The bytes of a file, for slicing: mapped to memory, or read by byte ranges."""
    # A plain array of the memory map: slices of a np.memmap itself are several times slower.
    return RemoteBytes(path) if is_remote(path) else np.asarray(np.memmap(path, np.uint8, "r"))


class RemoteBytes:
    """The bytes of a file on remote storage; each slice is one request."""

    def __init__(self, path: str):
        self._system, self._path = _remote(path)

    def __getitem__(self, index: slice) -> np.ndarray:
        """The bytes of a range, which may reach beyond the end of the file."""
        data = self._system.cat_file(self._path, index.start, index.stop)
        return np.frombuffer(data, np.uint8)


def _remote(path: AnyPath):
    import fsspec
    import fsspec.config

    # Other processes and TensorStore write to the same places, which a cached listing would hide.
    protocol = str(path).partition("://")[0]
    fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    try:
        return fsspec.core.url_to_fs(str(path))
    except (ImportError, ValueError) as error:  # its package is missing; no such protocol
        raise ConfigError(f"{path} cannot be read: {error}") from error
