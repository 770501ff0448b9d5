"""Digests of files and of bytes, in hex.

XXH3 detects damage and is as fast as memory: checkpoints and stores are compared with it whenever
they are read. SHA-256 names contents: equal digests mean equal contents, whoever wrote them.
"""

import hashlib
import os

import xxhash
from etils import epath

from retnet_jax.files.paths import open_binary

_BLOCK = 1 << 20


def xxh3_of_file(path: str | os.PathLike) -> str:
    """The 128-bit XXH3 of a file's contents, local or remote, read in blocks."""
    return _of_file(path, xxhash.xxh3_128())


def xxh3_of(contents: bytes) -> str:
    """The 128-bit XXH3 of bytes."""
    return xxhash.xxh3_128(contents).hexdigest()


def sha256_of_file(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's contents, local or remote, read in blocks."""
    return _of_file(path, hashlib.sha256())


def sha256_of(contents: bytes | bytearray) -> str:
    """The SHA-256 of bytes."""
    return hashlib.sha256(contents).hexdigest()


def _of_file(path: str | os.PathLike, digest) -> str:
    # Orbax writes through epath, so an epath is opened by epath too.
    with path.open("rb") if isinstance(path, epath.Path) else open_binary(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
