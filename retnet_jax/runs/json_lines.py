"""A file of JSON lines that grows during a run."""

import json
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from retnet_jax.files import atomic
from retnet_jax.files.paths import is_remote

_REMOTE_SECONDS = 60  # between writes to an object store, each of which writes the whole file


class JsonLines:
    """Appends records to a file without losing any.

    Records that cannot be written, because the disk is full, are kept in memory and written later.
    On object stores the file is written at most once a minute, and when it is flushed.

    A last line that was cut off is deleted. Other lines that are not records of a step are kept.

    Args:
      path: Path of the file.
      say: Called with messages about problems with the file.
      last_step: Records of later steps are deleted, because these steps will be run again; None: no
        records are deleted.
    """

    def __init__(
        self, path: epath.Path, say: Callable[[str], object], last_step: int | None = None
    ):
        self._path, self._say = path, say
        self._waiting: list[bytes] = []  # lines that are not in the file yet
        self._written_at = 0.0
        self._failing = False
        self._kept: list[bytes] = []  # all lines of the file, if it is on an object store
        if not path.exists():
            return
        contents = path.read_bytes()
        kept = self._lines(contents, last_step)
        if b"".join(kept) != contents:
            atomic.write_bytes(path, b"".join(kept))
        if is_remote(path):
            self._kept = kept

    def append(self, record: dict[str, Any]) -> None:
        """Writes a record, now or as soon as possible."""
        self._waiting.append(json.dumps(record, allow_nan=False).encode() + b"\n")
        if not is_remote(self._path) or time.monotonic() - self._written_at > _REMOTE_SECONDS:
            self._write()

    def flush(self) -> None:
        """Writes the records that are not yet written."""
        if self._waiting:
            self._write()

    def _lines(self, contents: bytes, last_step: int | None) -> list[bytes]:
        """The lines of a file to keep."""
        *lines, last = contents.split(b"\n")
        kept = []
        for number, line in enumerate(lines, start=1):
            step = _step_of(line)
            if step is None:
                self._say(f"{self._path}, line {number} is not a record of a step; it is kept")
            if step is None or last_step is None or step <= last_step:
                kept.append(line + b"\n")
        if last:
            self._say(f"{self._path}: the last line was cut off and is deleted")
        return kept

    def _write(self) -> None:
        new = b"".join(self._waiting)
        try:
            if is_remote(self._path):
                atomic.write_bytes(self._path, b"".join(self._kept) + new)
                self._kept += self._waiting
            else:
                _append(self._path, new)
        except OSError as error:
            if not self._failing:
                self._say(
                    f"{self._path} cannot be written now ({error}); its records are kept in memory "
                    "and written later"
                )
            self._failing = True
            return
        self._waiting.clear()
        self._written_at, self._failing = time.monotonic(), False


def records_in(path: epath.Path) -> list[dict[str, Any]]:
    """The records of steps in a file, without its other lines; none if it does not exist."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) is not None]


def _append(path: epath.Path, contents: bytes) -> None:
    """Appends all of the bytes or none."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            written = 0
            while written < len(contents):
                written += file.write(contents[written:])
        except OSError:
            file.truncate(end)
            raise


def _step_of(line: bytes) -> int | None:
    """The step of a record; None for a line that is not a record of a step."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):
        return None
    return step if type(step) is int else None
