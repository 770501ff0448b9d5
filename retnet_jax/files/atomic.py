"""Files and directories that appear complete or not at all.

Each is first written under a temporary name in the same directory and then renamed. Object stores
cannot rename, but there a file appears only when it is complete.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from retnet_jax.files.paths import is_remote

ENDING = ".unfinished"  # of temporary names


def write_text(path: Path | epath.Path, text: str) -> None:
    """Writes a text file as UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path | epath.Path, contents: bytes) -> None:
    """Writes a file, replacing an older one of the same name."""
    if is_remote(path):
        path.write_bytes(contents)
        return
    unfinished = _unfinished(Path(path))
    try:
        unfinished.write_bytes(contents)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def directory(path: Path) -> Iterator[Path]:
    """A new directory to write to, which is renamed to `path` when the `with` ends.

    After an error it is deleted. When the `with` ends, `path` must not exist or be empty.
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
    """Whether a path is the unfinished write of a process that was killed."""
    return path.name.endswith(ENDING)


def _unfinished(path: Path) -> Path:
    # Two processes may write the same file, so each has its own temporary name.
    return path.with_name(f".{path.name}.{os.getpid()}{ENDING}")
