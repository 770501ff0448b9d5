"""Locks a directory, so that one process works in it at a time."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from etils import epath

from retnet_jax.files.paths import is_remote

FILE_NAME = "lock"


class HeldError(Exception):
    """Another process holds the lock; the message names the process and its machine."""


@contextlib.contextmanager
def held(
    directory: Path | epath.Path, waiting: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Holds the lock of a directory until the `with` ends.

    It is a lock of the operating system on the file `lock` in the directory, so it ends with the
    process. It works on local and network disks. Object stores have no locks, and nothing is locked
    there. The process that holds the lock may delete the file.

    Args:
      directory: An existing directory.
      waiting: Called with the name of the process that holds the lock before this one waits for it;
        None: do not wait.

    Raises:
      HeldError: if another process holds the lock and `waiting` is None.
    """
    if is_remote(directory):
        yield
        return
    with _locked(Path(directory) / FILE_NAME, waiting) as file:
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        yield


def holder(directory: Path) -> str | None:
    """The process that holds the lock of a directory, and its machine; None: no process does."""
    import fcntl

    try:
        with open(directory / FILE_NAME, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return file.read().strip()
    except FileNotFoundError:
        pass
    return None


@contextlib.contextmanager
def _locked(path: Path, waiting: Callable[[str], None] | None) -> Iterator[IO[str]]:
    """The file, open and locked; closing it releases the lock."""
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            _lock(file, waiting)
            if _is_at(path, file):
                yield file
                return
            # Otherwise the previous holder has deleted this file: lock the one that is there now.


def _lock(file: IO[str], waiting: Callable[[str], None] | None) -> None:
    import fcntl  # not on Windows, where nothing else here needs it

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        who = file.read().strip()
        if waiting is None:
            raise HeldError(who) from None
        waiting(who)
        fcntl.flock(file, fcntl.LOCK_EX)


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
