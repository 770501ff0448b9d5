"""How the token stream of a split is cut into windows, and in which order they are served.

Two policies. "packed": every window begins at a document's border where it can, ends at the last
border it reaches, and windows come in random order; what a longer document has left goes on in the
next window, from which no token is lost. "contiguous": each row of the batch reads on where its
window before ended, so that a recurrent state can be carried from step to step.
"""

from __future__ import annotations

import bisect
import functools
import heapq
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from retnet_jax.data.token_store import Split

_RUN_WINDOWS = 64  # of a contiguous run, about; runs begin and end at borders
_SCAN_TOKENS = 1 << 26  # of which borders are held at once


class Span(NamedTuple):
    """A window's part of a stream, and whether its row goes on with the document before."""

    store: int
    start: int
    stop: int
    continues: bool


@functools.lru_cache(maxsize=16)
def packed_starts(split: Split, length: int) -> np.ndarray:
    """Where each window of the packed policy begins, and the end of the stream: int64 [n + 1].

    About a second for a billion tokens in windows of 2048.
    """
    starts, position, end = [0], 0, split.token_count
    while position < end:
        scan_end = min(position + _SCAN_TOKENS, end)
        borders = split.borders(position + 1, scan_end + 1).tolist()
        if scan_end == end:
            borders.append(end)
        low = 0
        while position < scan_end:
            limit = position + length
            if limit > scan_end and scan_end < end:
                break
            low = bisect.bisect_right(borders, limit, low)
            last = borders[low - 1] if low else position
            position = last if last > position else min(limit, end)
            starts.append(position)
    return np.array(starts, np.int64)


@functools.lru_cache(maxsize=16)
def run_starts(split: Split, length: int) -> np.ndarray:
    """Where each run of the contiguous policy begins, and the end of the stream: int64 [n + 1].

    A run is as many whole documents as fill `_RUN_WINDOWS` windows, so a document is in one run.
    """
    size, end = _RUN_WINDOWS * length, split.token_count
    starts, position = [0], 0
    while position < end:
        following = split.borders(min(position + size, end), min(position + 2 * size, end))
        step = size
        while not len(following) and position + step < end:  # a document longer than a run
            step *= 2
            following = split.borders(min(position + size, end), min(position + 2 * step, end))
        position = int(following[0]) if len(following) else end
        starts.append(position)
    return np.array(starts, np.int64)


@dataclass
class _Lane:
    """What one row of the batch reads: runs, and the step at which each begins."""

    first_steps: list[int]
    runs: list[tuple[int, int, int]]  # store, start and stop in its stream


class ContiguousSchedule:
    """Which part of which stream each row of the batch reads at each step.

    Runs of all stores are dealt to the rows: the store that is furthest behind its share gives the
    next run, in a new random order each epoch, and the row that is done first gets it. A run that
    is longer than others, of a long document, counts for its store bit by bit as it is read, or the
    share would fall behind meanwhile. So the schedule is a function of its arguments alone; it is
    computed as far as it is asked for.

    Args:
      splits: the streams.
      weights: share of each in the windows; they need not sum to 1.
      length: tokens in a window.
      rows: of the batch, over all hosts.
      seed: of the order of runs.
    """

    def __init__(
        self, splits: Sequence[Split], weights: Sequence[float], length: int, rows: int, seed: int
    ):
        self._splits, self._length, self._seed = splits, length, seed
        self._weights = np.asarray(weights, np.float64) / sum(weights)
        self._starts = [run_starts(split, length) for split in splits]
        self._lanes = [_Lane([], []) for _ in range(rows)]
        self._free_from = [(0, lane) for lane in range(rows)]  # a heap
        self._rest = [0] * rows  # windows of a lane's last run that are not counted yet
        self._given = np.zeros(len(splits))  # windows of each store
        self._next_run = [0] * len(splits)
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()  # batches are read in several threads

    def span(self, step: int, row: int) -> Span:
        """The window of a row at a step."""
        with self._lock:
            while self._free_from[0][0] <= step:
                self._deal()
        lane = self._lanes[row]
        place = bisect.bisect_right(lane.first_steps, step) - 1
        store, start, stop = lane.runs[place]
        begin = start + (step - lane.first_steps[place]) * self._length
        goes_on = begin > start and not len(self._splits[store].borders(begin, begin + 1))
        return Span(store, begin, min(begin + self._length, stop), goes_on)

    def _deal(self) -> None:
        first, row = heapq.heappop(self._free_from)
        lane = self._lanes[row]
        if not self._rest[row]:
            store, start, stop = self._take_run()
            lane.first_steps.append(first)
            lane.runs.append((store, start, stop))
            self._rest[row] = -(-(stop - start) // self._length)
        counted = min(self._rest[row], _RUN_WINDOWS)
        self._rest[row] -= counted
        self._given[lane.runs[-1][0]] += counted
        heapq.heappush(self._free_from, (first + counted, row))

    def _take_run(self) -> tuple[int, int, int]:
        store = int(np.argmax(self._weights * (self._given.sum() + 1) - self._given))
        starts = self._starts[store]
        epoch, place = divmod(self._next_run[store], len(starts) - 1)
        if place == 0:
            source = np.random.Generator(np.random.Philox(key=[self._seed, store * 2**32 + epoch]))
            self._orders[store] = source.permutation(len(starts) - 1)
        run = self._orders[store][place]
        self._next_run[store] += 1
        return store, int(starts[run]), int(starts[run + 1])
