"""Where documents begin and end in a batch row.

`segment_ids [b t]`: 0 is padding; a change of id from one real token to the next is a border
between documents. Padding may stand anywhere, also inside a document, and has no effect.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from retnet_jax.shapes import Array, Bool, Int, SegmentIds


class Documents(NamedTuple):
    """Document numbering of the tokens of each row."""

    real: Bool[Array, "b t"]  # False for padding
    count: Int[Array, "b t"]  # real tokens of the row up to this one, itself included
    index: Int[Array, "b t"]  # 0 for the document the row opens with, 1 for the next, ...

    def before(self) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
        """The count and index of the token before each one; 0 before the first."""
        count, index = (jnp.pad(x[:, :-1], ((0, 0), (1, 0))) for x in (self.count, self.index))
        return count, index

    def chunks(self, size: int) -> "Chunks":
        """The rows in chunks of `size` tokens; padding fills the last chunk."""
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
    """Document numbering in n chunks of l tokens, and the exponents of gamma that follow from it.

    Between two tokens of one document the exponent is the number of real tokens from one to the
    other; across a border the power is 0. So the properties come in pairs: an exponent, and a mask
    that says where the power is not 0.
    """

    real: Bool[Array, "b n l"]
    count: Int[Array, "b n l"]  # as in `Documents`: counted from the row's first token
    index: Int[Array, "b n l"]
    count_before: Int[Array, "b n 1"]  # count at the token before the chunk; 0 for the first chunk
    index_before: Int[Array, "b n 1"]
    count_after: Int[Array, "b n 1"]  # count at the chunk's last token
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


def number_documents(segment_ids: SegmentIds) -> Documents:
    """Numbers the documents of each row."""
    real = segment_ids != 0
    border = _is_border(segment_ids, real)
    return Documents(
        real=real,
        count=_running(jax.lax.cumsum, real.astype(jnp.int32)),
        index=_running(jax.lax.cumsum, border.astype(jnp.int32)),
    )


def one_document(rows: int, length: int) -> Documents:
    """The numbering of rows that are one document each, without padding."""
    count = jnp.broadcast_to(jnp.arange(1, length + 1, dtype=jnp.int32), (rows, length))
    return Documents(jnp.ones_like(count, bool), count, jnp.zeros_like(count))


def positions(
    segment_ids: SegmentIds, start: Int[Array, " b"]
) -> tuple[Int[Array, "b t"], Int[Array, " b"]]:
    """Each token's position in its document, and the position of the token that follows the row.

    Args:
      segment_ids: Documents and padding. Padding gets the position of the next real token.
      start: Position of the first token of the document that each row opens with.
    """
    real = segment_ids != 0
    before = _running(jax.lax.cumsum, real.astype(jnp.int32)) - real.astype(jnp.int32)
    # The position is `before` less its value at the newest border, or plus `start` before any.
    at_border = jnp.where(_is_border(segment_ids, real), -before, _FIRST_DOCUMENT)
    newest = _running(jax.lax.cummin, at_border)
    position = before + jnp.where(newest == _FIRST_DOCUMENT, start[:, None], newest)
    return position, position[:, -1] + real[:, -1].astype(jnp.int32)


_FIRST_DOCUMENT = jnp.iinfo(jnp.int32).max


def _is_border(segment_ids: SegmentIds, real: Bool[Array, "b t"]) -> Bool[Array, "b t"]:
    """True for a real token whose id differs from that of the real token before it in the row."""
    places = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    newest_real = _running(jax.lax.cummax, jnp.where(real, places, -1))
    previous = jnp.pad(newest_real[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous_id = jnp.take_along_axis(segment_ids, jnp.maximum(previous, 0), axis=1)
    return real & (previous >= 0) & (previous_id != segment_ids)


# How each operation combines two results, and its neutral element.
_COMBINE = {
    jax.lax.cumsum: (jnp.add, 0),
    jax.lax.cummax: (jnp.maximum, jnp.iinfo(jnp.int32).min),
    jax.lax.cummin: (jnp.minimum, jnp.iinfo(jnp.int32).max),
}
_PIECE = 512  # tokens


def _running(operation, x: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """A cumulative operation along a row, in n pieces: XLA's own takes O(t^2) on some backends."""
    combine, neutral = _COMBINE[operation]
    rows, length = x.shape
    if length <= _PIECE:
        return operation(x, axis=1)
    n = -(-length // _PIECE)
    padded = jnp.pad(x, ((0, 0), (0, n * _PIECE - length)), constant_values=neutral)
    within = operation(padded.reshape(rows, n, _PIECE), axis=2)  # [b n piece]
    before = _running(operation, within[:, :-1, -1])  # [b n-1]
    before = jnp.pad(before, ((0, 0), (1, 0)), constant_values=neutral)
    return combine(within, before[..., None]).reshape(rows, -1)[:, :length]
