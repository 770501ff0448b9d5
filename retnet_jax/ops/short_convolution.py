"""Short convolution: each channel's sum over its last few inputs, with SiLU.

For the inputs u_0, u_1, ... of a document, with w weights for each channel c, and u_n = 0 for n < 0
(flash-linear-attention's `use_short_conv`, for queries, keys and values):

    y_n[c] = silu(sum_{j<w} weight[c, j] u_{n-w+1+j}[c])

The state is the last w - 1 inputs. On a mesh that splits positions (axis "seq"), each of n devices
receives n states [b w-1 c] for each call, however long the rows are.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from retnet_jax.ops.retention.document_index import Documents
from retnet_jax.ops.retention.on_mesh import SplitDocuments, parts, split_documents
from retnet_jax.parallel.mesh import axis_size, many_devices
from retnet_jax.parallel.sharding import activation_spec
from retnet_jax.shapes import Array, Bool, Float, Int, SegmentIds

LastInputs = Float[Array, "b last c"]  # of the last w - 1 tokens, oldest first


def short_convolution(
    u: Float[Array, "b t c"],
    weight: Float[Array, "c w"],
    state: LastInputs | None = None,
    segment_ids: SegmentIds | SplitDocuments | None = None,
) -> tuple[Float[Array, "b t c"], LastInputs]:
    """The causal convolution of each channel with SiLU, and its state after the last token.

    Args:
      u: Inputs [b t c], of any floating dtype. Sums are in float32 (float64 for float64 inputs).
      weight: Weights [c w]; the last one multiplies the current token.
      state: Inputs [b w-1 c] of the w - 1 tokens before the first one, oldest first, 0 where there
        were fewer; None: 0. It belongs to the document that each row opens with. Its values are
        converted to u's dtype.
      segment_ids: Documents and padding, as in `retention`: 0 is padding, which no token sees and
        which does not change the state; its output is 0. A new document sees no token before it.

    Returns:
      y in u's dtype, and the state after each row's last real token, in the dtype of the given
      state, or in u's.

    Raises:
      ValueError: for arguments whose shapes or dtypes do not fit, naming them.

    The gradient is for reverse mode (`jax.grad`, `jax.vjp`). It keeps only the arguments.
    """
    _check(u, weight, state, segment_ids)
    split = segment_ids
    if split is not None and not isinstance(split, SplitDocuments):
        split = split_documents(split)
    if parts(u.shape[1]) > 1:
        y, after = _shard_map(_sequence_parallel, u, weight, state, split)
    elif split is not None and many_devices() and u.shape[1] > 1:
        # Each device decides whether its rows have padding inside documents.
        y, after = _shard_map(_whole_rows, u, weight, state, split)
    else:
        y, after = _whole_rows(u, weight, state, split)
    return y, after.astype(u.dtype if state is None else state.dtype)


def _whole_rows(u, weight, state, split: SplitDocuments | None):
    documents = None if split is None else split.documents
    return _convolve(u, weight, state, documents), _state_after(u, weight, state, documents)


def _sequence_parallel(u, weight, state, split: SplitDocuments | None):
    """The convolution of a device's part of rows that "seq" splits."""
    n, (rows, size, _) = axis_size("seq"), u.shape
    if split is None:
        count = jnp.broadcast_to(size * jnp.arange(n + 1, dtype=jnp.int32), (rows, n + 1))
        index = jnp.zeros_like(count)
    else:
        count, index = (jnp.pad(x, ((0, 0), (1, 0))) for x in (split.end_count, split.end_index))
    here, documents = jax.lax.axis_index("seq"), None
    if split is not None:  # numbered as if the row began with this part
        real, counted, numbered = split.documents
        documents = Documents(real, counted - count[:, here, None], numbered - index[:, here, None])
    own = _state_after(u, weight, None, documents)
    first = jnp.zeros_like(own) if state is None else state.astype(own.dtype)
    states = jnp.concatenate([first[None], jax.lax.all_gather(own, "seq")])  # [n+1 b w-1 c]
    before = checkpoint_name(_state_at(here, states, count, index), "state_before")
    return _convolve(u, weight, before, documents), _state_at(n, states, count, index)


def _state_at(
    cut: int | Int[Array, ""],
    states: Float[Array, "m b last c"],
    count: Int[Array, "b m"],
    index: Int[Array, "b m"],
) -> LastInputs:
    """The state at one of the cuts of a row: before its first part, or after a part.

    Args:
      cut: Number of the cut.
      states: Initial state of the row, and the states after each part as if it began the row.
      count: Real tokens of the row up to each cut.
      index: Number of the document that is open at each cut.
    """
    m, rows, size, channels = states.shape
    number = count[:, cut, None] - jnp.arange(size)[::-1]  # [b w-1], among the row's real tokens
    # The tokens of the initial state have the numbers 0, -1, ... and are at cut 0.
    holder = (count[:, None] < number[..., None]).sum(-1)  # [b w-1], the first cut after the token
    column = size - 1 - (_take(count, holder) - number)
    flat = states.swapaxes(0, 1).reshape(rows, m * size, channels)
    inputs = _take(flat, holder * size + column)
    same = _take(index, holder) == index[:, cut, None]
    return jnp.where(same[..., None], inputs, 0)


def _state_after(u, weight, state, documents: Documents | None) -> LastInputs:
    """The state after rows, in u's dtype."""
    size, length = weight.shape[1] - 1, u.shape[1]
    if state is None:
        state = jnp.zeros((u.shape[0], size, u.shape[2]), u.dtype)
    state = state.astype(u.dtype)
    if documents is None or length == 1:
        newest = jnp.concatenate([state, u[:, max(length - size, 0) :]], axis=1)
        newest = newest[:, newest.shape[1] - size :]
        return newest if documents is None else jnp.where(documents.real[..., None], newest, state)
    end_count, end_index = documents.count[:, -1:], documents.index[:, -1:]
    number = end_count - jnp.arange(size)[::-1]  # [b w-1], among the row's real tokens
    # A token of this row is at the first position with its count; 0, -1, ... are in the old state.
    place = (documents.count[:, None] < number[..., None]).sum(-1)
    same = _take(documents.index, place) == end_index
    new = jnp.where(same[..., None], _take(u, place), 0)
    old = _take(state, jnp.clip(number + size - 1, 0, size - 1))
    old = jnp.where(end_index[..., None] == 0, old, 0)
    return jnp.where(number[..., None] > 0, new, old)


@jax.custom_vjp
def _convolve(u, weight, state, documents: Documents | None) -> Float[Array, "b t c"]:
    """The outputs of rows. Its gradient computes the sums again, and so keeps no float32 arrays."""
    return _by_padding(_shifted, _compacted, u, weight, state, documents)


def _convolve_forward(*inputs):
    return _convolve(*inputs), inputs


def _convolve_backward(inputs, d_y):
    def gradient(form, u, weight, state, documents, d_y):
        return jax.vjp(partial(form, documents=documents), u, weight, state)[1](d_y)

    forms = (partial(gradient, form) for form in (_shifted, _compacted))
    return *_by_padding(*forms, *inputs, d_y), None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _by_padding(shifted: Callable, compacted: Callable, u, weight, state, documents, *others):
    """The result of `compacted` if there is padding inside a document, else of `shifted`."""
    operands = (u, weight, state, documents, *others)
    if documents is None or u.shape[1] == 1:
        return shifted(*operands)
    return jax.lax.cond(_interrupted(documents, state is not None), compacted, shifted, *operands)


def _interrupted(documents: Documents, has_state: bool) -> Bool[Array, ""]:
    """Whether padding separates a real token from those of its document, or from the state."""
    real_before = jnp.pad(documents.real[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    count_before, index_before = documents.before()
    after_padding = documents.real & ~real_before & (documents.index == index_before)
    return jnp.any(after_padding if has_state else after_padding & (count_before > 0))


def _shifted(u, weight, state, documents: Documents | None) -> Float[Array, "b t c"]:
    """The outputs of rows whose documents are not interrupted by padding: w shifted products."""
    (_, length, _), width = u.shape, weight.shape[1]
    wide = np.promote_types(np.float32, u.dtype)
    start = ((0, 0), (width - 1, 0))
    if state is None:
        inputs = jnp.pad(u, (*start, (0, 0)))
    else:
        inputs = jnp.concatenate([state.astype(u.dtype), u], axis=1)
    inputs, weight = inputs.astype(wide), weight.astype(wide)  # [b w-1+t c]
    if documents is not None:
        real = jnp.pad(documents.real, start, constant_values=True)
        index = jnp.pad(documents.index, start)
    total = jnp.zeros((), wide)
    for j in range(width):
        seen = slice(j, j + length)
        term = inputs[:, seen]
        if documents is not None:
            same = real[:, seen] & (index[:, seen] == documents.index)
            term = jnp.where(same[..., None], term, 0)
        total = total + term * weight[None, None, :, j]
    y = jax.nn.silu(total)
    if documents is not None:
        y = jnp.where(documents.real[..., None], y, 0)
    return y.astype(u.dtype)


def _compacted(u, weight, state, documents: Documents) -> Float[Array, "b t c"]:
    """The outputs of any rows: the real tokens are moved together, and their outputs back."""
    order = jnp.argsort(~documents.real, axis=1, stable=True)  # real tokens before padding
    together = Documents(*(_take(x, order) for x in documents))
    y = _shifted(_take(u, order), weight, state, together)
    y = _take(y, jnp.maximum(documents.count - 1, 0))
    return jnp.where(documents.real[..., None], y, 0)


def _take(x: Array, places: Int[Array, "b n"]) -> Array:
    """x[row, places[row]] for each row of x [b t] or [b t c]."""
    places = places.reshape(*places.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, places, axis=1, mode="clip")


def _shard_map(part: Callable, u, weight, state, split: SplitDocuments | None):
    """Calls `part` on every device, with that device's part of the arguments.

    Rows are split over "data" and "fsdp", positions over "seq", and channels, which are those of
    heads one after another, over "tensor"; every device of "seq" has a copy of the state. A
    dimension that its axes do not divide is not split.
    """
    rows, positions, channels = activation_spec("bth", u.shape)
    wide = PartitionSpec(rows, positions, channels)
    of_state = PartitionSpec(rows, None, channels)
    numbering = None
    if split is not None:
        by_row = PartitionSpec(rows)
        by_token = PartitionSpec(rows, positions)
        numbering = split._replace(documents=by_token, end_count=by_row, end_index=by_row)
    return jax.shard_map(
        part,
        in_specs=(
            wide,
            PartitionSpec(channels),
            None if state is None else of_state,
            numbering,
        ),
        out_specs=(wide, of_state),
        check_vma=False,
    )(u, weight, state, split)


def _check(u, weight, state, segment_ids) -> None:
    if u.ndim != 3 or weight.ndim != 2:
        raise ValueError(
            f"u {u.shape} and weight {weight.shape} must have the dimensions [b t c], [c w]"
        )
    (b, t, c), w = u.shape, weight.shape[1]
    if t == 0 or w == 0:
        raise ValueError(
            f"u {u.shape} and weight {weight.shape} must have at least one token and one weight"
        )
    if isinstance(segment_ids, SplitDocuments):
        segment_ids = segment_ids.documents.index
    expected = {
        "weight": (weight, (c, w)),
        "state": (state, (b, w - 1, c)),
        "segment_ids": (segment_ids, (b, t)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} {array.shape} does not fit u {u.shape} and weight {weight.shape}; "
                f"its shape must be {shape}"
            )
    for name, array in (("u", u), ("weight", weight), ("state", state)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} is {array.dtype}; it must be a floating-point array")
