"""SHA-256 of files and of bytes, in hex."""

import hashlib
import os

from etils import epath

from retnet_jax.files.paths import open_binary


def sha256_of_file(path: str | os.PathLike) -> str:
    """The digest of a file's contents, local or remote, read in blocks."""
    digest = hashlib.sha256()
    # What epath opens is opened by it: Orbax writes through the same library.
    with path.open("rb") if isinstance(path, epath.Path) else open_binary(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of(contents: bytes) -> str:
    """The digest of bytes."""
    return hashlib.sha256(contents).hexdigest()
