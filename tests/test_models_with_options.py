"""Models with the mixer's options where states are used: decoding, scoring, training, files."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_evaluation_scoring import assert_same, by_definition, requests_of_a_task
from test_text_generation import BYTES, written
from test_train_step import CONFIG, MESHES, batch, losses_of, run_on, variant
from tolerances import assert_close

from retnet_jax import ModelConfig, RetNet, Transformer, for_decoding, generate, interop
from retnet_jax.aot.flops import flops_of
from retnet_jax.config import DataConfig, MeshConfig, OptimizerConfig
from retnet_jax.config.attention import AttentionLayers
from retnet_jax.config.model import FEATURE_MAPS, MIXER_OPTIONS
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.evaluation.perplexity import stateful_nll
from retnet_jax.evaluation.prefix_trie import PrefixTrie
from retnet_jax.evaluation.scoring import score
from retnet_jax.generation import saved_state
from retnet_jax.generation.decode import prefill
from retnet_jax.generation.saved_state import load_reading, save_reading
from retnet_jax.model import build_model
from retnet_jax.model.mixer import ConvolvedState
from retnet_jax.model.parameters import parameter_shapes
from retnet_jax.ops import feature_map
from retnet_jax.training.optim import is_matrix, make_optimizer
from retnet_jax.training.step import gradient_sums, initial_state, train_step
from retnet_jax.trees import named_leaves

EVERY = {"short_conv": 4, "n_kv_heads": 1, "feature_map": "prelu", "output_gate": False}
EVERY |= {"qk_norm": True, "head_norm": False}
ALL = EVERY | {"head_norm_epsilon": 0.1}  # which needs the norm that EVERY leaves out
SMALL = ModelConfig(vocab_size=264, d_model=16, n_layers=2, n_heads=2, chunk_size=8, **EVERY)


@functools.cache
def build(vocab_size=264, dtype="float32", n_layers=2):
    config = dataclasses.replace(SMALL, n_layers=n_layers, vocab_size=vocab_size, dtype=dtype)

    @jax.jit
    def made():
        model = RetNet(config, rngs=nnx.Rngs(0))
        # Larger parameters; otherwise the predictions of an untrained model are close to uniform.
        model.embedding = nnx.Param(model.embedding[...] * 50)
        model.head = nnx.Param(model.head[...] * 50)
        return model

    return made()


@functools.partial(jax.jit, static_argnames="form")
def run(model, tokens, state=None, form="chunkwise"):
    return model(tokens, state, form=form)


def some_tokens(rows, length, vocab_size=264):
    return np.random.default_rng(0).integers(0, vocab_size, (rows, length), np.int32)


def one_by_one(model, tokens):
    """Logits of a model for decoding that reads one token at a time."""

    @jax.jit
    def read(model, tokens):
        def step(state, token):
            logits, state = model(token[:, None], state)
            return state, logits[:, 0]

        return jax.lax.scan(step, model.init_state(len(tokens), 0), tokens.T)

    state, logits = read(model, tokens)
    return logits.swapaxes(0, 1), state


@pytest.mark.parametrize(
    "options",
    [
        {"short_conv": 3},
        {"n_kv_heads": 2, "mixer_bias": True},
        {"feature_map": "xielu", "output_gate": False, "mixer_bias": True},
        EVERY,
        ALL
        | {"head_norm": True}
        | {"norm": "rms", "head_norm_scale": True, "tie_embeddings": True},
    ],
    ids=str,
)
def test_parameters_are_counted_and_the_twin_has_as_many(options):
    config = ModelConfig(vocab_size=99, d_model=64, n_layers=2, n_heads=4, **options)
    twin = config.transformer_twin()
    for one in (config, twin):
        one.check()
        assert sum(map(np.prod, parameter_shapes(one).values())) == one.parameter_count()
    default = ModelConfig()
    dropped = MIXER_OPTIONS.keys() - {"qk_norm"}
    assert all(getattr(twin, name) == getattr(default, name) for name in dropped)
    assert twin.qk_norm == config.qk_norm
    assert twin.parameter_count() == pytest.approx(config.parameter_count(), rel=0.01)


def test_flops_of_the_options_are_those_of_their_products():
    """The count of matrix products has no convolution: its 6 FLOPs a weight are the formula's."""
    plain = ModelConfig(vocab_size=64, d_model=32, n_layers=1, n_heads=4)
    tokens = jnp.zeros((1, 32), int)

    def counted(config):
        model = jax.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))
        loss = lambda model: (model(tokens, form="parallel")[0] ** 2).sum()  # noqa: E731
        return flops_of(jax.grad(loss), model) / tokens.size

    fewer = dataclasses.replace(plain, n_kv_heads=1, output_gate=False)
    saved = plain.training_flops_per_token(32) - fewer.training_flops_per_token(32)
    assert saved == pytest.approx(counted(plain) - counted(fewer), rel=1e-6)
    convolved = dataclasses.replace(fewer, short_conv=3)
    added = convolved.training_flops_per_token(32) - fewer.training_flops_per_token(32)
    assert added == 6 * 3 * (32 + 8 + 16)  # q, k and v


def test_names_of_feature_maps_are_those_of_the_functions():
    assert {*FEATURE_MAPS} == {*feature_map.FEATURE_MAPS, *feature_map.LEARNED}
    assert len(FEATURE_MAPS) == len({*FEATURE_MAPS})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_conv": 1}, "model.short_conv=1 is less than 2"),
        ({"short_conv": 2.5}, "model.short_conv=2.5 is not of type"),
        ({"n_kv_heads": 0}, "model.n_kv_heads=0 is less than 1"),
        ({"n_kv_heads": 3}, "model.n_kv_heads=3 does not divide model.n_heads=4"),
        ({"feature_map": "elu"}, "model.feature_map='elu' is not one of 'linear', 'relu'"),
        ({"output_gate": 0}, "model.output_gate=0 is not of type bool"),
        ({"decay": "linear"}, "model.decay='linear' is not one of 'log_spaced', .*, 'none'"),
        ({"init": "xavier"}, "model.init='xavier' is not one of 'scaled', 'zero_outputs', "),
        ({"init": "deepnet", "mixer": "examples.mine:Mixer"}, "model.init='deepnet' is for model"),
        (
            {"head_norm": False, "head_norm_scale": True, "norm": "rms"},
            "model.head_norm_scale=True needs the norm that model.head_norm=False leaves out",
        ),
        (
            {"head_norm": False, "head_norm_epsilon": 0.1},
            "model.head_norm_epsilon=0.1 needs the norm that model.head_norm=False leaves out",
        ),
        (
            {"qk_norm": True, "attention_layers": (AttentionLayers(layers=(0,), n_heads=4),)}
            | {"n_layers": 1},
            "model.qk_norm=True is for layers with retention, but all layers are in",
        ),
        *(
            (
                {name: ALL[name], "mixer": mixer},
                rf"model.{name}={ALL[name]!r} is for model.mixer=.*, not '{mixer}': leave it out",
            )
            for name, mixers in MIXER_OPTIONS.items()
            for mixer in ("attention", "examples.mine:Mixer")
            if name in ALL and mixer not in mixers
        ),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(ModelConfig(), **options).check()


def test_a_transformer_does_not_drop_options_silently():
    with pytest.raises(
        ConfigError, match=r"model.feature_map='prelu' is for model.mixer='retention'"
    ):
        jax.eval_shape(lambda: Transformer(SMALL, rngs=nnx.Rngs(0)))


def test_states_of_other_convolutions_are_refused():
    tokens = some_tokens(2, 3)
    states = {
        width: jax.eval_shape(
            lambda width=width: RetNet(
                dataclasses.replace(SMALL, short_conv=width), rngs=nnx.Rngs(0)
            ).init_state(2, 0)
        )
        for width in (None, 2)
    }
    for width, state in states.items():
        with pytest.raises(ValueError, match=f"of a model with short_conv={width}; this .*=4"):
            jax.eval_shape(run, build(), tokens, state)
    plain = dataclasses.replace(SMALL, short_conv=None)
    plain = jax.eval_shape(lambda: RetNet(plain, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"short_conv=2; this model has short_conv=None"):
        jax.eval_shape(run, plain, tokens, states[2])


def test_decoding_reads_what_training_reads():
    tokens = some_tokens(2, 20)
    whole, last = run(build(), tokens)
    logits, state = one_by_one(for_decoding(build()), tokens)
    assert_close(logits, whole)
    for layer, stored in enumerate(state.layers):
        expected = jax.tree.map(lambda x: x[layer], last.layers)  # noqa: B023
        assert_close(stored, expected)


def test_decoding_in_int8():
    tokens, decoder = some_tokens(2, 20), for_decoding(build(), weights="int8")
    mixer = decoder.layers[0].mixer
    assert mixer.joined.weight.dtype == jnp.int8
    assert mixer.joined.weight.shape == (16 + 8 + 16, 16)  # q, k and v, without a gate
    assert mixer.v_conv.weight.dtype == jnp.float32
    logits, _ = one_by_one(decoder, tokens)
    assert_close(logits, run(decoder, tokens)[0])
    whole = np.asarray(run(build(), tokens)[0])
    assert 0 < np.abs(logits - whole).std() < 0.05 * whole.std()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_matrix_of_a_state_is_rounded(dtype):
    tokens = some_tokens(2, 20)
    decoder = for_decoding(build(dtype=dtype), state_dtype="bfloat16")
    logits, state = one_by_one(decoder, tokens)
    for layer in (*state.layers, *decoder.init_state(2, 0).layers):
        assert isinstance(layer, ConvolvedState)
        assert [str(x.dtype) for x in layer] == ["bfloat16", dtype, dtype, dtype]
    whole = np.asarray(run(build(), tokens)[0])
    assert 0 < np.abs(logits - whole).std() < 0.05 * whole.std()


def test_generated_tokens_are_the_most_probable_after_prompts_of_any_length():
    prompts = [list(range(1, 1 + n)) for n in (1, 3, 19, 30)]
    for prompt, row in zip(prompts, generate(build(), prompts, 9), strict=True):
        line = np.zeros((1, 40), np.int32)
        line[0, : len(prompt) + 9] = prompt + row.tokens
        logits = np.asarray(run(build(), line, form="parallel")[0])[0]
        assert row.tokens == logits[len(prompt) - 1 : len(prompt) + 8].argmax(-1).tolist()


def test_prompts_longer_than_a_piece(monkeypatch):
    monkeypatch.setattr("retnet_jax.generation.decode.LONGEST_PIECE", 16)
    model, tokens = for_decoding(build()), some_tokens(1, 40)[0]
    progress = prefill(model, [tokens, tokens[:5]], 4)
    for row, prompt in enumerate((tokens, tokens[:5])):
        line = np.zeros((1, 40), np.int32)
        line[0, : len(prompt)] = prompt
        expected = run(build(), line, form="parallel")[0][0, len(prompt) - 1]
        assert_close(progress.logits[row], expected)


@pytest.mark.compiles(110, reason="samplers and progress are prepared outside of jit")
def test_a_saved_state_is_continued(tmp_path):
    model, path = for_decoding(build(), state_dtype="bfloat16"), tmp_path / "text.state"
    whole = written(model, BYTES, ["Grüße, "], 30).continuations[0]
    first = written(model, BYTES, ["Grüße, "], 13, tokens_at_once=1)
    save_reading(path, first.reading, model, BYTES)
    after = load_reading(path, model, BYTES)
    for found, expected in zip(
        jax.tree.leaves(after.progress), jax.tree.leaves(first.reading.progress), strict=True
    ):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    rest = written(model, BYTES, [""], 17, after=after).continuations[0]
    assert first.continuations[0].tokens + rest.tokens == whole.tokens
    content = path.read_bytes()
    name = content.index(b"state/layers/0/k")
    begin = int(re.search(rb'"data_offsets":\[(\d+)', content[name:])[1])
    place = 8 + int.from_bytes(content[:8], "little") + begin
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(CheckpointError, match="damaged: its contents have changed"):
        load_reading(path, model, BYTES)


def test_options_of_training_are_no_part_of_a_saved_states_model():
    trained = dataclasses.replace(SMALL, init="deepnet", dropout=0.1, activation_dropout=0.1)
    assert saved_state._description(trained) == saved_state._description(SMALL)
    other = dataclasses.replace(SMALL, qk_norm=False)
    assert saved_state._description(other) != saved_state._description(SMALL)


@pytest.mark.slow
def test_scores_of_a_trie_equal_those_of_separate_requests():
    rng = np.random.default_rng(0)
    model, requests = (
        build(24, n_layers=1),
        requests_of_a_task(rng, questions=3, choices=2, prompt=9),
    )
    assert_same(score(model, requests, batch_size=2), by_definition(model, requests))
    assert len(list(PrefixTrie(requests).nodes())) > 4  # states are kept, in several batches


def test_stateful_perplexity_equals_one_pass():
    documents = [some_tokens(1, n, 24)[0] for n in (40, 9, 3)]
    found = stateful_nll(build(24, n_layers=1), documents, batch_size=2, piece_length=8)
    for document, nll in zip(documents, found, strict=True):
        line = np.zeros((1, 40), np.int32)
        line[0, : len(document)] = document
        log_p = np.asarray(jax.nn.log_softmax(run(build(24, n_layers=1), line)[0]))[0]
        assert_close(nll, -log_p[np.arange(len(document) - 1), document[1:]])


# n_kv_heads: more than the axis "tensor" divides, in the last mesh fewer.
TRAINED = {"n_layers": 1, "short_conv": 3, "feature_map": "xielu", "output_gate": False}
TRAINED |= {"qk_norm": True, "head_norm": False, "decay": "none"}
TRAINED_ON = [(4, mesh) for mesh in MESHES]
TRAINED_ON += [(1, {"tensor": 8}), (1, {"seq": 2, "tensor": 4})]


@functools.cache
def on_one_device(heads):
    config = variant(n_kv_heads=heads, **TRAINED)
    with jax.enable_x64(True):
        return run_on(MeshConfig(), config, jax.devices()[:1])


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "mesh"), TRAINED_ON, ids=str)
def test_eight_devices_compute_what_one_does(heads, mesh):
    config = variant(n_kv_heads=heads, **TRAINED)
    one, losses = on_one_device(heads)
    with jax.enable_x64(True):
        eight, losses_of_eight = run_on(MeshConfig(**({"data": 1} | mesh)), config)
    assert_close(losses_of_eight, losses)
    assert_close(eight, one)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"tensor": 8}, {"seq": 2, "tensor": 4}, {"fsdp": 8}], ids=str)
def test_eight_devices_norm_queries_and_keys_as_one_does(mesh):
    config = variant("attention", qk_norm=True, window=5, n_layers=1)
    with jax.enable_x64(True):
        one, losses = run_on(MeshConfig(), config, jax.devices()[:1])
        eight, losses_of_eight = run_on(MeshConfig(**({"data": 1} | mesh)), config)
    assert_close(losses_of_eight, losses)
    assert_close(eight, one)


def test_own_checkpoints_have_the_options(tmp_path):
    config = dataclasses.replace(SMALL, decay="none", init="zero_outputs")
    model = jax.jit(lambda: RetNet(config, rngs=nnx.Rngs(0)))()
    interop.save(model, tmp_path / "own", "own")
    found = interop.load(tmp_path / "own")
    assert found.config == config
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not found.layers.mixer.out.kernel[...].any()


def trained_with(**options):
    return dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, **(EVERY | options)),
        data=DataConfig(windows="contiguous"),
        train=dataclasses.replace(CONFIG.train, carry_state=True),
    )


@pytest.mark.slow
def test_micro_batches_carry_the_state_of_their_rows():
    @jax.jit
    def sums(windows):
        state = initial_state(trained_with(n_layers=1, feature_map="gelu"))
        model = state.model
        model.embedding = nnx.Param(50 * model.embedding[...])
        carry = jax.tree.map(lambda x: x + jnp.arange(x.size).reshape(x.shape) % 7, state.carry)
        carry = jax.tree.map(lambda x, old: x.astype(old.dtype), carry, state.carry)
        return [gradient_sums(model, windows, parts, carry) for parts in (1, 4)]

    expected, found = jax.device_get(sums(batch(1)))
    assert isinstance(found[1].carry.layers, ConvolvedState)
    assert_close(found, expected)


def test_a_step_keeps_the_dtypes_of_a_state():
    """The inputs of convolutions stay in the activations' dtype."""
    config = trained_with(dtype="bfloat16")
    before = jax.eval_shape(lambda: initial_state(config))
    after, _ = jax.eval_shape(functools.partial(train_step, config), before, batch(0))
    assert after.carry.layers.v.dtype == jnp.bfloat16
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after.carry) == jax.tree.map(
        lambda x: (x.shape, x.dtype), before.carry
    )


@pytest.mark.slow
def test_eight_devices_carry_what_one_does():
    config = trained_with()
    config.check()
    one = losses_of(config, MeshConfig(), jax.devices()[:1])
    for mesh in (MeshConfig(data=2, seq=2, tensor=2), MeshConfig(fsdp=4, seq=2)):
        assert_close(losses_of(config, mesh, jax.devices()), one)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots", "q,k,v,up", "offload:q,k,v,up"])
def test_rematerialisation_does_not_change_the_losses(remat):
    mesh = MeshConfig(data=2, seq=4)
    model = dataclasses.replace(CONFIG.model, n_layers=5, **EVERY)
    kept = dataclasses.replace(CONFIG, model=dataclasses.replace(model, remat=remat))
    _, expected = run_on(mesh, dataclasses.replace(CONFIG, model=model), steps=2)
    _, found = run_on(mesh, kept, steps=2)
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("option", "value", "usual"),
    [
        ("jax_numpy_rank_promotion", "raise", "allow"),
        ("jax_numpy_dtype_promotion", "strict", "standard"),
    ],
)
def test_models_obey_jaxs_strictest_settings(option, value, usual):
    config = dataclasses.replace(SMALL, n_layers=1, feature_map="xielu", dtype="bfloat16")
    ids = jax.ShapeDtypeStruct((2, 9), "int32")

    def loss(model, ids, segment_ids):
        logits, state = model(ids, None, segment_ids)
        return logits.mean() + model(ids[:, :1], state, form="recurrent")[0].mean()

    model = jax.eval_shape(lambda: RetNet(config, rngs=nnx.Rngs(0)))
    jax.config.update(option, value)
    try:
        jax.eval_shape(jax.grad(loss), model, ids, ids)
    finally:
        jax.config.update(option, usual)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_parameters_of_feature_maps_do_not_decay(name):
    decayed = named_leaves(is_matrix(jax.eval_shape(lambda: RetNet(SMALL, rngs=nnx.Rngs(0)))))
    assert {x for x in decayed if "mixer/" in x and not decayed[x]} == {
        *("layers/mixer/feature_map/weight", "layers/mixer/q_norm/scale"),
        "layers/mixer/k_norm/scale",
    }
    optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=0.5, warmup_steps=0), 4)

    @jax.jit
    def update():
        model = RetNet(SMALL, rngs=nnx.Rngs(0))
        zeros = jax.tree.map(jnp.zeros_like, model)
        return optimizer.update(zeros, optimizer.init(model), model)[0]

    updates = named_leaves(jax.device_get(update()))
    assert not updates["layers/mixer/feature_map/weight"].any()
    assert updates["layers/mixer/q_conv/weight"].any() == (name == "adamw")
