"""How the token stream of a split is cut into windows, and the order of the windows.

Two policies. "packed": windows are in random order. Each is cut at the last border between
documents that it reaches; a document that is longer than a window continues in the next one. No
token is lost. "contiguous": each row of the batch continues where its previous window ended, so a
recurrent state can be carried from step to step.
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

_RUN_WINDOWS = 64  # approximate length of a contiguous run, which begins and ends at borders
_SCAN_TOKENS = 1 << 26  # number of tokens whose borders are in memory at once


class Span(NamedTuple):
    """The part of a stream in a window, and whether its row continues its previous document."""

    store: int
    start: int
    stop: int
    continues: bool


@functools.lru_cache(maxsize=16)
def packed_starts(split: Split, length: int) -> np.ndarray:
    """The start of each packed window, and the end of the stream: int64 [n + 1].

    Takes about a second for a billion tokens in windows of 2048.
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
    """The start of each contiguous run, and the end of the stream: int64 [n + 1].

    A run is a sequence of whole documents that fills `_RUN_WINDOWS` windows.
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
    """The runs that one row of the batch reads, and the step at which each begins."""

    first_steps: list[int]
    runs: list[tuple[int, int, int]]  # store, start and stop in its stream


class ContiguousSchedule:
    """Which part of which stream each row of the batch reads at each step.

    The runs of all stores are dealt to the rows. The next run is from the store that is furthest
    behind its share, in a new random order in each epoch, and goes to the row that finishes first.
    A run of a long document is counted for its store in parts, as it is read; counted at once, it
    would keep the store's next runs away for too long. The schedule depends only on these
    arguments, and is computed as far as it is needed.

    Args:
      splits: The streams.
      weights: Share of each split in the windows; they need not sum to 1.
      length: Tokens in a window.
      rows: Rows of the batch, over all hosts.
      seed: Seed of the order of the runs.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        weights: Sequence[float] | np.ndarray,
        length: int,
        rows: int,
        seed: int,
    ):
        self._splits, self._length, self._seed = splits, length, seed
        self._weights = np.asarray(weights, np.float64) / sum(weights)
        self._starts = [run_starts(split, length) for split in splits]
        self._lanes = [_Lane([], []) for _ in range(rows)]
        self._free_from = [(0, lane) for lane in range(rows)]  # a heap
        self._rest = [0] * rows  # windows of each lane's last run that are not counted yet
        self._given = np.zeros(len(splits))  # windows counted for each store
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
        continues = begin > start and not len(self._splits[store].borders(begin, begin + 1))
        return Span(store, begin, min(begin + self._length, stop), continues)

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
