"""Shows on stderr what a program is doing, and for how long, if it takes more than two seconds.

    with showing("compiling the training step"):
        step(state, batch)

A terminal shows a line that counts the seconds and disappears at the end. Elsewhere it is a plain
line, "compiling the training step ... 12 s", whose time is written at the end.
"""

import contextlib
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

AFTER_SECONDS = 2.0


@contextlib.contextmanager
def showing(what: str, enabled: bool = True) -> Iterator[None]:
    """Shows `what` and the time passed while the body runs; nothing for a short body.

    Args:
      what: Description of the work, such as "loading the model".
      enabled: False: nothing is shown, as in all processes but the first.
    """
    if not enabled:
        yield
        return
    finished = threading.Event()
    show = _count_seconds if sys.stderr.isatty() else _write_line
    thread = threading.Thread(target=show, args=(what, finished), daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def showing_first_call(
    function: Callable[..., T], what: str, enabled: bool = True
) -> Callable[..., T]:
    """`function`, whose first call, which compiles it, is shown as `what`."""
    calls = itertools.count()

    def call(*arguments):
        if next(calls):
            return function(*arguments)
        with showing(what, enabled):
            return function(*arguments)

    return call


def with_first(items: Iterable[T], what: str) -> Iterator[T]:
    """The items. The first is computed now, shown as `what`; the others when they are asked for."""
    iterator = iter(items)
    with showing(what):
        first = list(itertools.islice(iterator, 1))
    return itertools.chain(first, iterator)


def _count_seconds(what: str, finished: threading.Event) -> None:
    start = time.monotonic()
    if finished.wait(AFTER_SECONDS):
        return
    from tqdm import tqdm

    # Placed by tqdm below a progress bar that is already shown.
    with tqdm(bar_format="{desc}", leave=False, dynamic_ncols=True) as line:
        while True:
            line.set_description_str(f"{what} ... {time.monotonic() - start:.0f} s")
            if finished.wait(1):
                return


def _write_line(what: str, finished: threading.Event) -> None:
    start = time.monotonic()
    if finished.wait(AFTER_SECONDS):
        return
    # Written in two parts, so that a log shows what a program is doing before it is done.
    print(f"{what} ... ", end="", file=sys.stderr, flush=True)
    finished.wait()
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
