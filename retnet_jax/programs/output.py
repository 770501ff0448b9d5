"""Printing that cannot end a program: into `head`, a closed terminal, or another encoding.

A training run that dies because nobody reads its messages any more loses its last steps, and an
evaluation loses its results.
"""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO)  # the reader of a pipe has ended; the terminal is closed


class _Forgiving:
    """A text stream that drops what it cannot write.

    Args:
      stream: The stream that is written to.
      when_gone: Called when the reader of the stream has ended.
      drops_all: Whether all errors are ignored, also others such as a full disk.
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
        # Redirects the file under the stream too: its buffer is flushed when the program ends, and
        # other libraries write there directly.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def forgiving_output(when_gone: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Within the `with`, writing to stdout and stderr fails neither for readers nor for encodings.

    Output that nobody reads is dropped. A character outside the encoding, or a byte of a file name
    that is not UTF-8, is written as a Python escape.

    Args:
      when_gone: Called once, when the reader of either stream has ended.
    """
    told = []

    def tell() -> None:
        if not told:
            told.append(True)
            when_gone()

    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
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
