"""The origin of results: versions of packages, and fingerprints of code and files."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path, PurePosixPath

from retnet_jax.files.digests import sha256_of_file
from retnet_jax.files.paths import AnyPath, sizes

_PACKAGE = Path(__file__).parent


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python and of the packages, without those that are not installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_fingerprint(part: str = "") -> str:
    """16 hex digits of the SHA-256 of this package's code, or of a part of it such as "data"."""
    return files_sha256(_PACKAGE / part, ".py")[:16]


def files_sha256(directory: AnyPath, ending: str = "") -> str:
    """The SHA-256, in hex, of the names and contents of all files under a directory."""
    digest = hashlib.sha256()
    for name in sorted(map(PurePosixPath, sizes(os.fspath(directory)))):
        if name.name.endswith(ending):
            contents = sha256_of_file(f"{os.fspath(directory)}/{name}")
            digest.update(f"{name} {contents}\n".encode())
    return digest.hexdigest()
