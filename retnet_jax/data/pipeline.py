"""Batches of windows, addressed by (seed, step).

`windows.py` says which windows there are and in which order they come; here they are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from retnet_jax.config import ConfigError
from retnet_jax.data.token_store import Split
from retnet_jax.data.windows import ContiguousSchedule, Span, packed_starts

_MOST_STEPS = 2**40


class Batch(NamedTuple):
    """Windows on top of each other."""

    tokens: np.ndarray  # int32 [b t]
    targets: np.ndarray  # int32 [b t]: the next token of the stream; after a document BOS
    segment_ids: np.ndarray  # int32 [b t]: 1, 2, ... count a window's documents; 0 is padding
    weights: np.ndarray  # float32 [b t]: 1, and 0 on padding
    continues: np.ndarray  # bool [b]: the row goes on with the document its last window ended in


class BatchStream:
    """An endless sequence of batches, in which `stream[step]` depends on (seed, step) alone.

    Every window comes once in an epoch of its store, in a new order each time; a batch can reach
    from one epoch into the next. So the step is all there is to save and restore, on any number of
    hosts.

    Args:
      splits: the documents, of one store or several with one tokenizer.
      weights: share of each in the windows.
      sequence_length: tokens in a window.
      batch_size: windows in a batch, over all hosts.
      bos_id: the tokenizer's.
      seed: of the order of the windows, 0 to 2^32 - 1.
      policy: "packed" or "contiguous", see `windows.py`.
      host_index: this process; row j of its batch is row j * host_count + host_index of all.
      host_count: processes among which each batch is split.

    Raises:
      ConfigError: if the batch does not split evenly among the hosts.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        weights: Sequence[float],
        *,
        sequence_length: int,
        batch_size: int,
        bos_id: int,
        seed: int,
        policy: str = "packed",
        host_index: int = 0,
        host_count: int = 1,
    ):
        if batch_size % host_count:
            raise ConfigError(
                f"train.batch_size={batch_size} is not divisible by the number of hosts, "
                f"{host_count}"
            )
        import grain

        self._splits = splits
        self._sequence_length = sequence_length
        self._bos_id = bos_id
        if policy == "packed":
            spans = grain.MapDataset.mix(
                [_packed(i, s, sequence_length, seed) for i, s in enumerate(splits)], list(weights)
            )
        else:
            schedule = ContiguousSchedule(splits, weights, sequence_length, batch_size, seed)
            spans = grain.MapDataset.range(_MOST_STEPS).map(
                lambda index: schedule.span(*divmod(int(index), batch_size))
            )
        self._spans = spans[host_index::host_count].batch(batch_size // host_count, batch_fn=tuple)
        self._batches = self._spans.map(self._read)
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
        names = set()
        for store, start, stop, _ in self._spans[step]:
            split = self._splits[store]
            documents = range(split.document_at(start), split.document_at(stop - 1) + 1)
            names.update(split.name(document) for document in documents)
        return sorted(names)

    def _read(self, spans: Sequence[Span]) -> Batch:
        shape = (len(spans), self._sequence_length)
        # Filled with BOS, a valid id for the padding and the right target at a document's end.
        batch = Batch(
            tokens=np.full(shape, self._bos_id, np.int32),
            targets=np.full(shape, self._bos_id, np.int32),
            segment_ids=np.zeros(shape, np.int32),
            weights=np.zeros(shape, np.float32),
            continues=np.array([span.continues for span in spans]),
        )
        for row, span in enumerate(spans):
            split, count = self._splits[span.store], span.stop - span.start
            # One more than the window: the target of its last token.
            tokens = split.read(span.start, span.stop + 1)
            batch.tokens[row, :count] = tokens[:count]
            batch.targets[row, : len(tokens) - 1] = tokens[1:]
            borders = split.borders(span.start + 1, span.stop) - span.start
            segments = batch.segment_ids[row, :count]
            segments[0] = 1
            segments[borders] = 1
            np.cumsum(segments, out=segments)
            batch.weights[row, :count] = 1
        return batch


def _packed(store: int, split: Split, length: int, seed: int):
    """The windows of one store, shuffled anew each epoch, without end."""
    import grain

    starts = packed_starts(split, length)
    return (
        grain.MapDataset.range(len(starts) - 1)
        .seed(seed + store)
        .shuffle()
        .repeat()
        .map(lambda i: Span(store, int(starts[i]), int(starts[i + 1]), False))
    )


def number_of_windows(split: Split, sequence_length: int) -> int:
    """Windows of the packed policy in an epoch."""
    return len(packed_starts(split, sequence_length)) - 1
