"""The Hopper kernels: compared with XLA in Pallas's interpreter, and compiled for an H200.

No test needs a GPU. The interpreter for Mosaic GPU came with jax 0.11, which needs Python 3.12;
with an older jax one test runs the others in `.venv/py312`, which the Makefile makes.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from tolerances import assert_close

from retnet_jax.ops.retention import log_decay, mosaic_gpu, number_documents, xla
from retnet_jax.ops.retention.mosaic_gpu import entry, memory, tuned

pytestmark = pytest.mark.compiles(200, reason="the interpreter calls many small programs")
ROOT = Path(__file__).parent.parent
HAS_INTERPRETER = hasattr(plgpu, "InterpretGPUParams")
interpreted = pytest.mark.skipif(not HAS_INTERPRETER, reason="interpreted by jax 0.11 and later")


@pytest.fixture(autouse=True)
def races_are_errors(monkeypatch):
    """Races of warpgroups and TMA: accesses to shared memory that no barrier or fence orders."""
    if HAS_INTERPRETER:
        detecting = plgpu.InterpretGPUParams(detect_races=True)
        monkeypatch.setattr(memory, "interpreter", lambda: detecting)


def inputs(b, t, h, k, v, seed=0):
    """Mean 1/2; with mean 0 the gradient of log gamma would be a sum of numbers that cancel."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(scale * rng.normal(0.5, size=(b, t, h, width)), jnp.bfloat16)
        for scale, width in ((k**-0.5, k), (1, k), (1, v))
    )
    state = jnp.asarray(rng.normal(0.5, size=(b, h, k.shape[3], v.shape[3])), jnp.float32)
    return q, k, v, log_decay("log_spaced", h, (1 / 32, 1 / 512)), state


def outputs_and_gradients(form, arrays, row):
    def run(*arrays):
        return form(*arrays, row)

    (y, after), backward = jax.vjp(run, *arrays)
    rng = np.random.default_rng(7)
    d_y = jnp.asarray(rng.normal(0.5, size=y.shape), y.dtype)
    d_after = jnp.asarray(rng.normal(0.5, size=after.shape), after.dtype)
    return (y, after), backward((d_y, d_after))


def assert_same_as_xla(arrays, row):
    """Outputs, final state and the gradients of all five inputs."""
    q, k, v, *others = arrays
    exact = (*(x.astype(jnp.float32) for x in (q, k, v)), *others)
    expected = outputs_and_gradients(xla.chunkwise, exact, row)
    found = outputs_and_gradients(mosaic_gpu.chunkwise, arrays, row)
    assert_close(found[0], expected[0], q.dtype, "outputs")
    for name, gradient, reference in zip(
        ("q", "k", "v", "log_decay", "state"), found[1], expected[1], strict=True
    ):
        assert_close(gradient, reference, q.dtype, f"gradient of {name}")


@interpreted
def test_documents_and_padding():
    """Borders and padding at the start, within chunks, at their ends and over whole chunks."""
    documents_of = [
        np.repeat([1, 2, 3, 4, 0], [60, 4, 6, 62, 1]),
        np.repeat([0, 1, 0, 2], [3, 60, 67, 3]),
    ]
    row = number_documents(jnp.asarray(documents_of))
    assert_same_as_xla(inputs(b=2, t=133, h=1, k=64, v=128), row)


@interpreted
@pytest.mark.parametrize(("k", "v"), [(72, 64), (256, 512)])
def test_widths(k, v):
    """One warpgroup; and heads of 256/512, for which two warpgroups add their d_q and d_k."""
    assert_same_as_xla(inputs(b=1, t=70, h=1, k=k, v=v), None)


@interpreted
def test_rows_in_segments(monkeypatch):
    """Three segments of two chunks; a document across the first cut, a border at the second."""
    monkeypatch.setattr(entry, "SHORTEST_SEGMENT", 1)
    monkeypatch.setattr(entry, "PROCESSORS", 3)
    ends = np.array([100, 256, 310])
    assert entry._segment_length(1, 5) == 2
    segments = 1 + np.searchsorted(ends, np.arange(310), "right")
    assert_same_as_xla(
        inputs(b=1, t=310, h=1, k=64, v=64), number_documents(jnp.asarray([segments]))
    )


@interpreted
def test_other_tilings_give_the_same_bits(monkeypatch, tmp_path):
    """Five chunks of a row, with up to four in shared memory."""
    *arrays, state = inputs(b=1, t=300, h=1, k=64, v=128)
    expected = outputs_and_gradients(mosaic_gpu.chunkwise, (*arrays, state), None)
    choices = {
        tuned.Walk(64, 128, 300, False): {"groups": 1, "cluster": 2, "chunks_ahead": 3},
        tuned.Walk(64, 128, 300, True): {"groups": 2, "cluster": 1, "chunks_ahead": 1},
        tuned.Walk(128, 64, 300, False): {"groups": 1, "cluster": 1, "chunks_ahead": 4},
        tuned.Walk(128, 64, 300, True): {"groups": 1, "cluster": 1, "chunks_ahead": 3},
        tuned.Scores(128, 300): {"stages": 1},
    }
    table = {str(kernel): {"choice": choice} for kernel, choice in choices.items()}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"cpu": table}))
    monkeypatch.setattr(tuned, "TABLE", path)
    assert tuned.tiling(tuned.Walk(64, 128, 300, False)).chunks == 3
    found = outputs_and_gradients(mosaic_gpu.chunkwise, (*arrays, state), None)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
@pytest.mark.skipif(HAS_INTERPRETER, reason="this jax has the interpreter")
def test_in_an_environment_with_the_interpreter():
    python = ROOT / ".venv/py312/bin/python"
    if not python.exists():
        pytest.skip("no .venv/py312: `make .venv/py312` makes it where there is a python3.12")
    suite = ROOT / "tests/test_retention_implementations.py"
    command = [python, "-m", "pytest", "-q", "-k", "mosaic_gpu and not compiled"]
    command += [Path(__file__), suite]
    # Another jax takes other flags and must not use the same cache.
    ours = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: x for name, x in os.environ.items() if name not in ours}
    environment["PYTHONPATH"] = str(ROOT)
    # It takes three minutes. Two runs of eight did not end: the interpreter waited for itself.
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "13 passed" in run.stdout, run.stdout[-4000:]


def test_reasons_for_unsupported_arrays():
    q, k, v, *_ = inputs(b=1, t=8, h=1, k=64, v=72)
    wide = jnp.zeros((1, 8, 1, 428), jnp.bfloat16)
    reason = mosaic_gpu.unsupported
    assert "only bfloat16" in reason(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert "value heads are 428 wide; it takes only multiples of 8" in reason(q, k, wide)
    assert "chunk_size=128" in reason(q, k, v, 128)
    on_cpu = reason(q, k, v)
    assert on_cpu is None if HAS_INTERPRETER else "cannot interpret it on a CPU" in on_cpu
    with pytest.raises(NotImplementedError, match="chunk_size=32"):
        mosaic_gpu.chunkwise(*inputs(b=1, t=8, h=1, k=64, v=64), None, chunk_size=32)


def kernels_of(jaxpr):
    """What each call of a kernel runs, in a program and the functions that it calls."""
    found = []
    for equation in jaxpr.eqns:
        if equation.params.get("name") in ("walk_segments", "decayed_scores"):
            found.append(equation.params["jaxpr"])
        for part in jax.tree.leaves(list(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(part):
                found += kernels_of(getattr(part, "jaxpr", part))
    return found


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")


def test_layers_share_their_kernels(monkeypatch):
    """Layers that are written out lower each kernel once: it takes a second, and there are many."""
    monkeypatch.setattr(memory, "interpreter", lambda: None)  # as on a GPU
    arrays = inputs(b=1, t=2048, h=1, k=64, v=64)

    def layers(n):
        def loss(q, k, v, decay, state):
            for _ in range(n):
                v, after = entry._retention(q, k, v, decay, state, None)
            return v.astype(jnp.float32).sum() + after.sum()

        return kernels_of(jax.make_jaxpr(jax.grad(loss, argnums=range(5)))(*arrays).jaxpr)

    one, three = layers(1), layers(3)
    assert len(three) == 3 * len(one)
    assert {id(kernel) for kernel in three} == {id(kernel) for kernel in one}
    assert len({id(kernel) for kernel in one}) >= 4


OTHER_WIDTHS = [(64, 64), (64, 128), (128, 256), (256, 432), (256, 512)]


@pytest.mark.compilers
@pytest.mark.parametrize(
    ("k", "v"), [(128, 128), *(pytest.param(*x, marks=pytest.mark.slow) for x in OTHER_WIDTHS)]
)
def test_compiled_for_an_h200(k, v, tmp_path):
    """No register spills, and no temporaries in memory except scores, factors and states."""
    wheels = ROOT / ".venv/cuda"
    if not wheels.exists():
        pytest.skip("no .venv/cuda with XLA's compiler for GPUs: `make .venv/cuda` makes it")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{wheels}",
        "MOSAIC_GPU_DUMP_TO": str(tmp_path),
        "XLA_FLAGS": "",
    }
    command = [sys.executable, Path(__file__), str(k), str(v)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    reports = [path.read_text() for path in tmp_path.glob("*.ptxas")]
    assert len(reports) == found["kernels"] > 0
    for report in reports:
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report
        assert "serialized" not in report, report
    assert found["temporaries"] <= found["scores_factors_and_states"]


def compile_for_an_h200(k: int, v: int) -> dict:
    """Compiles outputs and gradients of heads k/v, and returns the numbers for the test above."""
    from retnet_jax.aot import topologies

    topologies.prepare()
    mesh = jax.sharding.Mesh(np.array(topologies.gpus("h200")), "x")
    b, t, h = 1, 16384, 16
    bf16, f32 = jnp.bfloat16, jnp.float32
    shapes = {
        "q": ((b, t, h, k), bf16),
        "k": ((b, t, h, k), bf16),
        "v": ((b, t, h, v), bf16),
        "log_decay": ((h,), f32),
        "state": ((b, h, k, v), f32),
        "d_y": ((b, t, h, v), bf16),
        "d_after": ((b, h, k, v), f32),
    }
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(*x, sharding=whole) for x in shapes.values()]

    def step(q, k, v, log_decay, state, d_y, d_after):
        def run(q, k, v, state):
            return mosaic_gpu.chunkwise(q, k, v, log_decay, state, None)

        outputs, backward = jax.vjp(run, q, k, v, state)
        return outputs, backward((d_y, d_after))

    with jax.set_mesh(mesh):
        assert mosaic_gpu.unsupported(*arguments[:3]) is None
        lowered = jax.jit(step).lower(*arguments)
        memory = lowered.compile().memory_analysis()
    tokens = b * h * t
    scores, factors = 2 * 64 * tokens, 3 * 4 * tokens
    states = 4 * b * h * k * v
    return {
        "kernels": len(set(re.findall(r'kernel_hash = "([^"]*)"', lowered.as_text()))),
        "temporaries": memory.temp_size_in_bytes,
        "scores_factors_and_states": 2 * scores + 2 * factors + 12 * states,
    }


if __name__ == "__main__":
    print(json.dumps(compile_for_an_h200(*map(int, sys.argv[1:]))))
