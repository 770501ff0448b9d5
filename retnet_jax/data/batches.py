"""Batches of windows, addressed by (seed, step).

`windows.py` determines the windows and their order; this module reads them. `BatchStream` returns
numpy arrays, `PlacedBatches` arrays on the devices of a mesh.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from retnet_jax.data.token_store import Split
from retnet_jax.data.windows import ContiguousSchedule, Span, packed_starts
from retnet_jax.errors import ConfigError
from retnet_jax.own_objects import own_object

if TYPE_CHECKING:
    import jax  # only for types: the processes that build a store need no jax

_MOST_STEPS = 2**40
_TRIED_DOCUMENTS = 1000  # at least one of which must have a loss weight above 0


class Batch(NamedTuple):
    """Windows of tokens, one in each row, as numpy or jax arrays, or their shapes.

    Attributes:
      tokens: int32 [b t].
      targets: int32 [b t], the next token of the stream; BOS after a document.
      segment_ids: int32 [b t], the number of the document in its window, from 1 on; 0 on padding.
        None: each window is one document (no `BatchStream` returns it).
      weights: float32 [b t], weights of the targets in the loss: 1 or `LossWeights`, 0 on padding.
      continues: bool [b], whether a row continues the document that its previous window ended in.
    """

    tokens: Any
    targets: Any
    segment_ids: Any
    weights: Any
    continues: Any


class BatchStream:
    """An endless sequence of batches, in which `stream[step]` depends only on (seed, step).

    Every window occurs once in each epoch of its store, in a new order each time. A batch can have
    windows of two epochs. So only the step has to be saved and restored, for any number of hosts.

    Args:
      splits: Documents of one store, or of several with the same tokenizer.
      weights: Share of each split in the windows.
      sequence_length: Tokens in a window.
      batch_size: Windows in a batch, over all hosts.
      bos_id: BOS id of the tokenizer.
      seed: Seed of the order of the windows, 0 to 2^32 - 1.
      policy: "packed" or "contiguous", see `windows.py`.
      loss_weights: As `config.data.loss_weights`.
      rows: Rows of each batch to read, such as those of this process's devices; None: all.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        weights: Sequence[float] | np.ndarray,
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
        self._spans: Any = spans  # a grain.MapDataset of `Span`
        self._batch_size = batch_size
        self._rows = range(batch_size) if rows is None else rows
        self._batches = grain.MapDataset.range(_MOST_STEPS).map(
            lambda step: self._read(self._spans_of(int(step), self._rows))
        )
        # grain's default, 16 threads and 500 batches ahead, could fill the memory.
        self._options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)

    def __getitem__(self, step: int) -> Batch:
        """Reads the batch of one step, or this process's rows of it."""
        return self._read(self._spans_of(step, self._rows))

    @contextlib.contextmanager
    def iterate(
        self, start: int = 0, skip: Collection[int] = ()
    ) -> Iterator[Iterator[tuple[int, Batch]]]:
        """The numbers and batches from `start` on, without the batches in `skip`.

            with stream.iterate(start) as batches:
                for number, batch in batches: ...

        Background threads read ahead. They end with the `with`, also after an exception; an
        iterator that is still alive when Python exits could print a traceback.
        """
        iterator = iter(self._batches.to_iter_dataset(self._options))
        with contextlib.closing(iterator):
            iterator.set_state({"next_index": start})
            numbered = zip(itertools.count(start), iterator)
            yield ((number, batch) for number, batch in numbered if number not in skip)

    def document_names(self, step: int) -> list[str]:
        """The names of the documents in the whole batch of one step, to inspect a bad batch."""
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
        # BOS is a valid id for padding, and the right target at a document's end.
        batch = Batch(
            tokens=np.full(shape, self._bos_id, np.int32),
            targets=np.full(shape, self._bos_id, np.int32),
            segment_ids=np.zeros(shape, np.int32),
            weights=np.zeros(shape, np.float32),
            continues=np.array([span.continues for span in spans]),
        )
        for row, span in enumerate(spans):
            split, count = self._splits[span.store], span.stop - span.start
            # One token more than the window: the target of its last token.
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
    """Loss weights of tokens, computed by the user's own function (docs/extend.md).

    The function gets a whole document, so a token has the same weight in every window.

    Args:
      name: The function, "module:function", as `config.data.loss_weights`.
    """

    def __init__(self, name: str):
        self._name = name
        self._function: Callable[[np.ndarray], np.ndarray] = own_object("data.loss_weights", name)

    def __call__(self, split: Split, start: int, stop: int) -> np.ndarray:
        """Weights of the targets at the positions [start, stop) of the stream, float32."""
        first, last = split.document_at(start), split.document_at(stop - 1)
        weights = np.concatenate([self._of_document(split, i) for i in range(first, last + 1)])
        # The first document begins at or before `start`, at most its length earlier.
        earliest = max(0, start + 1 - len(split.document(first)))
        begin = start - int(split.borders(earliest, start + 1)[-1])
        return weights[begin : begin + stop - start]

    def check(self, split: Split) -> None:
        """Raises `ConfigError` if every token has weight 0, which would train nothing."""
        tried = range(min(len(split), _TRIED_DOCUMENTS))
        if not any(self._of_document(split, i).any() for i in tried):
            raise ConfigError(
                f"data.loss_weights={self._name!r} is 0 for every token of the first {len(tried)} "
                f"documents, such as {split.name(0)!r}: nothing would be trained"
            )

    def _of_document(self, split: Split, index: int) -> np.ndarray:
        tokens = split.document(index)
        weights = np.asarray(self._function(tokens), np.float32)
        if weights.shape != tokens.shape or not (np.isfinite(weights) & (weights >= 0)).all():
            raise ConfigError(
                f"data.loss_weights={self._name!r}: for the {len(tokens)} tokens of "
                f"{split.name(index)!r} it returned {weights.dtype}{list(weights.shape)}, "
                f"{weights}; it must return a finite number of at least 0 for each token"
            )
        return weights


class PlacedBatches:
    """The batches of a `BatchStream`, on the devices of a mesh.

    Each process reads only the rows of its own devices. The arrays are global: rows are divided
    over the mesh axes `data` and `fsdp`, positions over `seq`. Background threads read ahead; the
    thread that takes a batch places it on the devices.

    Args:
      mesh: The devices of all processes.
      splits, weights, batch_size: As in `BatchStream`.
      options: The other arguments of `BatchStream`, except `rows`.
    """

    def __init__(
        self,
        mesh: jax.sharding.Mesh,
        splits: Sequence[Split],
        weights: Sequence[float] | np.ndarray,
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
        """Reads the batch of one step."""
        return self._place(self._stream[step])

    @contextlib.contextmanager
    def iterate(
        self, start: int = 0, skip: Collection[int] = ()
    ) -> Iterator[Iterator[tuple[int, Batch]]]:
        """The numbers and batches from `start` on, as `BatchStream.iterate`."""
        with self._stream.iterate(start, skip) as batches:
            yield ((number, self._place(batch)) for number, batch in batches)

    def document_names(self, step: int) -> list[str]:
        """The names of the documents in the whole batch of one step, over all processes."""
        return self._stream.document_names(step)

    def _place(self, batch: Batch) -> Batch:
        from retnet_jax.parallel.sharding import place_batch

        return place_batch(self._mesh, batch, self._rows, self._batch_size)


def _packed(store: int, split: Split, length: int, seed: int):
    """An endless sequence of the windows of one store, shuffled again in each epoch."""
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
    """Number of windows in an epoch of the packed policy."""
    return len(packed_starts(split, sequence_length)) - 1
