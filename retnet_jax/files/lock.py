"""A directory that one process works in at a time."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from retnet_jax.files.paths import is_remote

FILE_NAME = "lock"


class HeldError(Exception):
    """Another process holds the directory; the message says which and on which machine."""


@contextlib.contextmanager
def held(directory: Path | epath.Path) -> Iterator[None]:
    """Holds a directory, which must exist, until the `with` ends.

    The lock is the system's, on the file `lock` in the directory, so it ends with the process. It
    works on local and network disks; object stores have no locks, and there nothing is held.

    Raises:
      HeldError: if another process holds it.
    """
    if is_remote(directory):
        yield
        return
    import fcntl  # not on Windows, where nothing else here needs it

    with open(directory / FILE_NAME, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise HeldError(file.read().strip()) from None
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        yield
