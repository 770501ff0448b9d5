"""Runs a task for each shard of a store, in several processes, with progress on stderr."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from retnet_jax import waiting


def for_each_shard(
    task: Callable[[tuple[int, Any]], int],
    items: list[tuple[int, Any]],
    sizes: list[int],
    processes: int,
    label: str,
) -> None:
    """Runs a task for each shard, in this process or in others, which end when this one does.

    Args:
      task: Function of a shard's number and data. It may call `advance`.
      items: Numbers and data of the shards.
      sizes: Source bytes of every shard, by its number.
      processes: Number of processes that work in parallel.
      label: Label of the progress.
    """
    progress = Progress(sum(sizes[shard] for shard, _ in items), label)
    with progress:
        if processes == 1 or len(items) == 1:
            for item in items:
                _run(task, item, sizes[item[0]], progress.add)
            return
        context = multiprocessing.get_context("spawn")
        alive, held = context.Pipe(duplex=False)
        done = context.Value("q", 0)  # bytes, added up by all processes
        pool = concurrent.futures.ProcessPoolExecutor(
            processes, context, initializer=_prepare_process, initargs=(alive, done)
        )
        with pool:
            running = {pool.submit(_run, task, item, sizes[item[0]]) for item in items}
            try:
                while running:
                    ended, running = concurrent.futures.wait(
                        running, _SECONDS_BETWEEN_LOOKS, concurrent.futures.FIRST_COMPLETED
                    )
                    for future in ended:
                        future.result()
                    progress.move_to(done.value)
            except BaseException:
                held.close()  # ends the processes; their unfinished work is not needed
                pool.shutdown(cancel_futures=True)
                raise


_SECONDS_BETWEEN_LOOKS = 0.5
_BYTES_BETWEEN_REPORTS = 500_000


def advance(size: int) -> None:
    """Called by a task: it has worked through this many more bytes of its shard, about."""
    _advance.get()(size)


_advance: contextvars.ContextVar[Callable[[int], None]] = contextvars.ContextVar(
    "advance", default=lambda size: None
)


def _run(
    task: Callable[[tuple[int, Any]], int],
    item: tuple[int, Any],
    size: int,
    report: Callable[[int], None] | None = None,
) -> None:
    """Runs a task. All its reports together are the size of its shard."""
    report = report or _add_to_done
    left, unreported = size, 0

    def advanced(more: int, /) -> None:
        nonlocal left, unreported
        unreported = min(left, unreported + more)
        if unreported >= _BYTES_BETWEEN_REPORTS:
            report(unreported)
            left, unreported = left - unreported, 0

    before = _advance.set(advanced)
    try:
        task(item)
    finally:
        _advance.reset(before)
    report(left)


_done: Any = None  # in a process of a pool: the shared number of bytes


def _add_to_done(size: int) -> None:
    with _done.get_lock():
        _done.value += size


def _prepare_process(alive: Connection, done: Any) -> None:
    global _done
    _done = done
    # There is a process for each core; a tokenizer's own threads would only compete with them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches all processes of a terminal; the process that started these handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()


def _end_with(alive: Connection) -> None:
    """Ends this process when the process that started it closes its end of a pipe or is killed.

    An unfinished shard does no harm: it has a temporary name until it is complete.
    """
    with contextlib.suppress(EOFError, OSError):
        alive.recv_bytes()
    os._exit(1)


class Progress:
    """Shows on stderr how many source bytes are done: a bar, or a line for every tenth.

    Work of less than two seconds shows nothing.
    """

    def __init__(self, total: int, label: str):
        self._total, self._label, self._done = total, label, 0
        self._begins = time.monotonic() + waiting.AFTER_SECONDS
        self._bar = None

    def __enter__(self):
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total,
                desc=self._label,
                unit="B",
                unit_scale=True,
                delay=waiting.AFTER_SECONDS,
            )
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.close()

    def add(self, size: int) -> None:
        self.move_to(self._done + size)

    def move_to(self, done: int) -> None:
        tenths_before, step, self._done = 10 * self._done // self._total, done - self._done, done
        if self._bar is not None:
            self._bar.update(step)
        elif 10 * done // self._total > tenths_before and time.monotonic() >= self._begins:
            say(f"{self._label}: {self._amount(done)}")

    def _amount(self, done: int) -> str:
        if self._total < 1e6:  # also of data sets, whose size is not known
            return f"{done / self._total:.0%}"
        return f"{done / 1e6:.1f} of {self._total / 1e6:.1f} MB"


def say(message: str) -> None:
    """Prints a line on stderr."""
    print(message, file=sys.stderr, flush=True)
