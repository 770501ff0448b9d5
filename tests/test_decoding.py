"""Models for decoding: the same function with fewer bytes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from test_aot import tpus
from tolerances import assert_close

from retnet_jax import ModelConfig, RetNet, Transformer, for_decoding, interop
from retnet_jax.aot.traffic import memory_traffic
from retnet_jax.config import MeshConfig
from retnet_jax.errors import ConfigError
from retnet_jax.generation.decode import Progress, Stream, complete, decode, prefill, row_keys
from retnet_jax.ops.rounding import round_at_random
from retnet_jax.parallel.mesh import make_mesh

__all__ = ["tpus"]  # a fixture

KINDS = (RetNet, Transformer)
SMALL = ModelConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=2)
OTHER = {
    "decay": "powers_of_two",
    "norm": "rms",
    "ffn": "swiglu",
    "ffn_norm": "rms",
    "tie_embeddings": True,
    "mixer_bias": True,
    "ffn_bias": True,
    "embedding_norm": True,
}


@functools.cache
def build(kind, other=False):
    config = dataclasses.replace(SMALL, **(OTHER if other else {}))

    @jax.jit
    def made():
        model = kind(config, rngs=nnx.Rngs(0))
        model.embedding = nnx.Param(25 * model.embedding[...])
        return model

    return made()


def tokens(b, t):
    return jnp.asarray(np.random.default_rng(t).integers(0, 61, (b, t)))


run = jax.jit(lambda model, tokens: model(tokens)[0])


@jax.jit
def token_by_token(model, row):
    def step(state, token):
        logits, state = model(token[:, None], state)
        return state, logits[:, 0]

    _, logits = jax.lax.scan(step, model.init_state(*row.shape), row.T)
    return logits.swapaxes(0, 1)


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_for_decoding_computes_the_same(kind, other):
    model, row = build(kind, other), tokens(2, 9)
    decoder, expected = for_decoding(model), run(model, row)
    assert_close(run(decoder, row), expected)
    assert_close(token_by_token(decoder, row), expected)
    assert for_decoding(decoder) is decoder


@pytest.mark.parametrize("other", [False, True])
def test_int8_weights_are_multiples_of_the_largest_of_their_output_over_127(other):
    model, row = build(RetNet, other), tokens(2, 9)
    rounded = jax.tree.map(lambda x: x, model)

    def nearest(matrix, axis):
        part = np.abs(matrix).max(axis, keepdims=True) / 127
        return nnx.Param(jnp.asarray(np.round(matrix / part) * part))

    for module in (rounded.layers.mixer, rounded.layers.ffn):
        for linear in vars(module).values():
            if hasattr(linear, "kernel"):
                linear.kernel = nearest(np.asarray(linear.kernel[...]), axis=1)
    decoder = for_decoding(model, weights="int8")
    if other:  # tied: the embedding itself is not rounded
        head = nearest(np.asarray(model.embedding[...]), axis=1)[...]
        hidden = jax.jit(lambda model, row: model.hidden(row)[0])(rounded, row)
        assert_close(run(decoder, row), hidden @ head.T)
    else:
        rounded.head = nearest(np.asarray(model.head[...]), axis=1)
        assert_close(run(decoder, row), run(rounded, row))
        assert_close(decoder.head_matrix(), rounded.head_matrix())
    kinds = {str(x.dtype) for x in jax.tree.leaves(decoder) if x.ndim == 2}
    assert kinds == {"int8", "float32"}


def test_rounding_at_random_keeps_the_mean_and_bfloat16_numbers():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 8, 8)), jnp.float32)
    with_seed = jax.jit(lambda seed, x: round_at_random(x, seed[None]))
    rounded = jax.jit(jax.vmap(with_seed, in_axes=(0, None)))(jnp.arange(4000), x)
    rounded, x = np.asarray(rounded, np.float64), np.asarray(x)
    held = x.astype(jnp.bfloat16).astype(np.float32)
    step = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)
    assert (np.abs(rounded - x) < step).all()
    assert (np.abs(rounded.mean(0) - x) < 5 * 0.5 * step / np.sqrt(4000)).all()
    assert (np.asarray(with_seed(0, held)) == held).all()


def test_a_bfloat16_state_decays_by_gamma():
    """1/512 of a number is less than half the distance to the next bfloat16 number."""
    steps, gamma = 1024, 1 - 1 / 512
    first = jnp.asarray(np.random.default_rng(1).uniform(1, 2, (1, 1, 64, 64)), jnp.float32)

    def fade(state, n):
        return round_at_random(gamma * state.astype(jnp.float32), n[None]), None

    last, _ = jax.lax.scan(fade, first.astype(jnp.bfloat16), jnp.arange(steps))
    ratio = float(last.astype(jnp.float32).mean() / first.mean())
    # The errors of 1024 steps, each less than 2^-7, of 4096 numbers; the errors decay as well.
    assert abs(ratio / gamma**steps - 1) < 5 * 2**-7 * np.sqrt(512 / 2 / 4096)


def test_a_bfloat16_state_stays_near_float32():
    row = tokens(4, 200)
    expected = token_by_token(for_decoding(build(RetNet)), row)
    model = for_decoding(build(RetNet), state_dtype="bfloat16")
    state = model.init_state(4, 1)
    assert {x.dtype for x in state.layers} == {jnp.dtype("bfloat16")}
    difference = token_by_token(model, row) - expected
    noise, scale = (np.sqrt(np.square(x).mean()) for x in (difference, expected))
    # Each number of the state has 200 independent errors, of root mean square 2^-8 of it or less.
    assert 0 < noise <= np.sqrt(200) * 2**-8 * scale


@pytest.mark.parametrize("kind", KINDS)
def test_one_program_generates_what_a_stream_does_without_the_host(kind):
    model, prompts, end = for_decoding(build(kind)), [[1, 2, 3], [4]], 5
    pieces = list(Stream(model, prompts, 40, end_id=end))
    expected, log_p = (np.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True))
    progress, keys = prefill(model, prompts, room=64), row_keys(0, 2)
    limit = jnp.int32(40)
    complete.lower(model, progress, keys, limit, room=64, end_id=end).compile()
    with jax.transfer_guard("disallow"):
        found, progress = complete(model, progress, keys, limit, room=64, end_id=end)
    tokens = np.asarray(found.tokens)
    assert (tokens[:, : expected.shape[1]] == expected).all()
    assert (tokens[:, 40:] == end).all()
    assert_close(np.asarray(found.log_probabilities)[:, : log_p.shape[1]], log_p)
    lowered = complete.lower(model, progress, keys, limit, room=64, end_id=end)
    assert not re.search(r"callback|outfeed|infeed|send|recv", lowered.as_text())


def compiled(device, batch_size, weights=None, state_dtype=None, length=8):
    """A program for decoding on a device, and the bytes of its weights and of its state."""
    config = ModelConfig(vocab_size=512, d_model=256, n_layers=3, n_heads=2, dtype="bfloat16")

    def build():
        model = for_decoding(RetNet(config, rngs=nnx.Rngs(0)), weights, state_dtype)
        state = model.init_state(batch_size, 1)
        logits = jnp.zeros((batch_size, config.vocab_size))
        return model, Progress(logits, state, jnp.zeros(batch_size, bool)), row_keys(0, batch_size)

    mesh = make_mesh(MeshConfig(), [device])
    place = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), jax.eval_shape(build)
        )
        program = decode.lower(*arguments, length=length).compile()
    model, progress, _ = arguments

    def size(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    return program, size(model) - size(model.embedding), size(progress.state.layers)


@pytest.mark.parametrize(
    ("weights", "state_dtype"), [(None, None), ("int8", None), (None, "bfloat16")]
)
def test_a_token_reads_weights_once_and_reads_and_writes_the_state_once(tpus, weights, state_dtype):
    program, weights, state = compiled(tpus[0], 1, weights, state_dtype)
    moved = sum(x.bytes for x in memory_traffic(program.as_text())) / 8
    assert moved < 1.05 * (weights + 2 * state)
    assert program.memory_analysis().alias_size_in_bytes >= state


def test_traffic_of_loops_slices_and_updates_in_place():
    def function(table, x):
        def step(table, i):
            row = jax.lax.dynamic_index_in_dim(table, i, 0, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(table, row * x, i, 0), None

        return jax.lax.scan(step, table, jnp.arange(16))[0]

    shapes = jax.ShapeDtypeStruct((16, 4096), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    text = jax.jit(function, donate_argnums=0).lower(*shapes).compile().as_text()
    moved = sum(x.bytes for x in memory_traffic(text))
    table = 4 * 16 * 4096
    assert 2 * table <= moved < 2.01 * table


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (RetNet, {"weights": "int4"}, "weights='int4' is not 'int8'"),
        (RetNet, {"state_dtype": "float16"}, "state_dtype='float16' is not 'float32'"),
        (Transformer, {"state_dtype": "bfloat16"}, "is for a RetNet.* dtype .* float32"),
    ],
)
def test_arguments_that_do_not_fit_are_named(kind, arguments, message):
    with pytest.raises(ConfigError, match=message):
        for_decoding(build(kind), **arguments)


def test_a_model_for_decoding_is_not_converted_twice_saved_or_trained(tmp_path):
    model = for_decoding(build(RetNet), weights="int8")
    with pytest.raises(ConfigError, match="already; give for_decoding the model"):
        for_decoding(model, state_dtype="bfloat16")
    with pytest.raises(ConfigError, match="cannot be saved"):
        interop.save(model, tmp_path / "new", "own")
    with pytest.raises(TypeError, match="int8"):
        jax.grad(lambda model: run(model, tokens(1, 4)).sum())(model)
