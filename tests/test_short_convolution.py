"""The short convolution against a loop over tokens, in parts, and on several devices."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sequence_parallel import MESHES, collectives, mesh_of
from tolerances import assert_close

from retnet_jax.ops.retention import split_documents
from retnet_jax.ops.short_convolution import convolution_of_branches, short_convolution

B, T, C, W = 2, 9, 6, 4
PADDING = np.array(
    [
        [0, 1, 1, 0, 1, 0, 0, 1, 0],  # inside a document, and on both sides
        [3, 0, 3, 5, 5, 0, 0, 3, 3],  # inside, between documents; the id 3 twice
    ]
)


def arrays(t=T, w=W, c=C, dtype=jnp.float32, seed=0):
    """u, weight, state, and cotangents of y and of the new state."""
    rng = np.random.default_rng(seed)
    shapes = ((B, t, c), (c, w), (B, w - 1, c), (B, t, c), (B, w - 1, c))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def definition(u, weight, state, segments, d_y, d_after):
    """Outputs, new state, and the gradients of u, weight and state, token by token in float64."""
    u, weight, state, d_y, d_after = (
        np.asarray(x, np.float64) for x in (u, weight, state, d_y, d_after)
    )
    size = weight.shape[1] - 1
    y, after = np.zeros_like(u), np.zeros_like(state)
    d_weight = np.zeros_like(weight)
    inputs = np.concatenate([state, u], axis=1)
    d_inputs = np.zeros_like(inputs)
    for row in range(len(u)):
        document, seen = None, list(range(size))  # places of inputs; None: 0
        for n, segment in enumerate(segments[row]):
            if segment == 0:
                continue
            if document not in (None, segment):
                seen = [None] * size
            document = segment
            seen = [*seen, size + n]
            total = np.zeros(u.shape[2])
            for j, place in enumerate(seen):
                if place is not None:
                    total += weight[:, j] * inputs[row, place]
            gate = 1 / (1 + np.exp(-total))
            y[row, n] = total * gate
            d_total = d_y[row, n] * gate * (1 + total * (1 - gate))
            for j, place in enumerate(seen):
                if place is not None:
                    d_weight[:, j] += d_total * inputs[row, place]
                    d_inputs[row, place] += d_total * weight[:, j]
            seen = seen[1:]
        for j, place in enumerate(seen):
            if place is not None:
                after[row, j] = inputs[row, place]
                d_inputs[row, place] += d_after[row, j]
    return (y, after), (d_inputs[:, size:], d_weight, d_inputs[:, :size])


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_branches_are_convolved_along_their_paths(with_state, dtype):
    #   0 - 1 - 2      two trees: 2, 3 and 4 - 5 - 6 continue 1; 7 - 8 is a tree of its own
    previous = np.array([-1, 0, 1, 1, 1, 4, 5, -1, 7])
    paths = ([0, 1, 2], [0, 1, 3], [0, 1, 4, 5, 6], [7, 8])
    u, weight, state, *_ = arrays(dtype=dtype)
    before = state if with_state else None

    @jax.jit
    def branches_and_paths(u, weight, before):
        of_row = jnp.broadcast_to(previous, (B, len(previous)))
        of_paths = [short_convolution(u[:, np.array(path)], weight, before)[0] for path in paths]
        return convolution_of_branches(u, weight, of_row, before), of_paths

    found, of_paths = jax.device_get(branches_and_paths(u, weight, before))
    assert found.dtype == dtype
    for path, expected in zip(paths, of_paths, strict=True):
        assert_close(found[:, path], expected, np.dtype(dtype).name)


def results(u, weight, state, segments, d_y, d_after):
    """The same of `short_convolution`; a state of None has the gradient None."""
    forward = functools.partial(short_convolution, segment_ids=segments)
    found, pull_back = jax.vjp(forward, u, weight, state)
    return found, pull_back((d_y, d_after))


compiled = jax.jit(results)


def check(found, given_arrays, segments, with_state=True):
    u, weight, state, d_y, d_after = given_arrays
    expected = definition(u, weight, state if with_state else 0 * state, segments, d_y, d_after)
    if not with_state:
        expected = (expected[0], (*expected[1][:2], None))
    assert_close(jax.device_get(found), expected)


def with_nan_for_padding(u, segments):
    return jnp.where(jnp.asarray(segments)[..., None] == 0, jnp.nan, u)


def segment_ids(t):
    row = st.lists(st.sampled_from([0, 0, 1, 1, 1, 2]), min_size=t, max_size=t)
    return st.lists(row, min_size=B, max_size=B).map(np.array)


@pytest.mark.parametrize(
    ("t", "w", "with_state"),
    [(T, W, True), (T, W, False), (2, W, True), (1, W, True), (5, 1, True)],
)
def test_outputs_states_and_gradients_follow_the_definition(t, w, with_state):
    """Whatever stands in padding, even NaN, has no effect."""
    u, weight, state, *cotangents = arrays(t, w)

    @settings(max_examples=40)
    @given(segment_ids(t))
    def holds(segments):
        found = compiled(
            with_nan_for_padding(u, segments),
            weight,
            state if with_state else None,
            jnp.asarray(segments),
            *cotangents,
        )
        check(
            found,
            (jnp.where(segments[..., None] == 0, 0, u), weight, state, *cotangents),
            segments,
            with_state,
        )

    holds()


@pytest.mark.parametrize(("t", "w"), [(T, W), (2, W), (1, W), (3, 1)])
def test_no_segment_ids_is_one_document_a_row(t, w):
    u, weight, state, *cotangents = arrays(t, w)
    for given_state in (state, None):
        found = compiled(u, weight, given_state, None, *cotangents)
        ones = np.ones((B, t), int)
        check(found, (u, weight, state, *cotangents), ones, given_state is not None)


@pytest.mark.parametrize("border", [None, 0, 2])
def test_split_anywhere_and_continue_with_single_tokens(border):
    """Without segment ids, and with padding and a border in the first part."""
    u, weight, state, *_ = arrays()
    ids = None
    if border is not None:
        ids = np.where(PADDING == 0, 0, np.where(np.arange(T) < border, 1, 2))

    def call(state, start, stop):
        part = None if ids is None else jnp.asarray(ids[:, start:stop])
        return forward(u[:, start:stop], weight, state, part)

    forward = jax.jit(short_convolution)
    expected = jax.device_get(call(state, 0, T))
    for cut in range((border or 0) + 1, T):
        y, after = call(state, 0, cut)
        outputs = [y]
        for n in range(cut, T):
            y, after = call(after, n, n + 1)
            outputs.append(y)
        assert_close((np.concatenate(outputs, 1), after), expected)


def test_a_single_token_and_rows_without_segment_ids_need_no_gather():
    def text(t, segments):
        u, weight, state, *_ = arrays(t)
        return jax.jit(short_convolution).lower(u, weight, state, segments).as_text()

    assert "gather" not in text(1, None)
    assert "gather" not in text(1, jax.jit(split_documents)(jnp.ones((B, 1), int)))
    assert "gather" not in text(T, None)
    assert "gather" in text(T, jnp.ones((B, T), int))


def test_bfloat16_is_rounded_once_and_float64_not_at_all():
    u, weight, state, d_y, d_after = arrays(dtype=jnp.bfloat16)
    ids = jnp.asarray(PADDING)
    found = compiled(u, weight, state, ids, d_y, 0 * d_after)
    inputs = [np.asarray(x, np.float64) for x in (u, weight, state, d_y, 0 * d_after)]
    exact = definition(*inputs[:3], PADDING, *inputs[3:])
    for actual, expected in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert actual.dtype == jnp.bfloat16
        error = np.abs(np.asarray(actual, np.float64) - expected)
        assert (error <= 2.0**-8 * np.abs(expected) + 1e-6).all()
    with jax.enable_x64(True):
        found = compiled(*inputs[:3], PADDING, *inputs[3:])
        assert_close(jax.device_get(found), exact, "float64")


def test_the_state_keeps_the_dtype_it_is_given_in():
    u, weight, state, *_ = arrays(dtype=jnp.bfloat16)
    y, after = short_convolution(u, weight, state.astype(jnp.float32))
    assert (y.dtype, after.dtype) == (jnp.bfloat16, jnp.float32)
    assert (after == u[:, 1 - W :]).all()


def test_a_gradient_keeps_only_the_arguments():
    u, weight, state, *_ = arrays(t=64)
    ids = jax.jit(split_documents)(jnp.ones((B, 64), int))

    def pull_back(u, weight, state):
        return jax.vjp(lambda *x: short_convolution(*x, ids)[0], u, weight, state)[1]

    kept = jax.tree.leaves(jax.eval_shape(pull_back, u, weight, state))
    sizes = sorted(x.size for x in kept if jnp.issubdtype(x.dtype, jnp.floating))
    assert sizes == sorted(x.size for x in (u, weight, state))


LONG = 16  # tokens, 2 on each of 8 devices: fewer than the state holds


@pytest.mark.parametrize("with_state", [True, False])
def test_rows_on_eight_devices_are_whole_rows(with_state):
    u, weight, state, *cotangents = arrays(LONG)
    with jax.set_mesh(mesh_of(seq=8)):

        @settings(max_examples=40)
        @given(segment_ids(LONG), st.integers(0, LONG), st.integers(0, 10))
        def holds(segments, start, length):
            segments[:, start : start + length] = 0  # parts without a real token
            found = on_devices(
                with_nan_for_padding(u, segments),
                weight,
                state if with_state else None,
                jnp.asarray(segments),
                *cotangents,
            )
            known = jnp.where(segments[..., None] == 0, 0, u)
            check(found, (known, weight, state, *cotangents), segments, with_state)

        on_devices = jax.jit(lambda *x: results(*x))
        holds()
        found = on_devices(u, weight, state if with_state else None, None, *cotangents)
        ones = np.ones((B, LONG), int)
        check(found, (u, weight, state, *cotangents), ones, with_state)


@pytest.mark.parametrize("mesh", [*MESHES[1:], {"data": 2, "tensor": 4}], ids=str)
def test_other_meshes(mesh):
    """Rows and channels are split too, where they can be."""
    given_arrays = arrays(LONG, c=8)
    segments = np.sort(np.random.default_rng(1).integers(1, 4, (B, LONG)), axis=1)
    segments[0, 3:9] = 0
    for row in (segments, np.where(segments == 0, 1, segments)):
        with jax.set_mesh(mesh_of(**mesh)):
            u, weight, state, *cotangents = given_arrays
            found = jax.jit(lambda *x: results(*x))(u, weight, state, jnp.asarray(row), *cotangents)
        check(found, given_arrays, row)


@pytest.mark.parametrize("length", [64, 512])
def test_bytes_between_devices_do_not_grow_with_the_row(length):
    """A device receives the states of n parts in the forward pass, and n gradients of its own."""
    n = 8
    u, weight, *_ = arrays(length)
    mesh = mesh_of(seq=n)
    rows = jnp.ones((B, length), jnp.int32)

    def loss(u, weight, rows):
        return (short_convolution(u, weight, None, rows)[0] ** 2).sum()

    with jax.set_mesh(mesh):
        rows = jax.jit(split_documents)(rows)
        u = jax.device_put(u, jax.NamedSharding(mesh, jax.P(None, "seq")))
        forward = jax.jit(lambda *x: short_convolution(*x[:2], None, x[2])[0])
        one_way = collectives(forward.lower(u, weight, rows).compile().as_text())
        both = jax.jit(jax.grad(loss)).lower(u, weight, rows).compile().as_text()
    state = B * (W - 1) * C
    assert one_way == [("all-gather", n * state, 4)]
    assert sorted(collectives(both)) == [("all-gather", n * state, 4), ("reduce-scatter", state, 4)]


def test_devices_that_share_no_row_send_nothing():
    mesh = mesh_of(data=2, tensor=4)
    u, weight, state, *_ = arrays(c=8)
    with jax.set_mesh(mesh):
        placed = jax.device_put(PADDING, jax.NamedSharding(mesh, jax.P("data")))
        rows = jax.jit(split_documents)(placed)
        u = jax.device_put(u, jax.NamedSharding(mesh, jax.P("data", None, "tensor")))
        program = jax.jit(short_convolution).lower(u, weight, state, rows).compile()
    assert collectives(program.as_text()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": jnp.zeros((2, 9))}, r"u \(2, 9\) and weight .* the dimensions \[b t c\]"),
        ({"u": jnp.zeros((2, 0, 6))}, "must have at least one token"),
        ({"weight": jnp.zeros((5, 4))}, r"weight \(5, 4\) does not fit .*; its shape .* \(6, 4\)"),
        ({"state": jnp.zeros((2, 4, 6))}, r"state \(2, 4, 6\) .* its shape must be \(2, 3, 6\)"),
        ({"segment_ids": jnp.ones((2, 8), int)}, r"segment_ids \(2, 8\) does not fit"),
        ({"u": jnp.ones((2, 9, 6), int)}, "u is int32; it must be a floating-point array"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    u, weight, *_ = arrays()
    unchecked = inspect.unwrap(short_convolution)  # without the tests' check of annotations
    with pytest.raises(ValueError, match=message):
        unchecked(**({"u": u, "weight": weight} | changes))
