"""Retention against its definition, and its forms against each other."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close, relative_difference

from retnet_jax.ops.retention import (
    explain_choice,
    log_decay,
    number_documents,
    positions,
    retention,
    row_normalizer,
    xla,
)

FORMS = ("parallel", "chunkwise", "recurrent")
RULES = ("log_spaced", "powers_of_two")
EVERY_RULE = (*RULES, "none")

compiled = jax.jit(retention, static_argnames=("form", "chunk_size"))


def inputs(b=2, t=21, h=3, k=4, v=6, rule="log_spaced", seed=0, dtype=jnp.float32, mean=0.0):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(mean, size=(b, t, h, width)) for width in (k, k, v)]
    arrays[0] *= k**-0.5
    state = jnp.asarray(rng.normal(mean, size=(b, h, k, v)), jnp.float32)
    decay = log_decay(rule, h, (1 / 2, 1 / 512))
    return [jnp.asarray(x, dtype) for x in arrays], decay, state


def definition(q, k, v, decay, state, segment_ids):
    """S_n = gamma S_{n-1} + k_n^T v_n; y_n = q_n S_n, in float64 and plain loops."""
    q, k, v, decay, state = (np.asarray(x, np.float64) for x in (q, k, v, decay, state))
    y, state = np.zeros_like(v), state.copy()
    for row in range(q.shape[0]):
        newest = 0
        for n in range(q.shape[1]):
            segment = segment_ids[row, n]
            if segment == 0:
                continue
            if newest not in (0, segment):
                state[row] = 0
            newest = segment
            outer = k[row, n][:, :, None] * v[row, n][:, None, :]
            state[row] = np.exp(decay)[:, None, None] * state[row] + outer
            y[row, n] = np.einsum("hk,hkv->hv", q[row, n], state[row])
    return y, state


SEGMENTS = {
    "one document": np.ones((2, 21), int),
    "packed": np.repeat([[1, 2, 3], [4, 5, 4]], 7, axis=1),
    "uneven": np.array([[1] * 3 + [2] * 17 + [3], [7] + [8] + [9] * 19]),
    "left padding": np.array([[0] * 5 + [1] * 16, [0] * 20 + [1]]),
    "right padding": np.array([[1] * 5 + [0] * 16, [3] * 4 + [1] * 16 + [0]]),
    "padding inside": np.array([[1, 0, 1] * 7, [1] * 4 + [0] * 9 + [2] * 8]),
    "nothing real": np.array([[0] * 21, [1] * 21]),
}


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_state_follow_the_definition(form, segments):
    (q, k, v), decay, state = inputs()
    expected = definition(q, k, v, decay, state, segments)
    assert_close(
        compiled(q, k, v, decay, state, jnp.asarray(segments), form=form), expected, what=form
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", EVERY_RULE)
def test_no_segment_ids_is_one_document_a_row(form, rule):
    (q, k, v), decay, _ = inputs(rule=rule)
    zero = np.zeros((2, 3, 4, 6))
    expected = definition(q, k, v, decay, zero, SEGMENTS["one document"])
    assert_close(compiled(q, k, v, decay, form=form), expected)


@functools.cache
def gradient_of(form, chunk_size, chunks_of_a_span):
    """Compiled; the last argument is a value in `xla` that tests patch, part of the cache's key."""

    def loss(q, k, v, decay, state, segments, weight_y, weight_state):
        y, final = retention(q, k, v, decay, state, segments, form=form, chunk_size=chunk_size)
        return (y * weight_y).sum() + (final * weight_state).sum(), (y, final)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))


def outputs_and_gradients(form, chunk_size, arrays, decay, state, segments, mean=0.0):
    rng = np.random.default_rng(7)
    b, t, h, _ = arrays[0].shape
    weight_y = jnp.asarray(rng.normal(mean, size=(b, t, h, arrays[2].shape[-1])), jnp.float32)
    weight_state = jnp.asarray(rng.normal(mean, size=state.shape), jnp.float32)
    gradient = gradient_of(form, chunk_size, xla._chunks_per_span())
    gradients, results = gradient(*arrays, decay, state, segments, weight_y, weight_state)
    return results, gradients


# Length, heads, width of values and chunk size: each is compiled once, for many inputs.
SHAPES = [(1, 2, 3, 4), (19, 3, 5, 8), (16, 1, 1, 4), (13, 2, 4, 1), (6, 3, 2, 8)]


@pytest.mark.parametrize(("t", "h", "v", "chunk_size"), SHAPES)
@given(st.data())
@settings(max_examples=8)
def test_forms_agree_in_outputs_states_and_gradients(t, h, v, chunk_size, data):
    rule, seed = data.draw(st.sampled_from(RULES)), data.draw(st.integers(0, 99))
    ids = st.lists(st.sampled_from([0, 1, 1, 1, 2, 3]), min_size=t, max_size=t)
    segments = data.draw(st.none() | st.lists(ids, min_size=2, max_size=2))
    # Mean 1/2, since with mean 0 the gradient of log gamma would be a sum of numbers that cancel.
    arrays, decay, state = inputs(t=t, h=h, v=v, rule=rule, seed=seed, mean=0.5)
    given_all = (arrays, decay, state, None if segments is None else jnp.asarray(segments), 0.5)
    expected = outputs_and_gradients("parallel", None, *given_all)
    assert_close(outputs_and_gradients("chunkwise", chunk_size, *given_all), expected)
    assert_close(outputs_and_gradients("recurrent", None, *given_all), expected)


@pytest.mark.parametrize("seed", range(4))
def test_forms_agree_without_decay(seed):
    """As above for gamma = 1, and with numpy's sums."""
    rng = np.random.default_rng(seed)
    segments = rng.choice([0, 1, 1, 1, 2, 3], size=(2, 19)) if seed else np.ones((2, 19), int)
    arrays, decay, state = inputs(t=19, h=3, v=5, rule="none", seed=seed, mean=0.5)
    given_all = (arrays, decay, state, jnp.asarray(segments), 0.5)
    expected = outputs_and_gradients("parallel", None, *given_all)
    assert_close(expected[0], definition(*arrays, np.zeros(3), state, segments))
    assert_close(outputs_and_gradients("chunkwise", 8, *given_all), expected)
    assert_close(outputs_and_gradients("recurrent", None, *given_all), expected)


def test_recurrent_gradient_equals_differentiating_its_own_steps():
    """The custom gradient rule equals autodiff through one-token calls."""
    arrays, decay, state = inputs(t=6)

    def steps(q, k, v, decay, state):
        total = 0.0
        for n in range(6):
            y, state = retention(*(x[:, n : n + 1] for x in (q, k, v)), decay, state)
            total += (y**2).sum()
        return total + (state**2).sum()

    def whole(q, k, v, decay, state):
        y, state = retention(q, k, v, decay, state, form="recurrent")
        return (y**2).sum() + (state**2).sum()

    gradient = [
        jax.jit(jax.grad(f, argnums=(0, 1, 2, 3, 4)))(*arrays, decay, state) for f in (whole, steps)
    ]
    assert_close(gradient[0], gradient[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", [1, 8, 20])
def test_split_anywhere_and_carry_the_state_equals_whole(form, cut):
    (q, k, v), decay, state = inputs()
    segments = jnp.asarray(SEGMENTS["one document"])
    whole = compiled(q, k, v, decay, state, segments, form=form)
    q, k, v = map(np.asarray, (q, k, v))
    y1, state = compiled(*(x[:, :cut] for x in (q, k, v)), decay, state, form="chunkwise")
    y2, state = compiled(*(x[:, cut:] for x in (q, k, v)), decay, state, form=form)
    assert_close((np.concatenate([y1, y2], 1), state), whole)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_inputs_keep_a_float32_state(form):
    (q, k, v), decay, state = inputs(dtype=jnp.bfloat16)
    segments = SEGMENTS["packed"]
    y, final = compiled(q, k, v, decay, state, jnp.asarray(segments), form=form)
    assert (y.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)
    expected = definition(*(x.astype(jnp.float32) for x in (q, k, v)), decay, state, segments)
    assert_close((y, final), expected, "bfloat16")


@pytest.mark.parametrize("form", FORMS)
def test_no_output_depends_on_later_tokens_or_other_documents(form):
    (q, k, v), decay, state = inputs(b=1, t=12)
    segments = jnp.asarray([[0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0]])

    @jax.jit
    @jax.grad
    def gradient(v, n):
        return retention(q, k, v, decay, state, segments, form=form)[0][0, n].sum()

    for n in (1, 4, 5, 8):
        reached = np.abs(gradient(v, n)[0]).sum((1, 2)) > 0
        first = 1 if n < 5 else 5
        assert reached.tolist() == [first <= m <= n for m in range(12)]


def test_chunkwise_gradient_memory_is_linear_in_length():
    def temporary_bytes(form, t):
        (q, k, v), decay, _ = inputs(b=1, t=t, h=2, k=8, v=8)
        loss = jax.jit(
            jax.grad(
                lambda q, k, v: retention(q, k, v, decay, form=form)[0].sum(), argnums=(0, 1, 2)
            )
        )
        return loss.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    for form in ("chunkwise", "recurrent"):
        assert temporary_bytes(form, 4096) <= 2.2 * temporary_bytes(form, 2048)
    # The states of all positions would take 4096 * 2 * 8 * 8 floats of 4 bytes.
    assert temporary_bytes("recurrent", 4096) < 4096 * 2 * 8 * 8 * 4


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("segments", ["none", "padding inside"])
def test_any_number_of_chunks_at_once_is_the_same_function(monkeypatch, segments, chunks):
    """Rows of more than four spans, with chunks and tokens left over, for any span."""
    monkeypatch.setattr(xla, "_chunks_per_span", lambda: chunks)
    arrays, decay, state = inputs(t=21)
    ids = None if segments == "none" else jnp.asarray(SEGMENTS[segments])
    expected = outputs_and_gradients("parallel", None, arrays, decay, state, ids)
    for size in (1, 2, 4, 5):
        actual = outputs_and_gradients("chunkwise", size, arrays, decay, state, ids)
        assert_close(actual, expected, what=f"chunks of {size}")


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_gradient_keeps_only_inputs_and_states_between_spans(monkeypatch, chunks):
    monkeypatch.setattr(xla, "_chunks_per_span", lambda: chunks)
    (q, k, v), decay, state = inputs(b=1, t=128, h=2, k=8, v=8)

    def kept_numbers(size):
        @jax.jit
        def pull_back(*arrays):
            return jax.vjp(lambda *x: retention(*x, decay, state, chunk_size=size), *arrays)[1]

        return sum(x.size for x in jax.tree.leaves(pull_back(q, k, v)))

    for size in (4, 8):
        spans = 128 // (size * chunks)
        most = q.size + k.size + v.size + (spans + 1) * state.size + decay.size
        assert kept_numbers(size) <= most


def test_bfloat16_gradients_are_those_of_float32_inputs():
    (q, k, v), decay, state = inputs(dtype=jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    segments = jnp.asarray(SEGMENTS["uneven"])
    _, expected = outputs_and_gradients("parallel", None, wide, decay, state, segments)
    _, actual = outputs_and_gradients("chunkwise", 4, [q, k, v], decay, state, segments)
    assert [x.dtype for x in actual[:3]] == [jnp.bfloat16] * 3
    assert_close(actual[:3] + actual[4:], expected[:3] + expected[4:], "bfloat16")


def test_float64_inputs_are_computed_in_float64():
    with jax.enable_x64(True):
        (q, k, v), _, _ = inputs(dtype=jnp.float64)
        decay = jnp.log1p(-(2.0 ** -jnp.arange(1.0, 4.0, dtype=jnp.float64)))
        state = jnp.ones((2, 3, 4, 6), jnp.float64)
        segments = SEGMENTS["uneven"]
        expected = definition(q, k, v, decay, state, segments)
        for size in (1, 4, 21):
            actual = compiled(q, k, v, decay, state, jnp.asarray(segments), chunk_size=size)
            assert_close(actual, expected, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("rule", EVERY_RULE)
def test_131_072_tokens_lose_no_accuracy_against_float64(rule):
    """Outputs, the final state and all gradients except that of log gamma."""
    arrays, decay, state = inputs(b=1, t=131_072, h=8, k=2, v=2, rule=rule)

    def results(*inputs):
        y, pull_back = jax.vjp(lambda q, k, v, s: retention(q, k, v, decay64, s), *inputs)
        return y, pull_back(jax.tree.map(jnp.ones_like, y))

    decay64 = decay
    actual = jax.jit(results)(*arrays, state)
    with jax.enable_x64(True):
        decay64 = jnp.asarray(decay, jnp.float64)
        expected = jax.jit(results)(*(jnp.asarray(x, jnp.float64) for x in (*arrays, state)))
    assert_close(actual, expected)


@pytest.mark.slow
@pytest.mark.compiles(90, reason="eager; under one jit XLA folds the documents of 100,000 tokens")
@pytest.mark.parametrize("rule", EVERY_RULE)
def test_recurrent_and_chunkwise_agree_at_length_100_000(rule):
    (q, k, v), decay, state = inputs(b=1, t=100_000, h=32, k=2, v=2, rule=rule)
    y, final = map(np.asarray, retention(q, k, v, decay, state, form="chunkwise"))
    y_steps, final_steps = map(np.asarray, retention(q, k, v, decay, state, form="recurrent"))
    for head in range(32):
        assert relative_difference(y_steps[:, :, head], y[:, :, head]) <= 1e-4
        assert relative_difference(final_steps[:, head], final[:, head]) <= 1e-4


@pytest.mark.slow
@pytest.mark.compiles(120, reason="eager, as of 100,000 tokens above")
def test_a_long_memory_decays_by_the_exact_gamma():
    """100,000 steps shrink S by gamma^t, even where float32 cannot represent gamma."""
    (q, k, v), decay, state = inputs(b=1, t=100_000, h=32, k=1, v=1, rule="powers_of_two")
    q, v = jnp.ones_like(q), v * 1e-3
    for form in ("chunkwise", "recurrent"):
        with_state = retention(q, k, v, decay, state, form=form)[0]
        without = retention(q, k, v, decay, None, form=form)[0]
        effect = np.asarray(with_state - without, np.float64)[0, -1, :, 0]
        exact = np.exp(np.log1p(-(2.0 ** (-5 - np.arange(32)))) * 100_000)
        assert relative_difference(effect, exact * np.asarray(state)[0, :, 0, 0]) <= 1e-4


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())
def test_positions_count_the_real_tokens_of_a_document(segments):
    start = np.array([5, 100])
    actual, after = positions(jnp.asarray(segments), jnp.asarray(start))
    for row in range(2):
        following, newest = start[row], 0
        for n, segment in enumerate(segments[row]):
            if segment:
                following = 0 if newest not in (0, segment) else following
                newest = segment
                assert actual[row, n] == following
                following += 1
        assert after[row] == following


@pytest.mark.parametrize("length", [511, 512, 513, 1500, 2**18 + 7])
def test_documents_of_long_rows(length):
    """Compared with counting token by token, for rows of several pieces and pieces of pieces."""
    rng = np.random.default_rng(length)
    segments = np.cumsum(rng.random((2, length)) < 0.01, axis=1) % 5
    start = np.array([3, 0])
    _, count, index = map(np.asarray, number_documents(jnp.asarray(segments)))
    place, after = map(np.asarray, positions(jnp.asarray(segments), jnp.asarray(start)))
    assert (count == np.cumsum(segments != 0, axis=1)).all()
    for row in range(2):
        document, position, last = 0, start[row], None
        for token, segment in enumerate(segments[row]):
            if segment and last is not None and segment != last:
                document, position = document + 1, 0
            if segment:
                assert (index[row, token], place[row, token]) == (document, position)
                position, last = position + 1, segment
        assert after[row] == position


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_row_normalizer_is_the_row_sum_of_the_decay_mask(rule):
    decay = log_decay(rule, 32, (1 / 32, 1 / 512))
    places = np.array([[0, 1, 2, 3, 999, 99_999]])
    gamma = np.exp(np.asarray(decay, np.float64))
    sums = np.stack([[(g ** np.arange(p + 1)).sum() for g in gamma] for p in places[0]])
    assert_close(row_normalizer(decay, jnp.asarray(places))[0], sums**-0.5)


def test_one_decay_for_all_heads():
    """Equal ends of decay_range give the correctly rounded log gamma, for any number of heads."""
    for first in (1 / 128, 1 / 32, 1e-3, 0.3):
        found = np.asarray(log_decay("log_spaced", 5, (first, first)))
        np.testing.assert_array_equal(found, np.full(5, np.log1p(-first), np.float32))


def test_decay_rules_are_the_papers():
    paper = 1 - np.exp(np.linspace(np.log(1 / 32), np.log(1 / 512), 8))
    assert_close(np.exp(np.asarray(log_decay("log_spaced", 8, (1 / 32, 1 / 512)))), paper)
    assert_close(
        np.expm1(np.asarray(log_decay("powers_of_two", 32, (0.5, 0.5)))),
        -(2.0 ** -(5 + np.arange(32))),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "chunked"}, "form='chunked' is not one of 'parallel'"),
        ({"implementation": "cuda"}, "implementation='cuda' is none of"),
        ({"chunk_size": 0}, "chunk_size=0 is less than 1"),
        ({"chunk_size": 4, "form": "parallel"}, "chunk_size=4 is for form='chunkwise'"),
        (
            {"log_decay": jnp.zeros(5)},
            r"log_decay \(5,\) does not fit .*; its shape must be \(3,\)",
        ),
        ({"state": jnp.zeros((2, 3, 6, 4))}, r"state \(2, 3, 6, 4\) does not fit"),
        ({"segment_ids": jnp.ones((2, 20), int)}, r"segment_ids \(2, 20\) does not fit"),
        ({"state": jnp.zeros((2, 3, 4, 6), jnp.bfloat16)}, "state is bfloat16"),
        ({"q": jnp.ones((2, 21, 3, 4), int)}, "q is int32; it must be float32 or bfloat16"),
        ({"v": jnp.ones((2, 21, 3, 6), int)}, "v is int32; it must be float32 or bfloat16"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    (q, k, v), decay, _ = inputs()
    unchecked = inspect.unwrap(retention)  # without the tests' check of annotations
    with pytest.raises(ValueError, match=message):
        unchecked(**({"q": q, "k": k, "v": v, "log_decay": decay} | changes))


@pytest.mark.parametrize(
    ("rule", "heads", "decay_range"),
    [
        ("powers_of_two", 1024, (0.5, 0.5)),
        ("log_spaced", 4, (1e-2, 1e-40)),
        ("none", 4, (0.5, 0.5)),
    ],
)
def test_the_slowest_decays_round_to_no_decay(rule, heads, decay_range):
    decay = log_decay(rule, heads, decay_range)
    places = np.array([[0, 1, 9, 2**31 - 2]])
    found = np.asarray(row_normalizer(decay, jnp.asarray(places, jnp.int32)))
    assert np.isfinite(found).all()
    assert_close(found[0, :3, -1], (places[0, :3] + 1.0) ** -0.5)
    q = jnp.ones((1, 9, heads, 2))
    y, state = compiled(q, q, q, decay)
    assert_close(np.asarray(y)[0, :, -1, 0], 2 * np.arange(1, 10))
    assert_close(np.asarray(state)[0, -1], np.full((2, 2), 9))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("segments", [None, SEGMENTS["padding inside"]])
def test_without_memory_a_token_sees_only_itself(form, segments):
    """Log gamma of -inf: gamma^0 is 1, all other powers are 0; with the gradients of that."""
    (q, k, v), decay, state = inputs()
    decay = jnp.full_like(decay, -jnp.inf)

    def total(q, k, v, decay, state):
        y, after = compiled(q, k, v, decay, state, segments, form=form)
        return (y * v).sum() + after.sum(), (y, after)

    gradients, (y, after) = jax.jit(jax.grad(total, range(5), has_aux=True))(q, k, v, decay, state)
    ids = np.ones((2, 21), int) if segments is None else segments
    real = ids[:, :, None, None] != 0
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    weight = real * (q * k).sum(-1, keepdims=True)
    last = np.array([row.nonzero()[0][-1] for row in ids])
    k_last, v_last = k[[0, 1], last], v[[0, 1], last]
    assert_close(y, weight * v)
    assert_close(after, k_last[..., None] * v_last[..., None, :])
    square = real * (v * v).sum(-1, keepdims=True)
    d_k, d_v = square * q, 2 * weight * v
    for row in range(2):
        d_k[row, last[row]] += v[row, last[row]].sum(-1, keepdims=True)
        d_v[row, last[row]] += k[row, last[row]].sum(-1, keepdims=True)
    assert_close(gradients[:3], (square * k, d_k, d_v))
    assert not np.asarray(gradients[3]).any()
    assert not np.asarray(gradients[4]).any()


def test_forward_mode_is_for_the_parallel_form():
    (q, k, v), decay, _ = inputs()

    def along(form):
        return jax.jvp(lambda q: compiled(q, k, v, decay, form=form)[0], (q,), (q,))

    y, tangent = along("parallel")
    assert_close(tangent, y)  # linear in q
    for form in ("chunkwise", "recurrent"):
        with pytest.raises(TypeError, match="forward-mode"):
            along(form)


def test_the_choice_of_an_implementation_is_explained(monkeypatch):
    def said(dtype, t=256, width=64):
        q = jax.ShapeDtypeStruct((2, t, 2, width), dtype)
        return explain_choice(q, q, q)

    assert said(jnp.bfloat16) == "retention runs in XLA: there is no kernel for 'cpu'"
    for module in ("api", "pallas_tpu"):
        monkeypatch.setattr(f"retnet_jax.ops.retention.{module}.backend", lambda: "tpu")
    assert said(jnp.float32).endswith("pallas_tpu is chosen for bfloat16, not for float32")
    assert said(jnp.bfloat16, t=64).endswith("is chosen for rows of 128 tokens or more")
    assert said(jnp.bfloat16) == "retention runs in the kernel pallas_tpu"
    reason = r"retention runs in XLA: the kernel pallas_tpu cannot run: 1 heads of 4096/4096, "
    assert said(jnp.bfloat16, width=4096).startswith(reason)
