"""Windows of the token stream, and batches of windows addressed by (seed, step).

The stream of a split is its documents end to end, each opened by BOS. Window i of length t covers
the positions [i t, (i + 1) t) of the stream; the last one is padded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from retnet_jax.config import ConfigError
from retnet_jax.data.token_store import Split


class Batch(NamedTuple):
    """Windows on top of each other, or (from `window`) a single one, without the axis b."""

    tokens: np.ndarray  # int32 [b t]
    targets: np.ndarray  # int32 [b t]: the next token of the stream; after a document BOS
    segment_ids: np.ndarray  # int32 [b t]: 1, 2, ... count a window's documents; 0 is padding
    weights: np.ndarray  # float32 [b t]: 1, and 0 on padding


def number_of_windows(split: Split, sequence_length: int) -> int:
    """Windows of `sequence_length` tokens that cover a split."""
    return -(-len(split.tokens) // sequence_length)


def window(split: Split, index: int, sequence_length: int, bos_id: int) -> Batch:
    """Window `index` of the split's stream: four arrays [t].

    Raises:
      IndexError: if the split has no such window.
    """
    start, stop = _span(split, index, sequence_length)
    # Filled with BOS, a valid id for the padding and the right target at the end of the stream.
    tokens = np.full(sequence_length, bos_id, np.int32)
    targets = np.full(sequence_length, bos_id, np.int32)
    segment_ids = np.zeros(sequence_length, np.int32)
    weights = np.zeros(sequence_length, np.float32)
    tokens[: stop - start] = split.tokens[start:stop]
    following = split.tokens[start + 1 : stop + 1]
    targets[: len(following)] = following
    documents = _documents(split, start, stop)
    borders = split.offsets[documents.start + 1 : documents.stop]
    segment_ids[: stop - start] = 1 + np.searchsorted(borders, np.arange(start, stop), "right")
    weights[: stop - start] = 1
    return Batch(tokens, targets, segment_ids, weights)


class BatchStream:
    """An endless sequence of batches, in which `stream[step]` depends on (seed, step) alone.

    Every window comes once in an epoch, in a new order each time; a batch can reach from one epoch
    into the next. So the step is all there is to save and restore, on any number of hosts.

    Args:
      split: the documents.
      sequence_length: tokens in a window.
      batch_size: windows in a batch, over all hosts.
      bos_id: the tokenizer's.
      seed: of the order of the windows, 0 to 2^32 - 1.
      host_index: this process; row j of its batch is row j * host_count + host_index of all.
      host_count: processes among which each batch is split.

    Raises:
      ConfigError: if the batch does not split evenly among the hosts.
    """

    def __init__(
        self,
        split: Split,
        *,
        sequence_length: int,
        batch_size: int,
        bos_id: int,
        seed: int,
        host_index: int = 0,
        host_count: int = 1,
    ):
        if batch_size % host_count:
            raise ConfigError(
                f"train.batch_size={batch_size} is not divisible by the number of hosts, "
                f"{host_count}"
            )
        import grain

        self._split = split
        self._sequence_length = sequence_length
        self._bos_id = bos_id
        windows = grain.MapDataset.range(number_of_windows(split, sequence_length))
        windows = windows.seed(seed).shuffle().repeat()
        self._indices = windows[host_index::host_count].batch(batch_size // host_count)
        self._batches = self._indices.map(self._read)
        # grain's default, 16 threads and 500 batches ahead, could fill the memory.
        self._options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)

    def __getitem__(self, step: int) -> Batch:
        """The batch of one step, read now."""
        return self._batches[step]

    @contextlib.contextmanager
    def iterate(self, start_step: int = 0) -> Iterator[Iterator[Batch]]:
        """The batches from `start_step` on, read ahead in background threads.

            with stream.iterate(start_step) as batches:
                for step, batch in enumerate(batches, start_step): ...

        A context manager, because an iterator still alive when Python exits can leave a traceback
        behind: leaving the `with`, also by an exception, ends the threads.
        """
        iterator = iter(self._batches.to_iter_dataset(self._options))
        with contextlib.closing(iterator):
            iterator.set_state({"next_index": start_step})
            yield iterator

    def document_names(self, step: int) -> list[str]:
        """The names of the documents in the batch of one step, to look a bad batch up."""
        documents = set()
        for index in self._indices[step]:
            start, stop = _span(self._split, int(index), self._sequence_length)
            documents.update(_documents(self._split, start, stop))
        return [self._split.names[document] for document in sorted(documents)]

    def _read(self, indices: np.ndarray) -> Batch:
        windows = [
            window(self._split, int(index), self._sequence_length, self._bos_id)
            for index in indices
        ]
        return Batch(*map(np.stack, zip(*windows, strict=True)))


def _span(split: Split, index: int, sequence_length: int) -> tuple[int, int]:
    """The positions [start, stop) of the stream that a window covers."""
    if not 0 <= index < number_of_windows(split, sequence_length):
        raise IndexError(
            f"window {index} of {number_of_windows(split, sequence_length)} "
            f"(sequence_length={sequence_length})"
        )
    start = index * sequence_length
    return start, min(start + sequence_length, len(split.tokens))


def _documents(split: Split, start: int, stop: int) -> range:
    """The documents that have a token at the positions [start, stop) of the stream."""
    first = int(np.searchsorted(split.offsets, start, "right")) - 1
    return range(first, int(np.searchsorted(split.offsets, stop, "left")))
