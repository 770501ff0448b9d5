"""Retention on each device of a mesh, of its own rows, heads and positions."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec

from retnet_jax.ops.retention.document_index import Documents, documents
from retnet_jax.parallel.sharding import axis_size, layout
from retnet_jax.shapes import Array, Float, Int


class SplitRows(NamedTuple):
    """Documents of whole rows, and where those parts of the rows end that devices have."""

    documents: Documents
    end_count: Int[Array, "b n"]  # real tokens of the row up to the end of a part
    end_index: Int[Array, "b n"]  # number of the document that holds the last of them


def split_rows(segment_ids: Int[Array, "b t"]) -> SplitRows:
    """Numbers the documents of each row, for the mesh that is set."""
    found = documents(segment_ids)
    size = segment_ids.shape[1] // parts(segment_ids.shape[1])
    return SplitRows(found, found.count[:, size - 1 :: size], found.index[:, size - 1 :: size])


def parts(length: int) -> int:
    """Into how many parts rows are split: those of the mesh, or 1 where the length has no such."""
    n = axis_size("seq")
    return n if length % n == 0 else 1


def on_each_device(
    body: Callable,
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    log_decay: Float[Array, " h"],
    state: Float[Array, "b h k v"] | None,
    rows: SplitRows | None,
) -> tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """`body` of the same arguments, on the part of them that a device of the mesh has.

    Rows lie on "data" and "fsdp", positions on "seq", heads on "tensor"; a state is whole on all
    devices of "seq". What a size does not divide is not split.
    """
    wide = layout("bthk", q.shape)
    state_layout = layout("bhkv", (q.shape[0], *q.shape[2:], v.shape[3]))
    by_row = PartitionSpec(wide[0])
    each = Documents(*[PartitionSpec(*wide[:2])] * 3)
    return jax.shard_map(
        body,
        in_specs=(
            wide,
            wide,
            layout("bthv", v.shape),
            PartitionSpec(wide[2]),
            None if state is None else state_layout,
            None if rows is None else SplitRows(each, by_row, by_row),
        ),
        out_specs=(layout("bthv", v.shape), state_layout),
        check_vma=False,
    )(q, k, v, log_decay, state, rows)
