"""Both language models: forms, states, documents and precision."""

import dataclasses
import functools
import inspect
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import RELATIVE, assert_close

from retnet_jax import ModelConfig, RetNet, Transformer, for_decoding
from retnet_jax.config.attention import AttentionLayers
from retnet_jax.errors import ConfigError
from retnet_jax.ops.rotation import FLOAT_POSITIONS, rotate, rotation

MODELS = {"retnet": RetNet, "transformer": Transformer}
SMALL = ModelConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=2, chunk_size=4)


@jax.jit
def run(model, tokens, state=None, segment_ids=None):
    """A compiled call of the model: operation by operation the tests would take minutes."""
    return model(tokens, state, segment_ids)


@functools.cache
def make(name, **changes):
    @jax.jit
    def made():
        model = MODELS[name](dataclasses.replace(SMALL, **changes), rngs=nnx.Rngs(0))
        # Larger logits, so that differences are visible.
        model.embedding = nnx.Param(25 * model.embedding[...])
        return model

    return made()


def tokens(b, t, seed=0):
    return np.random.default_rng(seed).integers(0, 61, (b, t), np.int32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {"decay": "powers_of_two", "norm": "rms", "ffn": "swiglu", "tie_embeddings": True},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"key_dim": 16, "value_dim": 48, "remat": "full", "n_layers": 5}, marks=pytest.mark.slow
        ),
        {
            "rotation": "torchscale",
            "norm": "rms",
            "ffn": "reglu",
            "post_norm": True,
            "deepnorm": True,
            "head_norm_scale": True,
            "row_normalizer": False,
        },
        pytest.param(
            {
                "mixer_bias": True,
                "ffn": "swish",
                "ffn_bias": True,
                "ffn_norm": "rms",
                "embedding_scale": True,
                "embedding_norm": True,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_forms_of_the_model_agree_with_gradients(changes):
    model, row = make("retnet", **changes), jnp.asarray(tokens(2, 11))
    segments = jnp.asarray([[0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0], [3] * 11])

    def loss(model, form):
        logits, state = model(row, segment_ids=segments, form=form)
        weight = jnp.sin(jnp.arange(logits.size)).reshape(logits.shape) * (segments > 0)[..., None]
        return (logits * weight).sum() + (state.layers**2).sum()

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected = gradient(model, "parallel")
    assert_close(gradient(model, "chunkwise"), expected)
    assert_close(gradient(model, "recurrent"), expected)


HYBRID = {"attention_layers": (AttentionLayers(layers=(1, 3, 5), n_heads=2),)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("retnet", {}),
        ("transformer", {}),
        pytest.param("retnet", HYBRID, marks=pytest.mark.slow),
    ],
)
def test_layers_that_are_written_out_give_the_same(name, options):
    row = jnp.asarray(tokens(2, 9))

    def loss(model):
        logits, state = model(row)
        return sum((x.astype(jnp.float32) ** 2).sum() for x in jax.tree.leaves((logits, state)))

    found = {}
    for scan_layers in (True, False):
        changes = {"n_layers": 6, "remat": "q,k,v,retention", "scan_layers": scan_layers} | options
        model = make(name, **changes)
        loops = [x for x in jax.make_jaxpr(loss)(model).eqns if x.primitive.name == "scan"]
        assert [x.params["unroll"] == 1 for x in loops] == [scan_layers]
        found[scan_layers] = jax.jit(jax.value_and_grad(loss))(model)
    assert_close(found[False][0], found[True][0])
    leaves = [jax.tree.leaves(gradient) for _, gradient in found.values()]
    assert_close(*leaves)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cuts", [(1, 2, 7), (16,)])
def test_split_anywhere_and_carry_the_state(name, cuts):
    model, row = make(name), tokens(2, 17)
    whole, whole_state = run(model, row)
    state, parts = None, []
    for start, stop in zip((0, *cuts), (*cuts, 17), strict=True):
        if name == "transformer" and state is not None:
            state = state.with_room(stop - start)
        logits, state = run(model, row[:, start:stop], state)
        parts.append(logits)
    assert_close(np.concatenate(parts, axis=1), whole)
    assert_close(state.layers, whole_state.layers)
    assert state.position.tolist() == [17, 17]


@pytest.mark.parametrize("name", MODELS)
def test_one_token_steps_in_preallocated_state(name):
    model, row = make(name), tokens(2, 9)
    step = jax.jit(lambda token, state: model(token, state, form="recurrent"))
    state, parts = model.init_state(2, capacity=9), []
    for n in range(9):
        logits, state = step(row[:, n : n + 1], state)
        parts.append(logits)
    assert_close(np.concatenate(parts, axis=1), run(model, row)[0])
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", ["retnet", pytest.param("transformer", marks=pytest.mark.slow)])
def test_packed_documents_equal_separate_ones(name):
    model, row = make(name), tokens(1, 15)
    segments = jnp.asarray([[0, 0, 4, 4, 4, 4, 4, 7, 7, 7, 1, 1, 1, 1, 0]])

    spans = ((2, 7), (7, 10), (10, 14))

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def packed(model):
        logits, state = model(jnp.asarray(row), None, segments)
        return (logits**2 * (segments > 0)[..., None]).sum(), (logits, state)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def separate(model):
        logits = [model(jnp.asarray(row[:, slice(*span)]))[0] for span in spans]
        return sum((x**2).sum() for x in logits), logits

    gradient, (logits, state) = packed(model)
    expected_gradient, expected_logits = separate(model)
    assert_close([np.asarray(logits)[:, slice(*span)] for span in spans], expected_logits)
    assert_close(gradient, expected_gradient)
    # The state is that of the last document.
    more = tokens(1, 3, seed=1)
    if name == "transformer":
        state = state.with_room(3)
    continued, _ = run(model, more, state)
    last, _ = run(model, np.concatenate([row[:, 10:14], more], axis=1))
    assert_close(continued, np.asarray(last)[:, 4:])


@pytest.mark.parametrize("name", MODELS)
def test_rows_padded_on_the_left_continue_like_unpadded_ones(name):
    model = make(name)
    long, short, more = tokens(1, 6), tokens(1, 4, seed=2), tokens(2, 3, seed=3)
    padded = np.concatenate([long, np.pad(short, ((0, 0), (2, 0)))], axis=0)
    segments = jnp.asarray([[1] * 6, [0, 0, 1, 1, 1, 1]])
    _, state = run(model, padded, model.init_state(2, capacity=9), segments)
    logits, _ = run(model, more, state)
    for row, prompt in enumerate((long, short)):
        expected, _ = run(model, np.concatenate([prompt, more[row : row + 1]], axis=1))
        assert_close(np.asarray(logits)[row], np.asarray(expected)[0, -3:])


@pytest.mark.parametrize("name", MODELS)
def test_no_logit_depends_on_a_later_token(name):
    model, row = make(name), jnp.asarray(tokens(1, 8))

    @jax.jit
    @jax.grad
    def gradient(model, n):
        return model(row)[0][0, n].sum()

    for n in (0, 3, 6):
        embedding = np.asarray(gradient(model, n).embedding[...])
        reached = set(np.nonzero(np.abs(embedding).sum(1))[0].tolist())
        assert reached == set(row[0, : n + 1].tolist())


@pytest.mark.parametrize("name", MODELS)
def test_without_rotation_and_decay_the_order_of_earlier_tokens_does_not_matter(name):
    decay = "none" if name == "retnet" else SMALL.decay
    model = make(name, rotation="none", decay=decay, n_layers=1)
    row = np.concatenate([tokens(1, 12), tokens(1, 12)[:, ::-1]])
    last = np.full((2, 1), 7, np.int32)
    logits, _ = run(model, np.concatenate([row, last], axis=1))
    assert_close(logits[0, -1], logits[1, -1])
    assert np.abs(logits[0, 3] - logits[1, 3]).max() > 0.1
    stepped, _ = run(model, last, run(model, row, model.init_state(2, capacity=13))[1])
    assert_close(stepped, logits[:, -1:])


@pytest.mark.parametrize("rotation", ["rope", "none"])
def test_full_cache_is_nan_inside_jit(rotation):
    model, row = make("transformer", rotation=rotation), tokens(1, 4)
    _, state = run(model, row)
    inside, _ = run(model, row[:, :1], state)
    assert np.isnan(inside).all()


@pytest.mark.compiles(90, reason="a model outside of jit; 78 where no test ran before")
def test_full_cache_grows_outside_of_jit():
    model, row = make("transformer", rotation="none", norm="rms"), tokens(1, 4)
    _, state = run(model, row)
    outside, _ = model(jnp.asarray(row[:, :1]), state)
    again = np.concatenate([row, row[:, :1]], axis=1)
    assert_close(outside, np.asarray(run(model, again)[0])[:, -1:])


@pytest.mark.parametrize("convention", ["rope", "torchscale"])
def test_rotated_products_depend_only_on_the_distance(convention):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def product(m, n):
        turns = [rotation(jnp.asarray([[position]]), 8, convention) for position in (m, n)]
        return (rotate(q, turns[0], convention) * rotate(k, turns[1], convention)).sum()

    assert_close(product(3, 1), product(12, 10))
    assert_close(product(5, 5), (q * k).sum())
    assert abs(float(product(3, 1) - product(3, 2))) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_activations_stay_near_float32(name):
    row = tokens(2, 24)
    logits = np.asarray(run(make(name), row)[0])
    half, state = run(make(name, dtype="bfloat16"), row)
    assert half.dtype == jnp.float32
    # Rounding errors of many layers add like noise, so the bound is on their root mean square.
    noise, scale = (np.sqrt(np.square(x).mean()) for x in (half - logits, logits))
    assert noise <= RELATIVE["bfloat16"] * scale
    if name == "retnet":
        assert state.layers.dtype == jnp.float32


def test_classes_set_their_mixer_and_check_the_config():
    assert Transformer(SMALL, rngs=nnx.Rngs(0)).config.mixer == "attention"
    assert SMALL.mixer == "retention"
    with pytest.raises(ConfigError, match="n_heads=3"):
        RetNet(dataclasses.replace(SMALL, n_heads=3), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("convention", ["rope", "torchscale"])
def test_angles_are_exact_at_any_position(convention):
    """Compared with exact fractions; below `FLOAT_POSITIONS` within the documented bound."""
    places = [0, 1, 300, FLOAT_POSITIONS - 1, FLOAT_POSITIONS, 10**6, 2**24 + 1, 10**9, 2**31 - 1]
    turn = jax.jit(lambda x: rotation(x, 32, convention))(np.array([places], np.int32))
    exponents = np.arange(16) / 16 if convention == "rope" else np.linspace(0, 1, 16)
    whole = Fraction("6.283185307179586476925286766559")
    for place, cos, sin in zip(places, *(np.asarray(x)[0] for x in turn), strict=True):
        angle = [float(Fraction(float(f)) * place % whole) for f in 10_000.0**-exponents]
        if convention == "rope":
            cos, sin = cos[:16], sin[16:]
        else:
            cos, sin = cos[::2], sin[1::2]
        error = np.abs([cos - np.cos(angle), sin - np.sin(angle)]).max()
        assert error < (1.2e-7 * place + 1e-7 if place < FLOAT_POSITIONS else 3e-7)


def test_angles_do_not_depend_on_the_bound_of_positions():
    """A text that is read in parts, without the bound, is rotated like a whole one with it."""
    places = np.arange(FLOAT_POSITIONS - 40, FLOAT_POSITIONS, dtype=np.int32)[None]
    known = jax.jit(lambda x: rotation(x, 32, "rope", longest=FLOAT_POSITIONS))(places)
    unknown = jax.jit(lambda x: rotation(x, 32, "rope"))(places)
    assert_close(known, unknown)


def test_products_depend_on_the_distance_at_the_last_positions():
    q, k = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 4, 1, 32)), jnp.float32)

    @jax.jit
    def product(start):
        turn = rotation(start + jnp.arange(4, dtype=jnp.int32)[None], 32, "rope")
        return (rotate(q, turn, "rope")[:, 1:] * rotate(k, turn, "rope")[:, :-1]).sum(-1)

    assert_close(product(np.int32(2**31 - 5)), product(np.int32(0)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("option", "value", "usual"),
    [
        ("jax_numpy_rank_promotion", "raise", "allow"),
        ("jax_numpy_dtype_promotion", "strict", "standard"),
    ],
)
def test_models_obey_jaxs_strictest_settings(name, option, value, usual):
    changes = {"norm": "rms", "head_norm_scale": True, "mixer_bias": True, "ffn_bias": True}
    models = [make(name), make(name, ffn_norm="layer", ffn="swiglu", **changes)]
    if name == "retnet":  # jax's own attention does not obey them in bfloat16
        models.append(make(name, dtype="bfloat16"))

    def loss(model, ids, segment_ids):
        logits, state = model(ids, None, segment_ids)
        return logits.mean() + model(ids[:, :1], state, form="recurrent")[0].mean()

    jax.config.update(option, value)
    try:
        for model in models:
            ids = jnp.asarray(tokens(2, 9))
            jax.eval_shape(jax.grad(loss), model, ids, jnp.ones_like(ids))
    finally:
        jax.config.update(option, usual)


@pytest.mark.parametrize("name", MODELS)
def test_states_that_do_not_fit_are_named(name):
    model = make(name)
    ids = jnp.asarray(tokens(2, 3))
    call = inspect.unwrap(type(model).hidden)  # without the tests' check of annotations
    other = make({"retnet": "transformer", "transformer": "retnet"}[name])
    with pytest.raises(ValueError, match=r"state has 3 rows for a batch of 2; `state.take`"):
        call(model, ids, jax.eval_shape(lambda: model.init_state(3, 8)))
    with pytest.raises(ValueError, match=r"state is a .*; this model's is a"):
        call(model, ids, jax.eval_shape(lambda: other.init_state(2, 8)))
    decoding = jax.eval_shape(lambda: for_decoding(model).init_state(2, 8))
    with pytest.raises(ValueError, match="state is of a model for decoding"):
        call(model, ids, decoding)
    deeper = make(name, n_layers=SMALL.n_layers + 1)
    with pytest.raises(ValueError, match=r"state\.layers.* is \[3, 2, .*; this model's is \[2, 2,"):
        call(model, ids, jax.eval_shape(lambda: deeper.init_state(2, 8)))
    with pytest.raises(ValueError, match="state has 3 layers; this model has 2"):
        for_decoding(model)(ids, for_decoding(deeper).init_state(2, 8))
    one_head = make(name, n_heads=1)
    with pytest.raises(ValueError, match=r"state\.layers\[0\].* is \[2, 1, .* is \[2, 2,"):
        for_decoding(model)(ids, for_decoding(one_head).init_state(2, 8))
    with pytest.raises(ValueError, match=r"tokens are float32\[2, 3\]; they must be integers"):
        call(model, ids.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"tokens are int32\[3\]"):
        call(model, ids[0])
    with pytest.raises(ValueError, match=r"segment_ids \(2, 2\) do not fit tokens \(2, 3\)"):
        call(model, ids, None, ids[:, :2])


@pytest.mark.parametrize("name", MODELS)
def test_a_mixer_names_its_implementation(name):
    said = MODELS[name].mixer_type.implementation(SMALL, (2, 256))
    assert said.endswith("there is no kernel for 'cpu'")
