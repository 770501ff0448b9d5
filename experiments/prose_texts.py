"""English prose for experiments: the documentation in source packages on PyPI, at fixed versions.

    python -m experiments.prose_texts        downloads what is missing to data/prose

Prose of its kind: manuals, tutorials and lists of changes in reStructuredText, with examples in
Python. Each package is under its own licence; nothing of them is in this repository.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from retnet_jax.errors import ConfigError
from retnet_jax.files import atomic

DIRECTORY = Path("data/prose")
TEXTS = str(DIRECTORY / "*" / "*.txt")
SUFFIXES = (".rst", ".txt")
FEWEST_BYTES = 500  # shorter files are lists of names and titles


@dataclass(frozen=True)
class Package:
    """A source package: its file on PyPI, and the SHA-256 of it."""

    name: str
    file: str
    sha256: str


PACKAGES = (
    Package(
        "django",
        "django-6.1.tar.gz",
        "86a2aacd59b817e4d6ac2ebfe22356c58f66f7b24e503f71b7c2fead677ee48b",
    ),
    Package(
        "sqlalchemy",
        "sqlalchemy-2.1.9.tar.gz",
        "d700a8b2edfb26282a470333d6bc4a454c4acda4d201a3bea7b72fa76c217d28",
    ),
    Package(
        "salt",
        "salt-3008.5.tar.gz",
        "0259deafd601d783721e5aa8ed10677d8c4d6cc12f5de17499af71590d593315",
    ),
    Package(
        "numpy",
        "numpy-2.5.5.tar.gz",
        "5cddc243c75114ba845f01b1f87aca1572dbf7b6c2d88636ed3e1d2bccd7f1bf",
    ),
    Package(
        "scikit-learn",
        "scikit_learn-1.9.1.tar.gz",
        "629cada3e33e2b9bf376cdc7614a47a4140b8aedc1d836579e359736fbd82977",
    ),
    Package(
        "pytest",
        "pytest-9.2.0.tar.gz",
        "97c4f3b1f3c7414aa36465e09b8220f1d03627993bd51b1282e193753c80557b",
    ),
    Package(
        "astropy",
        "astropy-8.0.2.tar.gz",
        "e6af35823099ad6a40b57dbe5ff845f577374ea131925c9fa4b49eeab06c5310",
    ),
    Package(
        "twisted",
        "twisted-26.4.0.tar.gz",
        "dbfd0fe1ee409d0243fdd7a6a6ff14f4948cec1fd78e0376291f805e1501fae9",
    ),
    Package(
        "celery",
        "celery-5.7.0.tar.gz",
        "6a5dfcf6662287204f009a02002b9e66c83d4105e47ebabdc7079108772fc6f0",
    ),
    Package(
        "pyramid",
        "pyramid-2.1.tar.gz",
        "5a24bc1b5f9e0f0d1c0b6ddd1111e84c15dac44a07e3c1d24e74dd9bb4fc22eb",
    ),
    Package(
        "zope",
        "zope-6.3.tar.gz",
        "c75e5d37ab0f0684e0f1693940f3a1d55ad13bdf281bf5e0abe45b7b5e6cc4e2",
    ),
    Package(
        "sphinx",
        "sphinx-9.2.0.tar.gz",
        "90470459f3cab15d9dfed146c71cf77694b0445df17b2e0e69059cb9f7fc9ee4",
    ),
    Package(
        "dask",
        "dask-2026.8.0.tar.gz",
        "8a94c37b5de6d869343340dc26c3c3acca7ec48a3abdabe00ea3abb1125884d5",
    ),
)


def prepare(packages: tuple[Package, ...] = PACKAGES, directory: Path = DIRECTORY) -> None:
    """Downloads the packages that are missing, and writes each page as a text file.

    Raises:
      ConfigError: for a package that cannot be had, or has another SHA-256.
    """
    for package in packages:
        target = directory / package.file.removesuffix(".tar.gz")
        if not target.exists():
            pages = pages_of(_downloaded(package))
            with atomic.directory(target) as part:
                for name, text in pages.items():
                    (part / name).write_text(text, encoding="utf-8")


def pages_of(archive: bytes) -> dict[str, str]:
    """The pages of documentation in a source package, by a name made of their path."""
    pages = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as files:
        for entry in files:
            path = PurePosixPath(entry.name)
            documentation = any(part.startswith("doc") for part in path.parts[1:-1])
            if not (entry.isfile() and documentation and path.suffix in SUFFIXES):
                continue
            found = files.extractfile(entry)
            assert found is not None  # it is a file
            text = found.read().decode("utf-8", errors="replace")
            if len(text.encode()) >= FEWEST_BYTES:
                # With the suffix: thing.rst and thing.txt may stand in one directory.
                pages["__".join(path.parts[1:]) + ".txt"] = text
    return pages


def _downloaded(package: Package) -> bytes:
    """The source package, from the index that pip uses."""
    index = f"{_index()}/{package.name}/"
    try:
        listed = json.loads(_read(index, {"Accept": "application/vnd.pypi.simple.v1+json"}))
        address = next(x["url"] for x in listed["files"] if x["filename"] == package.file)
        print(f"downloading {package.file}", file=sys.stderr)
        archive = _read(urllib.parse.urljoin(index, address))
    except StopIteration:
        raise ConfigError(f"{package.file} is not in the package index {index}") from None
    except (urllib.error.URLError, ValueError) as error:
        raise ConfigError(f"{package.file} cannot be had from {index}: {error}") from error
    found = hashlib.sha256(archive).hexdigest()
    if found != package.sha256:
        raise ConfigError(
            f"{package.file} from {index} has the SHA-256 {found}, not {package.sha256}: it is "
            "another file"
        )
    return archive


def _index() -> str:
    """The address of pip's package index."""
    given = os.environ.get("PIP_INDEX_URL")
    if given is None:
        command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
        given = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return (given or "https://pypi.org/simple").rstrip("/")


def _read(address: str, headers: dict[str, str] | None = None) -> bytes:
    request = urllib.request.Request(address, headers=headers or {})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read()


if __name__ == "__main__":
    prepare()
