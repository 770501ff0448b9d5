"""Flash attention equals plain attention: outputs, gradients, documents, and on a mesh."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from test_aot import tpus
from test_train_step import CONFIG
from tolerances import assert_close

from retnet_jax import ModelConfig, Transformer
from retnet_jax.aot.compile_step import compile_step
from retnet_jax.aot.flops import flops_of
from retnet_jax.config import MeshConfig
from retnet_jax.ops import attention, flash_attention
from retnet_jax.ops.attention import attend_to_all
from retnet_jax.parallel.mesh import make_mesh

__all__ = ["tpus"]  # a fixture

T = 384  # three tiles
# Documents; padding at both ends and inside one of them.
SEGMENTS = np.zeros((2, T), np.int32)
SEGMENTS[0, 9:130], SEGMENTS[0, 140:170], SEGMENTS[0, 170:] = 1, 1, 2
SEGMENTS[1, :370] = 5
ROWS = {"one document": None, "documents": jnp.asarray(SEGMENTS)}


def model(**changes):
    config = ModelConfig(vocab_size=61, d_model=64, n_heads=2, **changes)
    return Transformer(config, rngs=nnx.Rngs(0))


def loss_and_gradient(model, segments):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, segments.shape))

    @jax.jit
    @jax.value_and_grad
    def loss(model):
        logits, _ = model(tokens, segment_ids=segments)
        weight = jnp.sin(jnp.arange(logits.size)).reshape(logits.shape)
        return (logits * weight * (segments > 0)[..., None]).sum()

    return loss(model)


@pytest.mark.parametrize(
    ("rows", "window", "key_heads"),
    [("one document", None, 2), ("documents", None, 2), ("one document", 150, 1)],
)
def test_splash_attention_is_attention(rows, window, key_heads):
    rng = np.random.default_rng(0)
    qkv = [
        jnp.asarray(rng.normal(size=(2, T, heads, 48)), jnp.float32)
        for heads in (2, key_heads, key_heads)
    ]
    segments = ROWS[rows]
    ids = jnp.ones((2, T), int) if segments is None else segments
    mask = (ids[:, :, None] == ids[:, None]) & np.tri(T, dtype=bool)
    if window is not None:
        mask = mask & ~np.tri(T, k=-window, dtype=bool)

    def outputs_and_gradients(attend):
        def function(*qkv):
            return jnp.where((ids > 0)[..., None, None], attend(*qkv), 0)

        @jax.jit
        def both(*qkv):
            y, pullback = jax.vjp(function, *qkv)
            return y, pullback(jnp.sin(jnp.arange(y.size)).reshape(y.shape))

        return both(*qkv)

    found = outputs_and_gradients(
        partial(
            flash_attention.flash_attention,
            document=segments,
            implementation="splash",
            window=window,
        )
    )
    assert_close(found, outputs_and_gradients(partial(attend_to_all, mask=mask[:, None])))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("before", "t", "dtype"), [(0, 542, "float32"), (40, 700, "bfloat16")])
def test_attention_in_blocks_on_a_cpu_is_attention(before, t, documents, dtype, monkeypatch):
    """With `before` keys in front of the first query."""
    s, mask = before + t, None
    if documents:
        ids = jnp.arange(s) // 300
        mask = ((ids[before:, None] == ids) & np.tri(t, s, before, dtype=bool))[None, None]
    shapes = [(1, t, 4, 8), (1, s, 2, 8), (1, s, 2, 8)]
    arrays = [jax.random.normal(jax.random.key(i), x, dtype) for i, x in enumerate(shapes)]

    def outputs_and_gradients(*arrays):
        y, pullback = jax.vjp(partial(attend_to_all, mask=mask), *arrays)
        return y, pullback(jnp.sin(jnp.arange(y.size)).reshape(y.shape).astype(dtype))

    # Scores of a block of queries and all keys are never computed.
    largest = max(x.aval.size for x in scores_of(jax.make_jaxpr(outputs_and_gradients)(*arrays)))
    assert largest == 4 * 256 * 256
    found = jax.jit(outputs_and_gradients)(*arrays)
    if mask is None:
        mask = np.tri(t, s, before, dtype=bool)[None, None]
    monkeypatch.setattr(attention, "LEAST_IN_BLOCKS", t + 1)
    assert_close(found, jax.jit(outputs_and_gradients)(*arrays), dtype)


def scores_of(jaxpr):
    """The results of all `exp` in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "exp":
            yield from equation.outvars
        for inner in jaxprs_in_params(equation.params):
            yield from scores_of(inner)


def test_flops_of_attention_in_blocks_are_those_of_the_blocks_that_are_seen():
    x = jax.ShapeDtypeStruct((1, 1024, 1, 8), jnp.float32)  # four blocks, ten pairs
    assert flops_of(lambda *qkv: attend_to_all(*qkv, None), x, x, x) == 10 * 2 * 2 * 256 * 256 * 8


def test_flops_of_splash_attention_are_counted():
    x = jax.ShapeDtypeStruct((2, T, 3, 64), jnp.float32)
    splash = partial(flash_attention.flash_attention, implementation="splash")
    found = flops_of(splash, x, x, x)
    assert found == flops_of(lambda *qkv: attend_to_all(*qkv, None), x, x, x) > 0


@pytest.mark.slow
def test_a_model_on_a_mesh_computes_the_same_with_splash_attention(monkeypatch):
    segments = jnp.asarray(SEGMENTS[:, 64:192])
    transformer = model(n_layers=1, remat="q,k,v,retention")
    expected = loss_and_gradient(transformer, segments)
    monkeypatch.setattr(flash_attention, "best", lambda *_: "splash")
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])):
        assert_close(loss_and_gradient(transformer, segments), expected)


def test_a_step_for_tpus_has_no_scores(tpus):
    length = 512
    model = dataclasses.replace(
        CONFIG.model, mixer="attention", n_layers=6, dtype="bfloat16", remat="q,k,v,retention"
    )
    config = dataclasses.replace(
        CONFIG,
        model=model,
        data=dataclasses.replace(CONFIG.data, sequence_length=length),
        mesh=MeshConfig(data=2, tensor=2),
    )
    text = compile_step(config, tpus).compiled.as_text()
    assert f"{length},{length}]" not in text
    # One kernel forward, which is not repeated for the two backward.
    assert text.count('custom_call_target="tpu_custom_call"') == 3


def test_a_program_for_gpus_has_no_scores(monkeypatch):
    """Only the lowered program is checked: compiling for cuDNN needs a GPU."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91_000)

    def calls(remat, segments):
        def loss(model):
            return model(jnp.zeros((2, T), int), segment_ids=segments)[0].sum()

        built = model(n_layers=6, dtype="bfloat16", remat=remat)
        text = jax.jit(jax.grad(loss)).trace(built).lower(lowering_platforms=("cuda",)).as_text()
        return f"{T}x{T}x" in text, text.count("fmhaSoftmax("), text.count("fmhaSoftmaxBackward(")

    assert calls("full", None) == (False, 2, 1)
    assert calls("q,k,v,retention", None) == (False, 1, 1)
    assert calls("full", jnp.asarray(SEGMENTS)) == (True, 0, 0)


def test_cases_without_flash_attention(monkeypatch):
    q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
    assert flash_attention.best(q, True) is None  # on a CPU
    x = jnp.zeros((2, 200, 4, 64))
    for name, reason in {
        "splash": "200 tokens are not a multiple of 128",
        "cudnn": "it needs a GPU in this machine, not 'cpu'",
        "flash": "none of that name",
        None: "none of that name for 'cpu'",
    }.items():
        with pytest.raises(NotImplementedError, match=reason):
            flash_attention.flash_attention(x, x, x, implementation=name)
    with jax.set_mesh(make_mesh(MeshConfig(data=4, seq=2))):
        reason = flash_attention.unsupported("splash", q, True)
        assert reason == "positions are split over devices"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert flash_attention.best(q, False) == "splash"
    for other in (q.update(dtype=jnp.float32), q.update(shape=(2, 64, 4, 64))):
        assert flash_attention.best(other, False) is None
    with pytest.raises(NotImplementedError, match="it needs a GPU in this machine, not 'tpu'"):
        flash_attention.flash_attention(x, x, x, implementation="cudnn")
