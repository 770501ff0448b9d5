"""Files and directories that appear under their name complete or not at all.

Each is written under another name beside its own first and then renamed. Object stores have no
rename, but a file appears there only when it is complete.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from etils import epath

from retnet_jax.files.paths import is_remote

P = TypeVar("P", Path, epath.Path)

ENDING = ".unfinished"  # of the names that are not theirs yet


def write_text(path: Path | epath.Path, text: str) -> None:
    """Writes a text file as UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path | epath.Path, contents: bytes) -> None:
    """Writes a file. An older one with the same name is replaced."""
    if is_remote(path):
        path.write_bytes(contents)
        return
    unfinished = _unfinished(path)
    try:
        unfinished.write_bytes(contents)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def directory(path: Path) -> Iterator[Path]:
    """A new directory to write to, which is renamed to `path` when the `with` ends.

    After an error it is deleted. `path` must not exist then, or be an empty directory.
    """
    unfinished = _unfinished(path)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def is_unfinished(path: Path | epath.Path) -> bool:
    """Whether a path is what a process that was killed has left of a write."""
    return path.name.endswith(ENDING)


def _unfinished(path: P) -> P:
    # Two processes may write the same file: each has a name of its own.
    return path.with_name(f".{path.name}.{os.getpid()}{ENDING}")
