"""Where results come from: versions of packages, and fingerprints of code and of files."""

import hashlib
import importlib.metadata
import platform
from pathlib import Path

_PACKAGE = Path(__file__).parent


def versions(*packages: str) -> dict[str, str]:
    """The version of Python, and of those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_fingerprint(part: str = "") -> str:
    """SHA-256, its first 16 hex digits, of this package's code or a part of it, such as "data"."""
    return files_sha256(_PACKAGE / part, "**/*.py")[:16]


def files_sha256(directory: Path, pattern: str = "**/*") -> str:
    """SHA-256, in hex, of the names and contents of the files in a directory and below it."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.glob(pattern) if path.is_file()):
        with path.open("rb") as file:
            contents = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(directory)} {contents}\n".encode())
    return digest.hexdigest()
