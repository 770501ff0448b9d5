"""Short convolution: each channel's sum over its last few inputs, with SiLU.

For the inputs u_0, u_1, ... of a document, with w weights for each channel c, and u_n = 0 for n < 0
(flash-linear-attention's `use_short_conv`, for queries, keys and values):

    y_n[c] = silu(sum_{j<w} weight[c, j] u_{n-w+1+j}[c])

The state is the last w - 1 inputs. On a mesh that splits positions (axis "seq"), each of n devices
receives n states [b w-1 c] for each call, however long the rows are.
"""

from collections.abc import Callable
from typing import Any

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
    state_dtype = u.dtype if state is None else state.dtype
    if state is not None:
        state = state.astype(u.dtype)
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
    return y, after.astype(state_dtype)


def convolution_of_branches(
    u: Float[Array, "b t c"],
    weight: Float[Array, "c w"],
    previous: Int[Array, "b t"],
    state: LastInputs | None = None,
) -> Float[Array, "b t c"]:
    """As `short_convolution`, where several tokens may continue the same one.

    Args:
      u: As in `short_convolution`.
      weight: As in `short_convolution`.
      previous: Index in the row of the token before each token; -1: it is the state's last.
      state: As in `short_convolution`.
    """
    size, wide = weight.shape[1] - 1, np.promote_types(np.float32, u.dtype)
    if state is None:
        state = jnp.zeros((u.shape[0], size, u.shape[2]), u.dtype)
    inputs = jnp.concatenate([state.astype(u.dtype), u], axis=1)
    # The index in `inputs` of each input, and of the one before each input.
    index = jnp.broadcast_to(jnp.arange(size, size + u.shape[1]), previous.shape)
    first = jnp.broadcast_to(jnp.arange(-1, size - 1), (u.shape[0], size))
    before = jnp.concatenate([first, size + previous], axis=1)
    windows = []
    for _ in range(size + 1):
        windows.append(_take(inputs, index).astype(wide))
        index = _take(before, index)
    return jax.nn.silu(_total(windows[::-1], weight)).astype(u.dtype)


def _whole_rows(u, weight, state, split: SplitDocuments | None):
    documents = None if split is None else split.documents
    return _convolve(u, weight, state, documents), _state_after(u, weight, state, documents)


def _sequence_parallel(u, weight, state, split: SplitDocuments | None):
    """The convolution of a device's part of rows that "seq" splits."""
    n, here, (rows, size, _) = axis_size("seq"), jax.lax.axis_index("seq"), u.shape
    if split is None:
        documents = None
        count = jnp.broadcast_to(size * jnp.arange(n + 1, dtype=jnp.int32), (rows, n + 1))
        index = jnp.zeros_like(count)
    else:
        count, index = (jnp.pad(x, ((0, 0), (1, 0))) for x in (split.end_count, split.end_index))
        real, counted, numbered = split.documents
        # Numbered as if the row began with this part.
        documents = Documents(real, counted - count[:, here, None], numbered - index[:, here, None])
    own = _state_after(u, weight, None, documents)
    first = jnp.zeros_like(own) if state is None else state
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
    number = count[:, cut, None] - jnp.arange(size)[None, ::-1]  # [b w-1], among its real tokens
    # The tokens of the initial state have the numbers 0, -1, ... and are at cut 0.
    holder = (count[:, None] < number[..., None]).sum(-1)  # [b w-1], the first cut after the token
    column = size - 1 - (_take(count, holder) - number)
    flat = states.swapaxes(0, 1).reshape(rows, m * size, channels)
    inputs = _take(flat, holder * size + column)
    same = _take(index, holder) == index[:, cut, None]
    return jnp.where(same[..., None], inputs, 0)


def _state_after(u, weight, state, documents: Documents | None) -> LastInputs:
    """The state after rows."""
    size, length = weight.shape[1] - 1, u.shape[1]
    if state is None:
        state = jnp.zeros((u.shape[0], size, u.shape[2]), u.dtype)
    if documents is None or length == 1:
        newest = jnp.concatenate([state, u[:, max(length - size, 0) :]], axis=1)
        newest = newest[:, newest.shape[1] - size :]
        return newest if documents is None else jnp.where(documents.real[..., None], newest, state)
    end_count, end_index = documents.count[:, -1:], documents.index[:, -1:]
    number = end_count - jnp.arange(size)[None, ::-1]  # [b w-1], among its real tokens
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
    return _by_padding(_shifted, u, weight, state, documents)[0]


def _convolve_forward(*inputs):
    return _convolve(*inputs), inputs


def _convolve_backward(inputs, d_y):
    return *_by_padding(_shifted_gradient, *inputs, d_y), None


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _by_padding(shifted: Callable, u, weight, state, documents: Documents | None, *d_y) -> tuple:
    """The results of `shifted`; the first of them is an array [b t c].

    If padding interrupts a document, `shifted` gets rows in which all real tokens precede padding.
    """
    if documents is None or u.shape[1] == 1:
        return shifted(u, weight, state, documents, *d_y)

    def moved_together(u, weight, state, documents, *d_y):
        order = jnp.argsort(~documents.real, axis=1, stable=True)  # real tokens before padding
        u, *d_y = (_take(x, order) for x in (u, *d_y))
        together = Documents(*(_take(x, order) for x in documents))
        by_token, *others = shifted(u, weight, state, together, *d_y)
        by_token = _take(by_token, jnp.maximum(documents.count - 1, 0))
        return jnp.where(documents.real[..., None], by_token, 0), *others

    interrupted = _interrupted(documents, state is not None)
    return jax.lax.cond(interrupted, moved_together, shifted, u, weight, state, documents, *d_y)


def _interrupted(documents: Documents, has_state: bool) -> Bool[Array, ""]:
    """Whether padding precedes a token whose document began before it, in the row or the state."""
    real_before = _moved(documents.real, 1, fill=True)
    count_before, index_before = documents.before()
    after_padding = documents.real & ~real_before & (documents.index == index_before)
    return jnp.any(after_padding if has_state else after_padding & (count_before > 0))


def _shifted(u, weight, state, documents: Documents | None) -> tuple[Float[Array, "b t c"]]:
    """The outputs of rows whose documents are not interrupted by padding."""
    y = jax.nn.silu(_total(_windows(u, weight, state, documents), weight))
    return (y.astype(u.dtype),)


def _shifted_gradient(u, weight, state, documents: Documents | None, d_y):
    """The gradients of u, weight and state.

    Gradients are moved before they are masked and multiplied by weights: XLA for TPU stores what it
    moves, and without this it would store w arrays in float32.
    """
    size = weight.shape[1] - 1
    windows = _windows(u, weight, state, documents)
    total = _total(windows, weight)
    sigmoid = jax.nn.sigmoid(total)
    d_total = d_y.astype(total.dtype) * sigmoid * (1 + total * (1 - sigmoid))
    d_weight = jnp.stack([(d_total * window).sum((0, 1)) for window in windows], axis=1)
    d_u = d_state = jnp.zeros((), total.dtype)
    for j in range(size + 1):
        factor = weight[None, None, :, j].astype(total.dtype)
        to_u, to_state = _moved(d_total, j - size), _moved(d_total[:, :size], j, size)
        if documents is not None:
            seen = _seen(documents, size - j)[..., None]
            to_u = jnp.where(_moved(seen, j - size), to_u, 0)
            to_state = jnp.where(_moved(seen[:, :size], j, size), to_state, 0)
        d_u += to_u * factor
        d_state += to_state * factor
    d_state = None if state is None else d_state.astype(u.dtype)
    return d_u.astype(u.dtype), d_weight.astype(weight.dtype), d_state


def _total(windows: list[Float[Array, "b t c"]], weight) -> Float[Array, "b t c"]:
    weight = weight.astype(windows[0].dtype)
    products = (window * weight[None, None, :, j] for j, window in enumerate(windows))
    return sum(products, jnp.zeros((), weight.dtype))


def _windows(u, weight, state, documents: Documents | None) -> list[Float[Array, "b t c"]]:
    """For each weight, the input that it multiplies for each token; in float32 or float64."""
    size, wide = weight.shape[1] - 1, np.promote_types(np.float32, u.dtype)
    windows = []
    for j in range(size + 1):
        window = _moved(u.astype(wide), size - j)
        if state is not None:
            window += _moved(state.astype(wide), -j, u.shape[1])
        if documents is not None:
            window = jnp.where(_seen(documents, size - j)[..., None], window, 0)
        windows.append(window)
    return windows


def _seen(documents: Documents, distance: int) -> Bool[Array, "b t"]:
    """Whether each token sees the input at this distance before it, in the row or the state.

    Padding sees nothing, so its sums and outputs are 0.
    """
    both_real = documents.real & _moved(documents.real, distance, fill=True)
    return both_real & (_moved(documents.index, distance) == documents.index)


def _moved(x: Array, by: int, length: int | None = None, fill: Any = 0) -> Array:
    """Array x [b t ...] moved `by` tokens towards the end, and cut or filled to `length` tokens."""
    after = (x.shape[1] if length is None else length) - x.shape[1] - by
    none = [(0, 0, 0)] * (x.ndim - 2)
    return jax.lax.pad(x, jnp.asarray(fill, x.dtype), [(0, 0, 0), (by, after, 0), *none])


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
