"""Retention on a mesh: `whole_arrays`, `on_each_device` or `sequence_parallel`.

Where positions are split (the mesh axis "seq"), each of n devices runs its part of a row from an
empty state. The devices then exchange their states once, and each adds the contribution of the
parts before its own to its outputs: retention is linear in the state. So a device receives n - 1
states [b h k v] in float32 for each layer, however long the rows are.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from retnet_jax.ops.retention import xla
from retnet_jax.ops.retention.decay import power_of_decay
from retnet_jax.ops.retention.document_index import Documents, number_documents
from retnet_jax.parallel.mesh import axis_size
from retnet_jax.parallel.sharding import activation_spec
from retnet_jax.shapes import (
    Array,
    Float,
    Int,
    Keys,
    LogDecay,
    Queries,
    RetentionMatrix,
    SegmentIds,
    Values,
)

# With more parts than this, states are summed in log2 n messages between devices at growing
# distance, so that no device holds all n of them.
MOST_GATHERED = 8


class SplitDocuments(NamedTuple):
    """Document numbering of whole rows, and the running counts at the end of each device's part."""

    documents: Documents
    end_count: Int[Array, "b n"]  # real tokens of the row up to the end of a part
    end_index: Int[Array, "b n"]  # number of the document that holds the last of them


def split_documents(segment_ids: SegmentIds) -> SplitDocuments:
    """Numbers the documents of each row, for the mesh that is set."""
    found = number_documents(segment_ids)
    size = segment_ids.shape[1] // parts(segment_ids.shape[1])
    return SplitDocuments(found, found.count[:, size - 1 :: size], found.index[:, size - 1 :: size])


def parts(length: int) -> int:
    """The number of devices that share the positions of a row of this length.

    1 where the mesh does not split positions, or not into equal parts.
    """
    n = axis_size("seq")
    return n if length % n == 0 else 1


def whole_arrays(
    local: Callable,
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: LogDecay,
    state: RetentionMatrix | None,
    split: SplitDocuments | None,
) -> tuple[Values, RetentionMatrix]:
    """`local`, a form of retention, for whole arrays; on a mesh XLA splits its operations."""
    return local(q, k, v, log_decay, state, None if split is None else split.documents)


def on_each_device(
    local: Callable,
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: LogDecay,
    state: RetentionMatrix | None,
    split: SplitDocuments | None,
) -> tuple[Values, RetentionMatrix]:
    """`local`, the chunkwise form, on each device for its rows and heads; positions are whole."""
    return _shard_map(partial(whole_arrays, local), q, k, v, log_decay, state, split)


def sequence_parallel(
    local: Callable,
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: LogDecay,
    state: RetentionMatrix | None,
    split: SplitDocuments | None,
) -> tuple[Values, RetentionMatrix]:
    """`local`, the chunkwise form, on each device for its part of rows that "seq" splits."""

    def part(q, k, v, log_decay, initial, split):
        n, length = axis_size("seq"), q.shape[1]
        if initial is None:
            initial = xla.zero_state(q, v)
        cuts = _Cuts.of(split, n, length)
        here = jax.lax.axis_index("seq")
        documents = None if split is None else cuts.counted_from(here, split.documents)
        y, after = local(q, k, v, log_decay, None, documents)
        exchange = _gathered if n <= MOST_GATHERED else _passed_on
        before, final = exchange(initial, after, log_decay, cuts, n)  # [b h k v] each
        before = checkpoint_name(before, "state_before")
        reach = cuts.reach(log_decay, here, split, length)  # [#b h t]
        old = jnp.einsum(
            "bthk,bhkv->bthv", q, before.astype(q.dtype), preferred_element_type=before.dtype
        )
        y = y.astype(old.dtype) + old * reach.swapaxes(1, 2)[..., None]
        return y.astype(v.dtype), final

    return _shard_map(part, q, k, v, log_decay, state, split)


def _shard_map(part: Callable, q, k, v, log_decay, state, split: SplitDocuments | None):
    """Calls `part` on every device, with that device's part of the arguments.

    Rows are split over "data" and "fsdp", positions over "seq", heads over "tensor"; every device
    of "seq" has a copy of the state. A dimension that its axes do not divide is not split.
    """
    wide = activation_spec("bthk", q.shape)
    state_spec = activation_spec("bhkv", (q.shape[0], *q.shape[2:], v.shape[3]))
    by_row = PartitionSpec(wide[0])
    by_token = PartitionSpec(*wide[:2])
    return jax.shard_map(
        part,
        in_specs=(
            wide,
            wide,
            activation_spec("bthv", v.shape),
            PartitionSpec(wide[2]),
            None if state is None else state_spec,
            None
            if split is None
            else split._replace(documents=by_token, end_count=by_row, end_index=by_row),
        ),
        out_specs=(activation_spec("bthv", v.shape), state_spec),
        check_vma=False,
    )(q, k, v, log_decay, state, split)


class _Cuts(NamedTuple):
    """The running counts at each of the n + 1 cuts: before the first part, and after each part."""

    count: Int[Array, "#b m"]  # real tokens
    index: Int[Array, "#b m"]  # number of the document

    @staticmethod
    def of(split: SplitDocuments | None, n: int, size: int) -> "_Cuts":
        if split is None:
            count = size * jnp.arange(n + 1, dtype=jnp.int32)[None]
            return _Cuts(count, jnp.zeros_like(count))
        start = ((0, 0), (1, 0))
        return _Cuts(jnp.pad(split.end_count, start), jnp.pad(split.end_index, start))

    def counted_from(self, cut, documents: Documents) -> Documents:
        """The documents of the part after a cut, as if the row began there."""
        real, count, index = documents
        return Documents(real, count - self.count[:, cut, None], index - self.index[:, cut, None])

    def between(self, log_decay, starts, end) -> Float[Array, "#b h m"]:
        """gamma^tokens from each cut of `starts` to the cut `end`; 0 from another document."""
        tokens = self.count[:, end, None] - self.count[:, starts]
        same = self.index[:, end, None] == self.index[:, starts]
        return power_of_decay(log_decay, tokens, same & (starts <= end))

    def reach(
        self, log_decay, cut, split: SplitDocuments | None, size: int
    ) -> Float[Array, "#b h t"]:
        """gamma^tokens from a cut to each token of the part after it; 0 in other documents."""
        if split is None:
            return power_of_decay(log_decay, jnp.arange(1, size + 1)[None])
        real, count, index = self.counted_from(cut, split.documents)
        return power_of_decay(log_decay, count, real & (index == 0))


def _gathered(initial, after, log_decay, cuts: _Cuts, n: int):
    """The state before this device's part, and the state after the row, by gathering all states."""
    states = jnp.concatenate([initial[None], jax.lax.all_gather(after, "seq")])  # [n+1 b h k v]

    def state_at(cut):
        decays = cuts.between(log_decay, jnp.arange(n + 1), cut)
        decays = jnp.broadcast_to(decays, (*states.shape[1:3], n + 1))
        return jnp.einsum("bhj,jbhkv->bhkv", decays, states)

    return state_at(jax.lax.axis_index("seq")), state_at(n)


def _passed_on(initial, after, log_decay, cuts: _Cuts, n: int):
    """The same in log2 n messages: after the i-th a device has summed 2^i parts before its own."""
    here = jax.lax.axis_index("seq")

    def decayed(state, start, end):
        return cuts.between(log_decay, jnp.array([start]), end)[..., None] * state

    before = jax.lax.ppermute(after, "seq", [(i, i + 1) for i in range(n - 1)])
    before = jnp.where(here == 0, initial, before)
    distance = 1
    while distance < n:
        pairs = [(i, i + distance) for i in range(n - distance)]
        earlier = jax.lax.ppermute(before, "seq", pairs)  # 0 where there is none
        before += decayed(earlier, jnp.maximum(here - distance, 0), here)
        distance *= 2
    final = after + decayed(before, n - 1, n)
    return before, jax.lax.psum(jnp.where(here == n - 1, final, 0), "seq")
