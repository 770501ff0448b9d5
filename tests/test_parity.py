"""Logits equal those of torchscale, flash-linear-attention and syncdoth: recorded, or in numpy."""

import functools
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx
from safetensors.numpy import load_file, save_file
from tolerances import assert_close, relative_difference

from retnet_jax import interop
from retnet_jax.interop import presets
from retnet_jax.interop.parameter_source import ModelSource
from retnet_jax.interop.tables import config_values
from retnet_jax.model import build_model
from retnet_jax.model.multi_scale_retention import MultiScaleRetention
from retnet_jax.ops.retention import log_decay, row_normalizer

FIXTURES = Path(__file__).parent / "fixtures"
CASES = ("a_h4", "b_shared", "c_h1", "d_bigqk", "e_eps0", "f_deepnorm")
HEAD = [f"torchscale_head/{case}" for case in CASES]
LEGACY = ["torchscale_legacy/l_paper", "torchscale_legacy/l_nosubln"]
FLA = ["fla/default", "fla/variant"]
SYNCDOTH = ["syncdoth/glu", "syncdoth/ffn"]
CLAMP_ACTIVE = {"torchscale_head/d_bigqk", "torchscale_legacy/l_nosubln"}
FLOAT32, FLOAT32_FLA, FLOAT64 = 2e-5, 1e-4, 1e-9  # largest difference of logits


@functools.cache
def recorded(case):
    return load_file(FIXTURES / case / "io.safetensors")


def load(case, **changes):
    return interop.load(FIXTURES / case, **changes)


def clamp(case):
    return {"score_clamp": "signed" if "legacy" in case else "absolute"}


@functools.partial(jax.jit, static_argnames="form")
def run(model, tokens, state=None, segment_ids=None, form="parallel"):
    return model(tokens, state, segment_ids, form)


def difference(actual, expected):
    assert actual.shape == expected.shape
    assert expected.any()
    return np.abs(np.asarray(actual) - expected).max()


@pytest.mark.parametrize("case", HEAD + LEGACY)
def test_torchscale(case):
    io = recorded(case)
    changes = clamp(case) if case in CLAMP_ACTIVE else {}
    model = load(case, **changes)
    logits, state = run(model, io["tokens_T37"])
    assert difference(logits[:1], io["parallel_f64_T37"]) <= FLOAT32
    decay = log_decay("powers_of_two", model.config.n_heads, model.config.decay_range)
    scale = row_normalizer(decay, jnp.full((1, 1), 36))[0, 0]
    for layer, ours in enumerate(state.layers):
        theirs = io[f"state.{layer}.prev_key_value_f32_T37"]
        assert_close(ours.swapaxes(-1, -2) * scale[:, None, None], theirs)
        assert_close(scale**-2, io[f"state.{layer}.scale_f32_T37"])
    longer, _ = run(model, io["tokens_T64"])
    assert difference(longer[:, -4:], io["parallel_f32_T64"]) <= FLOAT32


@pytest.mark.parametrize("case", HEAD + LEGACY)
def test_torchscale_in_float64_with_its_clamp(case):
    io = recorded(case)
    with jax.enable_x64(True):
        logits, _ = run(load(case, dtype="float64", **clamp(case)), io["tokens_T37"][:1])
        assert logits.dtype == jnp.float64
        assert difference(logits, io["parallel_f64_T37"]) <= FLOAT64


@pytest.mark.parametrize("case", [*HEAD, *LEGACY, *FLA])
def test_forms_are_equal_and_equal_the_recorded_logits_without_a_clamp(case):
    """This includes a case in which torchscale's own chunkwise form differs."""
    io = recorded(case)
    expected = io["logits_f64_T37" if case in FLA else "parallel_f64_T37"]
    with jax.enable_x64(True):
        model = load(case, dtype="float64", chunk_size=16)
        parallel, recurrent, chunkwise = (
            run(model, io["tokens_T37"][:1], form=form)[0]
            for form in ("parallel", "recurrent", "chunkwise")
        )
        assert_close(recurrent, parallel, "float64")
        assert_close(chunkwise, parallel, "float64")
        if case not in CLAMP_ACTIVE:
            assert difference(parallel, expected) <= FLOAT64
        else:
            assert difference(parallel, expected) > 100 * FLOAT64


@pytest.mark.parametrize("case", FLA)
def test_fla(case):
    io = recorded(case)
    model = load(case)
    logits, state = run(model, io["tokens_T37"], form="chunkwise")
    assert difference(logits[:1], io["logits_f64_T37"]) <= FLOAT32_FLA
    assert_close(state.layers[0], io["layer0_recurrent_state_f32_T37"])
    for length in (64, 100):
        longer, _ = run(model, io[f"tokens_T{length}"], form="chunkwise")
        assert difference(longer[:, -4:], io[f"logits_f32_T{length}"]) <= FLOAT32_FLA
    steps = prefill_then_steps(model, io["tokens_T37"])
    assert difference(steps, io["logits_prefill20_then_steps_f32_T37"]) <= FLOAT32_FLA
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], io["tokens_T37"][:, 1:]
    ).mean()
    assert_close(loss[None], io["loss_f32_T37"])


@pytest.mark.parametrize("case", SYNCDOTH)
def test_syncdoth(case):
    io = recorded(case)
    model = load(case)
    logits, _ = run(model, io["tokens_T37"])
    assert difference(logits[:1], io["parallel_f32_T37"]) <= FLOAT32
    longer, _ = run(model, io["tokens_T64"])
    assert difference(longer[:, -4:], io["parallel_f32_T64"]) <= FLOAT32
    steps = prefill_then_steps(model, io["tokens_T37"])
    assert difference(steps, io["prefill20_recurrent_f32_T37"]) <= FLOAT32


@pytest.mark.parametrize("form", ["parallel", "chunkwise", "recurrent"])
@pytest.mark.parametrize("case", SYNCDOTH)
def test_syncdoth_padded_on_the_left(case, form):
    io = recorded(case)
    mask = io["leftpad_mask"]
    assert mask.sum(1).tolist() == [37, 32]
    logits, _ = run(load(case), io["leftpad_tokens"], segment_ids=mask, form=form)
    real = mask.astype(bool)
    assert difference(logits[real], io["leftpad_parallel_f32"][real]) <= FLOAT32


def test_the_clamp_ignores_padding():
    io = recorded("syncdoth/glu")
    real = io["leftpad_mask"].astype(bool)
    model = load("syncdoth/glu", **clamp("syncdoth/glu"))
    logits, _ = run(model, io["leftpad_tokens"], segment_ids=io["leftpad_mask"])
    assert difference(logits[real], io["leftpad_parallel_f32"][real]) <= FLOAT32


def prefill_then_steps(model, tokens):
    """Logits from position 20 on: 20 tokens at once, then one by one."""
    _, state = run(model, tokens[:, :20], form="chunkwise")
    steps = []
    for n in range(20, tokens.shape[1]):
        logits, state = run(model, tokens[:, n : n + 1], state, form="recurrent")
        steps.append(logits)
    return jnp.concatenate(steps, axis=1)


@pytest.mark.parametrize(
    "case",
    ["torchscale_head/a_h4", "torchscale_head/d_bigqk", "torchscale_legacy/l_paper", "fla/default"],
)
def test_gradients(case):
    if case in FLA:
        model, form = load(case), "chunkwise"
        tokens, layout = recorded(case)["tokens_T37"], interop.fla.LAYOUT
        expected = load_file(FIXTURES / case / "grads_T37.safetensors")
        expected |= {"loss_f32": recorded(case)["loss_f32_T37"]}
    else:
        model, form = load(case, **clamp(case)), "parallel"
        layout = interop.torchscale.LAYOUT
        expected = load_file(FIXTURES / case / "grads.safetensors")
        tokens = expected.pop("tokens")
        expected = {name.removeprefix("grad_f32."): value for name, value in expected.items()}

    tokens = jnp.asarray(tokens)

    @jax.jit
    @jax.value_and_grad
    def loss(model):
        logits, _ = model(tokens, form=form)
        labels = tokens[:, 1:]
        nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits[:, :-1], labels)
        return nll.mean()

    value, gradient = loss(model)
    assert_close(value[None], expected.pop("loss_f32"))
    # A gradient has the structure of a model, so the layout gives the names of its tensors.
    found = {
        tensor.name: np.concatenate([np.asarray(piece) for piece in tensor.pieces])
        for tensor in layout.tensors(ModelSource(gradient), None)
        if "retnet_rel_pos" not in tensor.name
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_difference(found[name], value) <= 1e-5, name


@pytest.mark.parametrize("case", ["head/msr_init", "head/msr_big", "legacy/msr_big"])
def test_one_retention_layer(case):
    directory = FIXTURES / f"torchscale_{case}"
    recorded = load_file(directory / "retention.safetensors")
    sizes = config_values(directory)
    preset = presets.torchscale if "head" in case else presets.paper
    with jax.enable_x64(True):
        config = preset(
            vocab_size=1,
            d_model=sizes["embed_dim"],
            n_layers=1,
            n_heads=sizes["heads"],
            value_dim=sizes["value_dim"],
            norm_epsilon=sizes["eps"],
            dtype="float64",
        )
        arrays = {
            name.removeprefix("weight."): value
            for name, value in recorded.items()
            if name.startswith("weight.")
        }

        def run(**changes):
            changed = preset(**(vars(config) | changes))
            layer = MultiScaleRetention(changed, rngs=nnx.Rngs(0), value_scale=1.0, out_scale=1.0)
            for ours, theirs in zip(
                ("q", "k", "v", "gate", "out"), ("q", "k", "v", "g", "out"), strict=True
            ):
                linear = getattr(layer, ours)
                linear.kernel = nnx.Param(jnp.asarray(arrays[f"{theirs}_proj.weight"].T))
                if changed.mixer_bias:
                    linear.bias = nnx.Param(jnp.asarray(arrays[f"{theirs}_proj.bias"]))
            x = jnp.asarray(recorded["x"], jnp.float64)
            context, _ = MultiScaleRetention.prepare(changed, None, x.shape[:2], None)
            return layer(x, None, context, "parallel")

        y, state = jax.jit(run)()
        assert_close(y, recorded["out_sqrtonly_f64"], "float64")
        assert_close(state, recorded["raw_state_f64"], "float64")
        clamped, _ = jax.jit(partial(run, **clamp(str(directory))))()
        assert_close(clamped, recorded["out_parallel_f64"], "float64")


def random_checkpoint(layout, config, rng):
    """The tensors of a checkpoint with random values, and its config."""
    model = jax.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda x: np.float32(rng.normal(size=x.shape) * 0.4), model)
    source = ModelSource(model)
    return {
        tensor.name: np.concatenate([np.asarray(piece) for piece in tensor.pieces])
        for tensor in layout.tensors(source, None)
    }, layout.write_config(source.description)


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        ("paper", {"d_model": 12, "n_heads": 3, "ffn_dim": 7, "embedding_scale": True}),
        ("paper", {"d_model": 8, "n_heads": 1, "ffn": "relu", "ffn_norm": None}),
        ("paper", {"d_model": 8, "n_heads": 2, "post_norm": True, "ffn_norm": None}),
        ("paper", {"d_model": 8, "n_heads": 2, "tie_embeddings": True}),
        (
            "paper",
            {"d_model": 8, "n_heads": 4, "post_norm": True, "deepnorm": True, "ffn_norm": None},
        ),
        ("paper", {"d_model": 20, "n_heads": 2, "embedding_norm": True, "n_layers": 3}),
        ("syncdoth", {"d_model": 6, "n_heads": 3, "value_dim": 15, "ffn_dim": 5, "ffn": "swiglu"}),
        ("syncdoth", {"d_model": 8, "n_heads": 4, "tie_embeddings": True, "decay": "log_spaced"}),
        ("syncdoth", {"d_model": 8, "n_heads": 2, "post_norm": True, "deepnorm": True}),
        ("syncdoth", {"d_model": 8, "n_heads": 1, "ffn": "relu", "ffn_bias": True}),
        (
            "syncdoth",
            {
                "d_model": 12,
                "n_heads": 2,
                "ffn": "gelu",
                "ffn_bias": True,
                "ffn_dim": 12,
                "ffn_norm": "layer",
                "embedding_norm": True,
            },
        ),
        (
            "syncdoth",
            {
                "d_model": 12,
                "n_heads": 2,
                "ffn": "swish",
                "ffn_bias": True,
                "ffn_dim": 12,
                "ffn_norm": "rms",
                "embedding_scale": True,
            },
        ),
        ("torchscale", {"d_model": 6, "n_heads": 3, "value_dim": 9, "ffn_dim": 5, "ffn": "reglu"}),
        ("torchscale", {"d_model": 20, "n_heads": 2, "value_dim": 14, "ffn": "swiglu"}),
        ("torchscale", {"d_model": 8, "n_heads": 1, "embedding_scale": True, "post_norm": True}),
        ("torchscale", {"d_model": 8, "n_heads": 4, "deepnorm": True, "embedding_norm": True}),
        ("torchscale", {"d_model": 12, "n_heads": 2, "tie_embeddings": True, "n_layers": 5}),
        ("fla", {"d_model": 6, "n_heads": 3, "key_dim": 6, "value_dim": 3, "ffn_dim": 7}),
        ("fla", {"d_model": 20, "n_heads": 2, "key_dim": 40, "head_norm_scale": False}),
        ("fla", {"d_model": 16, "n_heads": 1, "tie_embeddings": True, "n_layers": 5}),
    ],
)
def test_other_shapes(preset, sizes, tmp_path):
    rng = np.random.default_rng(0)
    layout = "torchscale" if preset == "paper" else preset
    config = getattr(presets, preset)(**({"vocab_size": 23, "n_layers": 2} | sizes))
    weights, values = random_checkpoint(interop.LAYOUTS[layout], config, rng)
    tokens = rng.integers(0, 23, (2, 19))
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    expected = getattr(reference, layout)(wide, values, tokens)
    save_file(
        {name: np.ascontiguousarray(value) for name, value in weights.items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(values))
    with jax.enable_x64(True):
        model = interop.load(tmp_path, dtype="float64", chunk_size=5)
        for form in ("parallel", "chunkwise"):
            logits, _ = run(model, tokens, form=form)
            assert difference(logits, expected) <= FLOAT64 * max(1, np.abs(expected).max())
