"""Output that ends no program: into `head`, a closed terminal, or one that knows fewer characters.

A training run that dies because nobody reads its messages any more loses its last steps, and an
evaluation its results.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO)  # what reads a pipe has ended; the terminal is closed


class _Forgiving:
    """A text stream that drops what it cannot write.

    Args:
      stream: what is written to.
      when_gone: called once, when nobody reads it any more.
      drops_all: whether other errors, such as a full disk, are no errors either.
    """

    def __init__(self, stream: TextIO, when_gone: Callable[[], object], drops_all: bool):
        self._stream = stream
        self._when_gone = when_gone
        self._drops_all = drops_all

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            if error.errno in _GONE:
                self._discard()
                self._when_gone()
            elif not self._drops_all:
                raise

    def _discard(self) -> None:
        # The file under the stream too: the rest of its buffer is written at the end of the
        # program, and other libraries write there.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def forgiving_output(when_gone: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Until the `with` ends, stdout and stderr drop what nobody reads and escape what they lack.

    A character that the encoding does not have, and a byte of a file's name that is no UTF-8, are
    written as Python's escapes.

    Args:
      when_gone: called once, when either is not read any more.
    """
    told = []

    def tell() -> None:
        if not told:
            told.append(True)
            when_gone()

    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout = _Forgiving(before[0], tell, drops_all=False)
    sys.stderr = _Forgiving(before[1], tell, drops_all=True)
    ours = sys.stdout, sys.stderr
    try:
        yield
    finally:
        for stream in ours:
            stream.flush()
        if (sys.stdout, sys.stderr) == ours:
            sys.stdout, sys.stderr = before
