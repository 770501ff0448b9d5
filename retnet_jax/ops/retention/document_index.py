"""Where documents begin and end in a batch row.

`segment_ids [b t]`: 0 is padding, a change of id from one real token to the next is a border.
Padding may stand anywhere, in the middle of a document too, and is as if it were not there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from retnet_jax.shapes import Array, Bool, Int


class Documents(NamedTuple):
    """What retention has to know of each token of a row."""

    real: Bool[Array, "b t"]  # False for padding
    count: Int[Array, "b t"]  # real tokens of the row up to this one, itself included
    index: Int[Array, "b t"]  # 0 for the document the row opens with, 1 for the next, ...

    def before(self) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
        """The count and index of the token before each one; 0 before the first."""
        count, index = (jnp.pad(x[:, :-1], ((0, 0), (1, 0))) for x in (self.count, self.index))
        return count, index

    def chunks(self, size: int) -> "Chunks":
        """The rows in chunks of `size` tokens, the last one filled up with padding."""
        rows, length = self.count.shape
        n = -(-length // size)
        behind = ((0, 0), (0, n * size - length))
        real, count, index = (
            jnp.pad(x, behind, mode=mode).reshape(rows, n, size)
            for x, mode in zip(self, ("constant", "edge", "edge"), strict=True)
        )
        count_after, index_after = count[..., -1:], index[..., -1:]
        count_before, index_before = (
            jnp.pad(x[:, :-1], ((0, 0), (1, 0), (0, 0))) for x in (count_after, index_after)
        )
        return Chunks(real, count, index, count_before, index_before, count_after, index_after)


class Chunks(NamedTuple):
    """Documents in n chunks of l tokens: what decays how far, and what passes between them.

    A power of gamma counts the real tokens between two places, and is 0 if a border lies between
    them. So each of the three below is a number of tokens, and a mask of where it counts.
    """

    real: Bool[Array, "b n l"]
    count: Int[Array, "b n l"]  # as of `Documents`, from the row's first token on
    index: Int[Array, "b n l"]
    count_before: Int[Array, "b n 1"]  # of the token before the chunk; 0 before the first
    index_before: Int[Array, "b n 1"]
    count_after: Int[Array, "b n 1"]  # of the chunk's last token
    index_after: Int[Array, "b n 1"]

    @property
    def from_start(self) -> Int[Array, "b n l"]:
        """Tokens from the state before the chunk to a query."""
        return self.count - self.count_before

    @property
    def reads_start(self) -> Bool[Array, "b n l"]:
        """Whether a query reads the state before the chunk."""
        return self.real & (self.index == self.index_before)

    @property
    def to_end(self) -> Int[Array, "b n l"]:
        """Tokens from a key to the state after the chunk."""
        return self.count_after - self.count

    @property
    def writes_end(self) -> Bool[Array, "b n l"]:
        """Whether a key is in the state after the chunk."""
        return self.real & (self.index == self.index_after)

    @property
    def across(self) -> Int[Array, "b n 1"]:
        """Tokens from the state before the chunk to the one after it."""
        return self.count_after - self.count_before

    @property
    def passes(self) -> Bool[Array, "b n 1"]:
        """Whether the state before the chunk is in the one after it."""
        return self.index_after == self.index_before


def number_documents(segment_ids: Int[Array, "b t"]) -> Documents:
    """Numbers the documents of each row."""
    real = segment_ids != 0
    border = _is_border(segment_ids, real)
    return Documents(
        real=real,
        count=_running(jax.lax.cumsum, real.astype(jnp.int32)),
        index=_running(jax.lax.cumsum, border.astype(jnp.int32)),
    )


def one_document(rows: int, length: int) -> Documents:
    """What `number_documents` finds in rows that are one document each, without padding."""
    count = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.int32), (rows, length))
    return Documents(jnp.ones_like(count, bool), count, jnp.zeros_like(count))


def positions(
    segment_ids: Int[Array, "b t"], start: Int[Array, " b"]
) -> tuple[Int[Array, "b t"], Int[Array, " b"]]:
    """Each token's position in its document, and the position that comes after the row.

    Args:
      segment_ids: documents and padding. Padding gets the position of the next real token.
      start: position of the first token of the document each row opens with.
    """
    real = segment_ids != 0
    before = _running(jax.lax.cumsum, real.astype(jnp.int32)) - real.astype(jnp.int32)
    # Counted from `start` less the real tokens in front of the newest border.
    at_border = jnp.where(_is_border(segment_ids, real), -before, _FIRST_DOCUMENT)
    newest = _running(jax.lax.cummin, at_border)
    position = before + jnp.where(newest == _FIRST_DOCUMENT, start[:, None], newest)
    return position, position[:, -1] + real[:, -1].astype(jnp.int32)


_FIRST_DOCUMENT = jnp.iinfo(jnp.int32).max


def _is_border(segment_ids: Int[Array, "b t"], real: Bool[Array, "b t"]) -> Bool[Array, "b t"]:
    """True for a real token whose id differs from that of the real token before it in the row."""
    places = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    newest_real = _running(jax.lax.cummax, jnp.where(real, places, -1))
    previous = jnp.pad(newest_real[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous_id = jnp.take_along_axis(segment_ids, jnp.maximum(previous, 0), axis=1)
    return real & (previous >= 0) & (previous_id != segment_ids)


_COMBINE = {
    jax.lax.cumsum: (jnp.add, 0),
    jax.lax.cummax: (jnp.maximum, jnp.iinfo(jnp.int32).min),
    jax.lax.cummin: (jnp.minimum, jnp.iinfo(jnp.int32).max),
}
_BLOCK = 512


def _running(operation, x: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """A cumulative operation along a row, in blocks: XLA's own takes O(t^2) on some backends."""
    combine, nothing = _COMBINE[operation]
    rows, length = x.shape
    if length <= _BLOCK:
        return operation(x, axis=1)
    n_blocks = -(-length // _BLOCK)
    padded = jnp.pad(x, ((0, 0), (0, n_blocks * _BLOCK - length)), constant_values=nothing)
    within = operation(padded.reshape(rows, n_blocks, _BLOCK), axis=2)
    before = _running(operation, within[:, :-1, -1])
    before = jnp.pad(before, ((0, 0), (1, 0)), constant_values=nothing)
    return combine(within, before[..., None]).reshape(rows, -1)[:, :length]
