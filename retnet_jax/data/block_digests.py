"""Reads the files of a shard in blocks of 64 KiB, and verifies each block before returning it.

A shard's `blocks.npy` holds the XXH3-64 of every block of its other files, uint64 [blocks]: file
after file in the order of their names. A .npy header is part of its file's first block, and a
file's last block may be shorter. The manifest has the digest of blocks.npy itself.
"""

from __future__ import annotations

import hashlib
import io
import tokenize
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from retnet_jax.files import paths as files
from retnet_jax.files.digests import xxh3_of, xxh3_of_file

FILE_NAME = "blocks.npy"
BLOCK_BYTES = 1 << 16


class DamagedBlockError(Exception):
    """The bytes [first, last) of the file `name` are not what was written."""

    def __init__(self, name: str, first: int, last: int):
        super().__init__(f"{name}: bytes {first} to {last}")
        self.name, self.first, self.last = name, first, last


class ShardFiles:
    """The files of one shard.

    Args:
      directory: Directory of the shard.
      about: Entry of the shard in the manifest. A shard of format 3 has no digests of blocks, so
        its files are not verified.
    """

    def __init__(self, directory: str, about: dict[str, Any]):
        self.directory = directory
        self._about = about
        self._digests: dict[str, np.ndarray] | None = None

    def size(self, name: str) -> int:
        """Size of a file in bytes, according to the manifest."""
        return self._about["files"][name]["bytes"]

    def read(self, name: str) -> bytes:
        """The contents of a file.

        Raises:
          DamagedBlockError: if they or the contents of blocks.npy are damaged.
        """
        data = files.read_bytes(f"{self.directory}/{name}")
        digests = self.digests(name)
        if digests is not None:
            if len(data) != self.size(name):
                raise DamagedBlockError(name, 0, self.size(name))
            _verify(name, data, 0, digests)
        return data

    def array(self, name: str) -> StoredArray:
        """A .npy file. Slicing it raises `DamagedBlockError`, as `read`."""
        path = f"{self.directory}/{name}"
        return StoredArray(path, name, self.size(name), self.digests(name))

    def digests(self, name: str) -> np.ndarray | None:
        """The digests of a file's blocks, uint64 [blocks]; None for a shard of format 3.

        Raises:
          DamagedBlockError: if blocks.npy is damaged.
        """
        if "blocks" not in self._about:
            return None
        if self._digests is None:
            self._digests = self._read_digests()
        return self._digests[name]

    def _read_digests(self) -> dict[str, np.ndarray]:
        data = files.read_bytes(f"{self.directory}/{FILE_NAME}")
        if xxh3_of(data) != self._about["blocks"]["xxh3"]:
            raise DamagedBlockError(FILE_NAME, 0, self._about["blocks"]["bytes"])
        names = sorted(self._about["files"])
        ends = np.cumsum([-(-self.size(name) // BLOCK_BYTES) for name in names])
        parts = np.split(np.load(io.BytesIO(data)), ends[:-1])
        return dict(zip(names, parts, strict=True))


# What numpy raises if bytes of a header are wrong, which it reads as Python source.
_HEADER_ERRORS = (ValueError, TypeError, SyntaxError, tokenize.TokenError)


class StoredArray:
    """A one-dimensional .npy file, mapped to memory or read by byte ranges.

    A block of a mapped file is verified when it is first read. From remote storage, a slice is read
    in one request of whole blocks, which are verified each time they are transferred.

    Args:
      path: Path of the file.
      name: Name of the file in its shard, for error messages.
      size: Size of the file in bytes.
      digests: Digests of its blocks, uint64; None: blocks are not verified.
    """

    def __init__(self, path: str, name: str, size: int, digests: np.ndarray | None):
        self._name = name
        self._digests = digests
        self._bytes = files.open_bytes(path)
        self._is_mapped = not files.is_remote(path)
        # Several threads write to it; at worst two of them verify the same block.
        self._verified = np.zeros(0 if digests is None else len(digests), bool)
        head = io.BytesIO(self._read(0, min(size, BLOCK_BYTES)).tobytes())
        try:
            version = np.lib.format.read_magic(head)
            if version != (1, 0):
                raise ValueError(f"{path} is .npy of version {version}, not 1.0")
            (self._length,), _, self.dtype = np.lib.format.read_array_header_1_0(head)
            if self.dtype.str.startswith(">"):
                raise ValueError(f"{path} has {self.dtype}; numbers are little-endian")
            self._data_start = head.tell()
            if self._data_start + self._length * self.dtype.itemsize != size:
                raise ValueError(f"{path} has {size} bytes, not those of its header")
        except _HEADER_ERRORS as error:  # only in a file without digests
            raise DamagedBlockError(name, 0, min(size, BLOCK_BYTES)) from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, step = index.indices(self._length)
        if step != 1:
            raise ValueError(f"a slice with step {step}; only step 1 is supported")
        if stop <= start:
            return np.empty(0, self.dtype)
        begin, width = self._data_start, self.dtype.itemsize
        return self._read(begin + start * width, begin + stop * width).view(self.dtype)

    def _read(self, first: int, last: int) -> np.ndarray:
        """The bytes [first, last), not empty."""
        if self._digests is None:
            return self._bytes[first:last]
        low, high = first // BLOCK_BYTES, -(-last // BLOCK_BYTES)
        begin = low * BLOCK_BYTES
        data = self._bytes[begin : high * BLOCK_BYTES]
        if not self._verified[low:high].all():
            _verify(self._name, data.data, begin, self._digests[low:high], self._verified[low:high])
            self._verified[low:high] = self._is_mapped
        return data[first - begin : last - begin]


class FileDigests(NamedTuple):
    """Size and digests of a file."""

    bytes: int
    sha256: str
    blocks: np.ndarray  # uint64


def digests_of_file(path: files.AnyPath) -> FileDigests:
    """The digests of a local or remote file and of its blocks. The file is read once."""
    size, sha256, blocks = 0, hashlib.sha256(), []
    with files.open_binary(path) as file:
        while block := file.read(BLOCK_BYTES):
            size += len(block)
            sha256.update(block)
            blocks.append(xxhash.xxh3_64_intdigest(block))
    return FileDigests(size, sha256.hexdigest(), np.array(blocks, "<u8"))


def write_block_digests(directory: Path, names: Iterable[str]) -> dict[str, Any]:
    """Writes blocks.npy beside the files of a shard.

    Returns:
      "files" and "blocks" of the shard's entry in the manifest.
    """
    found = {name: digests_of_file(directory / name) for name in sorted(names)}
    path = directory / FILE_NAME
    np.save(path, np.concatenate([x.blocks for x in found.values()]))
    return {
        "files": {name: {"bytes": x.bytes, "sha256": x.sha256} for name, x in found.items()},
        "blocks": {"bytes": path.stat().st_size, "xxh3": xxh3_of_file(path)},
    }


def _verify(
    name: str,
    data: bytes | memoryview,
    begin: int,
    digests: np.ndarray,
    verified: np.ndarray | None = None,
) -> None:
    """Compares blocks of a file with their digests; `data` begins at the file's byte `begin`."""
    view = memoryview(data)
    for number, digest in enumerate(digests.tolist()):
        if verified is not None and verified[number]:
            continue
        block = view[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
        if xxhash.xxh3_64_intdigest(block) != digest:
            first = begin + number * BLOCK_BYTES
            raise DamagedBlockError(name, first, first + max(1, len(block)))
