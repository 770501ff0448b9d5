"""Batches of windows, addressed by (seed, step).

`windows.py` says which windows there are and in which order they come; here they are read.
`BatchStream` gives them as numpy arrays, `PlacedBatches` on the devices of a mesh.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from retnet_jax.config import own_object
from retnet_jax.data.token_store import Split
from retnet_jax.data.windows import ContiguousSchedule, Span, packed_starts
from retnet_jax.errors import ConfigError

if TYPE_CHECKING:
    import jax  # not otherwise: the processes that build a store need none

_MOST_STEPS = 2**40
_TRIED_DOCUMENTS = 1000  # for one of which any token counts


class Batch(NamedTuple):
    """Windows on top of each other, as arrays of numpy or of jax."""

    tokens: np.ndarray  # int32 [b t]
    targets: np.ndarray  # int32 [b t]: the next token of the stream; after a document BOS
    segment_ids: np.ndarray | None  # int32 [b t]: 1, 2, ... count a window's documents; 0 is
    # padding; None, which no stream has: a window is one document
    weights: np.ndarray  # float32 [b t]: of the targets; 1 or as `LossWeights`, 0 on padding
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
      loss_weights: as `config.data.loss_weights`.
      rows: of each batch that are read, such as those of this process's devices; None: all.
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
        loss_weights: str = "",
        rows: Sequence[int] | None = None,
    ):
        import grain

        self._splits = splits
        self._sequence_length = sequence_length
        self._bos_id = bos_id
        self._loss_weights = None
        if loss_weights:
            self._loss_weights = LossWeights(loss_weights)
            for split in splits:
                self._loss_weights.check(split)
        if policy == "packed":
            spans = grain.MapDataset.mix(
                [_packed(i, s, sequence_length, seed) for i, s in enumerate(splits)], list(weights)
            )
        else:
            schedule = ContiguousSchedule(splits, weights, sequence_length, batch_size, seed)
            spans = grain.MapDataset.range(_MOST_STEPS).map(
                lambda index: schedule.span(*divmod(int(index), batch_size))
            )
        self._spans, self._batch_size = spans, batch_size
        self._rows = range(batch_size) if rows is None else rows
        self._batches = grain.MapDataset.range(_MOST_STEPS).map(
            lambda step: self._read(self._spans_of(int(step), self._rows))
        )
        # grain's default, 16 threads and 500 batches ahead, could fill the memory.
        self._options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)

    def __getitem__(self, step: int) -> Batch:
        """The batch of one step, or this process's rows of it, read now."""
        return self._batches[step]

    @contextlib.contextmanager
    def iterate(
        self, start: int = 0, skip: Collection[int] = ()
    ) -> Iterator[Iterator[tuple[int, Batch]]]:
        """The batches from `start` on with their numbers, without those of `skip`.

            with stream.iterate(start) as batches:
                for number, batch in batches: ...

        They are read ahead in background threads.

        A context manager, because an iterator still alive when Python exits can leave a traceback
        behind: leaving the `with`, also by an exception, ends the threads.
        """
        iterator = iter(self._batches.to_iter_dataset(self._options))
        with contextlib.closing(iterator):
            iterator.set_state({"next_index": start})
            numbered = zip(itertools.count(start), iterator)
            yield ((number, batch) for number, batch in numbered if number not in skip)

    def document_names(self, step: int) -> list[str]:
        """The names of the documents in the whole batch of one step, to look a bad batch up."""
        names = set()
        for store, start, stop, _ in self._spans_of(step, range(self._batch_size)):
            split = self._splits[store]
            documents = range(split.document_at(start), split.document_at(stop - 1) + 1)
            names.update(split.name(document) for document in documents)
        return sorted(names)

    def _spans_of(self, step: int, rows: Sequence[int]) -> list[Span]:
        return [self._spans[step * self._batch_size + row] for row in rows]

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
            if self._loss_weights is not None:
                batch.weights[row, :count] = self._loss_weights(split, span.start, span.stop)
        return batch


class LossWeights:
    """The weights that a function of the user's own gives the tokens of a split (docs/extend.md).

    The function gets a whole document, so that a token has the same weight in every window.

    Args:
      name: "module:function", `config.data.loss_weights`.
    """

    def __init__(self, name: str):
        self._name = name
        self._function: Callable[[np.ndarray], np.ndarray] = own_object("data.loss_weights", name)

    def __call__(self, split: Split, start: int, stop: int) -> np.ndarray:
        """Those of the tokens that follow the positions [start, stop) of the stream, float32."""
        first, last = split.document_at(start), split.document_at(stop - 1)
        weights = np.concatenate([self._of_document(split, i) for i in range(first, last + 1)])
        # The first document has at most all its other tokens in front of `start`.
        earliest = max(0, start + 1 - len(split.document(first)))
        begin = start - int(split.borders(earliest, start + 1)[-1])
        return weights[begin : begin + stop - start]

    def check(self, split: Split) -> None:
        """Raises `ConfigError` if no token counts, which would train nothing."""
        tried = range(min(len(split), _TRIED_DOCUMENTS))
        if not any(self._of_document(split, i).any() for i in tried):
            raise ConfigError(
                f"data.loss_weights={self._name!r} is 0 for all tokens of the first {len(tried)} "
                f"documents, such as {split.name(0)!r}: nothing would be trained"
            )

    def _of_document(self, split: Split, index: int) -> np.ndarray:
        tokens = split.document(index)
        weights = np.asarray(self._function(tokens), np.float32)
        if weights.shape != tokens.shape or not (np.isfinite(weights) & (weights >= 0)).all():
            raise ConfigError(
                f"data.loss_weights={self._name!r}: for the {len(tokens)} tokens of "
                f"{split.name(index)!r} it gave {weights.dtype}{list(weights.shape)}, {weights}; a "
                "finite number for each is needed, none less than 0"
            )
        return weights


class PlacedBatches:
    """The batches of a `BatchStream`, on the devices of a mesh.

    Each process reads only the rows that its own devices hold; the arrays are those of the whole
    batch: rows are divided over the mesh axes `data` and `fsdp`, positions over `seq`. Background
    threads read ahead; a batch is placed on the devices in the thread that takes it.

    Args:
      mesh: the devices of all processes.
      splits, weights, batch_size: as of `BatchStream`.
      options: the other arguments of `BatchStream` except `rows`.
    """

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        splits: Sequence[Split],
        weights: Sequence[float],
        *,
        batch_size: int,
        **options: Any,
    ):
        from retnet_jax.parallel.sharding import local_rows

        self._mesh, self._batch_size = mesh, batch_size
        self._rows = local_rows(mesh, batch_size)
        self._stream = BatchStream(
            splits, weights, batch_size=batch_size, rows=self._rows, **options
        )

    def __getitem__(self, step: int) -> Batch:
        """The batch of one step, read now."""
        return self._place(self._stream[step])

    @contextlib.contextmanager
    def iterate(
        self, start: int = 0, skip: Collection[int] = ()
    ) -> Iterator[Iterator[tuple[int, Batch]]]:
        """As `BatchStream.iterate`."""
        with self._stream.iterate(start, skip) as batches:
            yield ((number, self._place(batch)) for number, batch in batches)

    def document_names(self, step: int) -> list[str]:
        """The names of the documents in the whole batch of one step, of all processes."""
        return self._stream.document_names(step)

    def _place(self, batch: Batch) -> Batch:
        from retnet_jax.parallel.sharding import place_batch

        return place_batch(self._mesh, batch, self._rows, self._batch_size)


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
