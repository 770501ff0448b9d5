"""Where the tokens of a batch stand in their documents and in a cache, and what attention sees."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from retnet_jax.ops.retention import number_documents, positions
from retnet_jax.shapes import Array, Bool, Int, SegmentIds


class Branches(NamedTuple):
    """Rows that hold a tree of tokens each, in depth-first order.

    A token's document is the path to it: the tokens before it of which it is a continuation. All
    continuations of a token follow it directly, so where they end says which tokens see it.
    """

    previous: Int[Array, "b t"]  # index of the token before it; -1: it is before the row
    place: Int[Array, "b t"]  # number of tokens of the row on the path before it
    until: Int[Array, "b t"]  # index after the last continuation; 0 for padding


class Places(NamedTuple):
    """Where the tokens of a batch stand in their documents, and the slots for them in a cache."""

    place: Int[Array, "b t"]  # in its document, which may have begun before the batch
    document: Int[Array, "b t"]  # number of a token's document in its row; 0: the row opens with it
    key_document: Int[Array, "b t"]  # the same, -1 for padding
    before: Int[Array, " b"]  # position of the first token of the batch
    after: Int[Array, " b"]  # position of the token after the batch
    one_document: bool  # each row is one document, without padding
    fresh: bool  # nothing was read before
    until: Int[Array, "b t"] | None = None  # as in `Branches`; None: there are no branches


class Slots(NamedTuple):
    """The slots of a `KVCache` before and after a batch."""

    start: Int[Array, ""]  # slot of the batch's first token
    slot_document: Int[Array, "b s"]  # document of each slot as in `Places`; -1: not visible
    visible_before: Bool[Array, "b s"]
    visible: Bool[Array, "b s"]  # these two as in `KVCache`, after the batch
    length: Int[Array, " b"]
    overflows: Bool[Array, ""]  # the cache has too few slots


def find_places(
    position: Int[Array, " b"],
    shape: tuple[int, int],
    segment_ids: SegmentIds | None,
    fresh: bool,
) -> Places:
    """The places of a batch of tokens [b t] whose rows are at `position`."""
    one_document = segment_ids is None
    if segment_ids is None:
        segment_ids = jnp.ones(shape, jnp.int32)
    place, after = positions(segment_ids, position)
    real, _, index = number_documents(segment_ids)
    return Places(
        place=place,
        document=index,
        key_document=jnp.where(real, index, -1),
        before=position,
        after=after,
        one_document=one_document,
        fresh=fresh,
    )


def places_of_branches(position: Int[Array, " b"], branches: Branches, fresh: bool) -> Places:
    """The places of rows of branches, all of which continue the rows' documents."""
    padding = branches.until == 0
    return Places(
        place=position[:, None] + branches.place,
        document=jnp.zeros_like(branches.place),
        key_document=jnp.where(padding, -1, 0),
        before=position,
        after=position,
        one_document=False,
        fresh=fresh,
        until=branches.until,
    )


def find_slots(visible: Bool[Array, "b s"], length: Int[Array, " b"], places: Places) -> Slots:
    """The slots of a `KVCache` with `visible` and `length`, before and after a batch."""
    start, t = length.max(), places.place.shape[1]
    slot_document = jax.lax.dynamic_update_slice_in_dim(
        jnp.where(visible, jnp.int32(0), -1), places.key_document, start, axis=1
    )
    return Slots(
        start=start,
        slot_document=slot_document,
        visible_before=visible,
        visible=slot_document == places.document[:, -1:],
        length=jnp.full_like(length, start + t),
        overflows=start + t > visible.shape[1],
    )


def unchanged_slots(visible: Bool[Array, "b s"], length: Int[Array, " b"]) -> Slots:
    """The slots of a `KVCache` that is read and not written."""
    return Slots(
        start=length.max(),
        slot_document=jnp.where(visible, jnp.int32(0), -1),
        visible_before=visible,
        visible=visible,
        length=length,
        overflows=jnp.array(False),
    )


def window_slots(places: Places, window: int) -> Int[Array, "b t"]:
    """The slot of each token that the window after the batch holds; `window` for the others."""
    kept = places.key_document == places.document[:, -1:]
    kept &= places.place >= places.after[:, None] - window
    return jnp.where(kept, places.place % window, window)


def seen_tokens(places: Places, window: int | None) -> Bool[Array, "b 1 t t"]:
    """Whether each token of a batch sees another one: its document up to itself, in the window.

    Of branches, it sees those that it continues.
    """
    t = jnp.arange(places.place.shape[1])
    seen = (t[None] <= t[:, None])[None] & (
        places.key_document[:, None, :] == places.document[:, :, None]
    )
    if places.until is not None:
        seen &= t[None, :, None] < places.until[:, None, :]
    if window is not None:
        seen &= places.place[:, :, None] - places.place[:, None, :] < window
    return seen[:, None]


def seen_slots(places: Places, slots: Slots | None, window: int | None) -> Bool[Array, "b 1 t s"]:
    """Whether each token of a batch sees a slot of the cache before it."""
    continues = (places.document == 0)[:, :, None]  # [b t 1]
    if slots is not None:
        return (continues & slots.visible_before[:, None, :])[:, None]
    assert window is not None
    last = places.before[:, None] - 1  # [b 1]
    held = last - (last - jnp.arange(window)[None]) % window  # position in each slot [b w]
    seen = (held >= 0)[:, None] & (places.place[:, :, None] - held[:, None, :] < window)
    return (continues & seen)[:, None]
