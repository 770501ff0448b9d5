"""Every implementation of the chunkwise form computes the same, or says why it cannot run."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu
from tolerances import assert_close, relative_difference

from retnet_jax.config import MeshConfig
from retnet_jax.ops.retention import (
    IMPLEMENTATIONS,
    log_decay,
    number_documents,
    pallas_tpu,
    retention,
)
from retnet_jax.parallel.mesh import make_mesh

H = 2
DECAY = log_decay("log_spaced", H, (1 / 8, 1 / 256))


def inputs(t, k, v, dtype=jnp.bfloat16, b=2, seed=0):
    """Mean 1/2; with mean 0 the gradient of log gamma would be a sum of numbers that cancel."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(0.5, size=(b, t, H, width)) for width in (k, k, v))
    state = jnp.asarray(rng.normal(0.5, size=(b, H, k.shape[3], v.shape[3])), jnp.float32)
    return [jnp.asarray(x, dtype) for x in (q * k.shape[3] ** -0.5, k, v)], state


def packed(t, b=2, seed=1):
    """Several documents in a row, one of them long; padding before, between and after them."""
    rng = np.random.default_rng(seed)
    segments = np.cumsum(rng.random((b, t)) < 8 / t, axis=1) % 3 + 1
    segments[0, : t // 9] = 0
    segments[1, t // 2 : t // 2 + 5] = 0
    segments[1, -3:] = 0
    return jnp.asarray(segments)


def outputs_and_gradients(implementation, arrays, state, segments, form="chunkwise", chunk=None):
    @jax.jit
    def run(*operands):
        def outputs(q, k, v, decay, state):
            return retention(q, k, v, decay, state, segments, form, chunk, implementation)

        found, backward = jax.vjp(outputs, *operands)
        rng = np.random.default_rng(7)
        weights = (jnp.asarray(rng.normal(0.5, size=x.shape), x.dtype) for x in found)
        return found, backward(tuple(weights))

    return run(*arrays, DECAY, state)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    if request.param == "mosaic_gpu" and not hasattr(mosaic_gpu, "InterpretGPUParams"):
        pytest.skip("jax 0.11 and later interpret it: test_mosaic_gpu.py runs this there")
    return request.param


CASES = {
    "one document": {"t": 128, "k": 64, "v": 64},
    "odd length": {"t": 77, "k": 64, "v": 128},
    "documents": {"t": 150, "k": 64, "v": 64, "documents": True},
    "no state": {"t": 70, "k": 64, "v": 64, "state": False},
    "a head of torchscale": {"t": 65, "k": 64, "v": 72, "documents": True},
}


@functools.cache
def inputs_and_expected(case):
    """Inputs, and the outputs and gradients of the parallel form in float32, by autodiff."""
    case = CASES[case]
    arrays, state = inputs(case["t"], case["k"], case["v"])
    state = state if case.get("state", True) else None
    segments = packed(case["t"]) if case.get("documents") else None
    exact = [x.astype(jnp.float32) for x in arrays]
    expected = outputs_and_gradients("xla", exact, state, segments, form="parallel")
    return (arrays, state, segments), expected


@pytest.mark.parametrize("case", CASES)
def test_outputs_states_and_gradients(implementation, case):
    given, expected = inputs_and_expected(case)
    found = outputs_and_gradients(implementation, *given, chunk=64)
    assert (found[0][0].dtype, found[0][1].dtype) == (jnp.bfloat16, jnp.float32)
    assert_close(found[0], expected[0], "bfloat16", "outputs")
    assert_close(found[1], expected[1], "bfloat16", "gradients")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["odd length", "documents"])
def test_without_decay(implementation, case, monkeypatch):
    monkeypatch.setitem(globals(), "DECAY", log_decay("none", H, (1 / 8, 1 / 8)))
    inputs_and_expected.cache_clear()
    given, expected = inputs_and_expected(case)
    inputs_and_expected.cache_clear()
    found = outputs_and_gradients(implementation, *given, chunk=64)
    assert_close(found[0], expected[0], "bfloat16", "outputs")
    assert_close(found[1], expected[1], "bfloat16", "gradients")


@functools.cache
def float32_inputs_and_expected():
    given = *inputs(150, 16, 24, jnp.float32), packed(150)
    return given, outputs_and_gradients("xla", *given, form="parallel")


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("chunk", [16, 48, 200])
def test_float32_is_exact(implementation, chunk):
    given, expected = float32_inputs_and_expected()
    assert_close(outputs_and_gradients(implementation, *given, chunk=chunk), expected)


def test_split_anywhere_and_carry_the_state_equals_whole(implementation):
    arrays, state = inputs(140, 64, 64)
    segments = packed(140)
    run = jax.jit(partial(retention, implementation=implementation))
    whole = run(*arrays, DECAY, state, segments)
    cut = 100
    assert segments[0, cut - 1] == segments[0, cut] != 0  # the cut is inside a document
    found, outputs = state, []
    for part in (np.s_[:, :cut], np.s_[:, cut:]):
        y, found = run(*(x[part] for x in arrays), DECAY, found, segments[part])
        outputs.append(y)
    same = np.asarray(segments[:, cut - 1] == segments[:, cut])
    found = (jnp.concatenate(outputs, axis=1)[same], found[same])
    assert_close(found, (whole[0][same], whole[1][same]), "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_131072_tokens_lose_no_accuracy(implementation):
    """Compared with float64 in numpy."""
    t, k, v = 131_072, 2, 2
    arrays, state = inputs(t, k, v, jnp.float32, b=1)
    y, final = retention(*arrays, DECAY, state, implementation=implementation)
    q, k, v = (np.asarray(x[0], np.float64) for x in arrays)
    gamma = np.exp(np.asarray(DECAY, np.float64))[:, None, None]
    expected, found = np.asarray(state[0], np.float64), []
    for n in range(t):
        expected = gamma * expected + k[n][:, :, None] * v[n][:, None, :]
        found.append(np.einsum("hk,hkv->hv", q[n], expected))
    assert relative_difference(final[0], expected) <= 1e-5
    assert relative_difference(y[0], np.stack(found)) <= 1e-5


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, {"seq": 4, "tensor": 2}])
def test_kernels_on_a_mesh(mesh):
    """Each device runs the kernel on its rows and heads; positions are split through the state."""
    arrays, state = inputs(64, 16, 16, jnp.float32, b=4)
    segments = packed(64, b=4)
    expected = outputs_and_gradients("xla", arrays, state, segments)
    with jax.set_mesh(make_mesh(MeshConfig(**({"data": 1} | mesh)))):
        found = outputs_and_gradients("pallas_tpu", arrays, state, segments)
    assert_close(found, expected)


def test_a_decay_that_is_not_trained_costs_nothing():
    """The final state, which only the gradient of log gamma needs, is not kept."""
    arrays, _ = inputs(64, 16, 16, b=1)

    def loss(q, k, v):
        return retention(q, k, v, DECAY, implementation="pallas_tpu")[0].astype(jnp.float32).sum()

    _, backward = jax.vjp(loss, *arrays)
    kept = jax.tree.leaves(backward)
    assert not [x for x in kept if getattr(x, "shape", None) == (1, H, 16, 16)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"implementation": "pallas_tpu", "form": "recurrent"},
            "'pallas_tpu' computes form='chunkwise' only",
        ),
        ({"implementation": "mosaic_gpu", "dtype": jnp.float32}, "cannot run here: .*bfloat16"),
        ({"implementation": "mosaic_gpu", "chunk_size": 32}, "chunk_size=32; its chunks have 64"),
    ],
)
def test_a_named_implementation_never_falls_back(arguments, message):
    arguments = dict(arguments)
    arrays, _ = inputs(8, 64, 64, arguments.pop("dtype", jnp.bfloat16))
    with pytest.raises(NotImplementedError, match=message):
        retention(*arrays, DECAY, **arguments)


def test_documents_of_chunks():
    """The numbers that the kernel gets for each token, counted by hand."""
    row = number_documents(jnp.asarray([[0, 1, 1, 2, 2, 0, 2, 3, 3]]))
    numbers = np.asarray(pallas_tpu.document_numbers(row, 4))
    assert numbers.shape == (1, 3, 5, 4)
    assert numbers[0, :, 0].tolist() == [[0, 1, 2, 3], [4, 4, 5, 6], [7, 7, 7, 7]]
    assert numbers[0, :, 1].tolist() == [[-1, 0, 0, 1], [1, -1, 1, 2], [2, -1, -1, -1]]
    assert numbers[0, :, 2].tolist() == [[-1, 1, 2, -1], [1, -1, 2, -1], [1, -1, -1, -1]]
    assert numbers[0, :, 3].tolist() == [[-1, -1, -1, 0], [-1, -1, -1, 0], [0, -1, -1, -1]]
    assert numbers[0, :, 4, 0].tolist() == [-1, -1, 1]
