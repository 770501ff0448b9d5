"""Dropout: rates, independent masks, and the same masks on any mesh and in any micro-batch."""

import dataclasses
import inspect
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_hybrids import WINDOWED
from test_sequence_parallel import collectives
from test_train_step import CONFIG, MESHES, batch, on_one_device, run_on, variant
from tolerances import assert_close
from training_runs import assert_same_losses, at_step, metrics

from retnet_jax.config import DataConfig, MeshConfig, ModelConfig
from retnet_jax.errors import ConfigError
from retnet_jax.model import build_model, for_decoding
from retnet_jax.model.layers import ACTIVATIONS, Linear
from retnet_jax.model.mixer import Mixer
from retnet_jax.ops.dropout import dropout, place_keys, row_keys
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.training.held_out_loss import first_rows_loss
from retnet_jax.training.loop import train
from retnet_jax.training.step import (
    abstract_batch,
    abstract_state,
    gradient_sums,
    initial_state,
    loss_sum,
    make_step,
    train_step,
)

RATES = {"dropout": 0.2, "activation_dropout": 0.3}
DROPPED = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **RATES))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rate_and_scale(dtype):
    """The number of zeros is within 5 standard deviations; the others are exact."""
    x = np.random.default_rng(0).normal(size=(16, 64, 128)).astype(np.float32)

    @jax.jit
    def each(x):
        keys = row_keys(0, 0, jnp.arange(16))
        return [dropout(x, keys, rate, "btd") for rate in (0.1, 0.5, 0.9)]

    x = np.asarray(x, jnp.dtype(dtype))
    for rate, y in zip((0.1, 0.5, 0.9), each(x), strict=True):
        assert y.dtype == x.dtype
        y, n = np.asarray(y, np.float32), x.size
        kept = y != 0
        assert abs((~kept).sum() - n * rate) < 5 * (n * rate * (1 - rate)) ** 0.5
        scaled = np.asarray(x.astype(np.float32) * np.float32(1 / (1 - rate)), x.dtype)
        np.testing.assert_array_equal(y[kept], scaled[kept].astype(np.float32))


def test_masks_are_independent():
    """Of seeds, steps, rows, layers and places: no two masks are correlated."""
    n = 4096

    @jax.jit
    @jax.vmap
    def masks(step):
        seeds = [place_keys(row_keys(seed, step, jnp.arange(3)), n_layers=2) for seed in (0, 1)]
        keys = jnp.stack(
            [jnp.stack([x, *layers.mixer, *layers.inner, *layers.ffn]) for x, layers in seeds]
        )
        return dropout(jnp.ones((keys.size, n)), keys.reshape(-1), 0.5, "bd")

    signs = np.asarray(masks(np.arange(2))).reshape(-1, n) - 1  # 1 or -1
    assert len(signs) == 2 * 2 * 7 * 3  # steps, seeds, places, rows
    products = signs @ signs.T / n
    # Products have a standard deviation of n^-1/2; one in 1.7 million is above 5 of them.
    assert np.abs(products - np.eye(len(signs))).max() < 5 * n**-0.5
    # Neither are neighbours in one mask.
    assert abs((signs[:, 1:] * signs[:, :-1]).mean()) < 5 * signs.size**-0.5


def test_the_mask_of_a_row_is_its_own():
    """It depends on no other row, nor on the number of rows."""
    x = np.ones((8, 6, 10), np.float32)

    @jax.jit
    def of(x, rows):
        return dropout(x, row_keys(3, 5, rows), 0.5, "btd")

    whole = np.asarray(of(x, np.arange(8)))
    np.testing.assert_array_equal(of(x[:2], np.array([5, 2])), whole[[5, 2]])


@pytest.mark.parametrize(
    "mesh",
    [MESHES[-1], *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[:-1])],
    ids=str,
)
def test_devices_draw_the_mask_of_one(mesh):
    """Bit for bit, and each device draws only its own part."""
    x = np.ones((8, 16, 32), np.float32)

    def of(x):
        return dropout(x, row_keys(0, jnp.int32(7), jnp.arange(8)), 0.3, "btf")

    expected = jax.jit(of)(x)
    with jax.set_mesh(make_mesh(MeshConfig(**({"data": 1} | mesh)))):
        program = jax.jit(of).lower(x).compile()
    np.testing.assert_array_equal(program(x), expected)
    assert collectives(program.as_text()) == []
    assert largest(program.as_text(), "u32") == x.size // 8


def largest(text, dtype):
    """The number of elements of a program's largest array of a dtype."""
    shapes = re.findall(rf"\b{dtype}\[([\d,]+)\]", text)
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


class Halves(Mixer):
    """A mixer that mixes nothing."""

    def __init__(self, config, *, rngs, value_scale, out_scale):
        self.out = Linear(config.d_model, config.d_model, rngs=rngs)

    def __call__(self, x, state, context, form):
        return self.out(x) / 2, state


SIZES = {"vocab_size": 48, "d_model": 16, "n_layers": 2, "n_heads": 2, **RATES}
HYBRID = dataclasses.replace(WINDOWED, layers=(1, 3))
MODELS = {
    "retnet": ModelConfig(ffn="swiglu", **SIZES),
    "transformer": ModelConfig(mixer="attention", **SIZES),
    "hybrid": ModelConfig(attention_layers=(HYBRID,), **(SIZES | {"n_layers": 4})),
    "own": ModelConfig(mixer="test_dropout:Halves", **SIZES),
    "torchscale": ModelConfig(
        ffn_norm="layer", post_norm=True, embedding_norm=True, deepnorm=True, **SIZES
    ),
}


def layer_of(model, states, context, i):
    """Block, state and context of a layer, without the stacks of a trained model."""
    period = model.config.layer_period
    if not model.config.attention_layers:
        return *jax.tree.map(lambda x: x[i], (model.layers, states)), context
    block = jax.tree.map(lambda x: x[i // period], model.layers[i % period])
    return block, None, context.of(i)


def by_hand(model, tokens, keys):
    """`model.hidden`, layer after layer, with what is dropped written out."""
    config = model.config
    context, states = model.mixer_type.prepare(config, None, tokens.shape, None)
    scale = (2 * config.n_layers) ** 0.25 if config.deepnorm else 1
    before = lambda norm, x: x if config.post_norm else norm(x)  # noqa: E731
    after = lambda norm, x: norm(x) if config.post_norm else x  # noqa: E731
    embedding_keys, keys = place_keys(keys, config.n_layers)
    x = dropout(model._embed(tokens), embedding_keys, 0.2, "btd")
    for i in range(config.n_layers):
        block, state, of_layer = layer_of(model, states, context, i)
        y, _ = block.mixer(before(block.mixer_norm, x), state, of_layer, "chunkwise")
        x = after(block.mixer_norm, scale * x + dropout(y, keys.mixer[i], 0.2, "btd"))
        y = before(block.ffn_norm, x)
        inner = ACTIVATIONS[config.ffn](block.ffn.up(y))
        inner = inner * block.ffn.linear(y) if config.ffn_gated else inner
        inner = dropout(inner, keys.inner[i], 0.3, "btf")
        y = block.ffn.down(block.ffn.norm(inner) if config.ffn_norm else inner)
        x = after(block.ffn_norm, scale * x + dropout(y, keys.ffn[i], 0.2, "btd"))
    return x if config.post_norm else model.final_norm(x)


@pytest.mark.parametrize(
    "name", ["torchscale", *(pytest.param(x, marks=pytest.mark.slow) for x in [*MODELS][:-1])]
)
def test_where_a_model_drops(name):
    """As torchscale does."""

    @jax.jit
    def outputs(tokens):
        model = build_model(MODELS[name], rngs=nnx.Rngs(0))
        keys = row_keys(0, 0, jnp.arange(2))
        return model(tokens, dropout_keys=keys)[0], model.logits(by_hand(model, tokens, keys))

    assert_close(*outputs(np.random.default_rng(0).integers(0, 48, (2, 8)).astype(np.int32)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["retnet", "hybrid"])
def test_a_model_for_decoding_drops_the_same(name):
    @jax.jit
    def outputs(tokens):
        model = build_model(MODELS[name], rngs=nnx.Rngs(0))
        keys = row_keys(0, 0, jnp.arange(2))
        return [x.hidden(tokens, dropout_keys=keys)[0] for x in (model, for_decoding(model))]

    assert_close(*outputs(np.random.default_rng(0).integers(0, 48, (2, 8)).astype(np.int32)))


def test_nothing_is_dropped_outside_of_training():
    """The program of the loss on held-out text is that of a model without dropout."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    texts = []
    for config in (CONFIG, DROPPED):
        model, windows = abstract_state(config, mesh).model, abstract_batch(config, mesh)
        texts.append(first_rows_loss.lower(model, windows, 8).as_text())
    assert texts[0] == texts[1]


ONE_LAYER = dataclasses.replace(DROPPED, model=dataclasses.replace(DROPPED.model, n_layers=1))
CARRIED = dataclasses.replace(
    ONE_LAYER,
    data=DataConfig(windows="contiguous"),
    train=dataclasses.replace(ONE_LAYER.train, carry_state=True),
)


MANY = [
    pytest.param(4, "full", marks=pytest.mark.slow),
    pytest.param(8, "dots", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("parts", "remat"), [(1, "full"), *MANY])
def test_micro_batches_and_remat_do_not_change_the_masks(parts, remat):
    """Losses and gradients: with remat the backward pass draws the masks of the forward pass."""

    @jax.jit
    def sums(windows):
        state = initial_state(CARRIED)
        # The norms after small embeddings would amplify the rounding of their gradients.
        state.model.embedding = nnx.Param(50 * state.model.embedding[...])
        keys, found = row_keys(0, 0, jnp.arange(8)), []
        for n, name in [(1, "none"), (parts, remat)]:
            state.model.config = dataclasses.replace(CARRIED.model, remat=name)
            gradients, rest = gradient_sums(state.model, windows, n, state.carry, 1e-3, keys)
            found.append((jax.tree.leaves(gradients), rest))
        return found

    expected, found = sums(batch(0))
    assert_close(found, expected)


def test_a_step_numbers_the_rows_of_the_whole_batch():
    """Its loss is that with the keys of its seed, its step and rows 0 to 7."""
    in_parts = dataclasses.replace(ONE_LAYER.train, seed=3, micro_batches=4)
    config = dataclasses.replace(ONE_LAYER, train=in_parts)

    @jax.jit
    def losses(windows, step):
        state = initial_state(config)._replace(step=step)
        keys = row_keys(3, step, jnp.arange(8))
        _, expected = loss_sum(state.model, windows, dropout_keys=keys)
        _, step_metrics = train_step(config, state, windows)
        return step_metrics.loss, expected.loss / expected.weight

    found = [np.asarray(losses(batch(0), np.int32(step))) for step in (4, 5)]
    for loss, expected in found:
        assert_close(loss, expected)
    assert abs(found[0][0] / found[1][0] - 1) > 1e-4


def test_masks_are_stored_without_remat_and_drawn_again_with_it():
    """A stored mask takes a byte for each number."""

    def stored(remat):
        model = dataclasses.replace(DROPPED.model, remat=remat)
        config = dataclasses.replace(DROPPED, model=model)

        def residuals(model, windows, keys):
            loss = lambda model: loss_sum(model, windows, dropout_keys=keys)[0]  # noqa: E731
            return jax.vjp(loss, model)[1]

        keys = jax.eval_shape(lambda: row_keys(0, 0, jnp.arange(8)))
        model = jax.eval_shape(lambda: initial_state(config).model)
        found = jax.tree.leaves(jax.eval_shape(residuals, model, batch(0), keys))
        return sum(x.size for x in found if x.dtype == bool and x.size >= 8 * 12 * 16)

    b, t, d, n = 8, 12, 16, 2
    assert stored("none") == b * t * (d + n * (2 * d + 2 * d))
    assert stored("full") == b * t * d  # of the embedding


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_masks_are_not_sent_between_devices(micro_batches):
    """A step has the messages of the same step without dropout."""
    mesh, found = make_mesh(MeshConfig(data=1, fsdp=2, seq=2, tensor=2)), []
    for rates in ({}, RATES):
        model = dataclasses.replace(CONFIG.model, d_model=32, **rates)
        train = dataclasses.replace(CONFIG.train, micro_batches=micro_batches)
        config = dataclasses.replace(
            CONFIG, model=model, train=train, data=DataConfig(sequence_length=16)
        )
        shape = abstract_state(config, mesh)
        with jax.set_mesh(mesh):
            step = make_step(config, shape).lower(shape, abstract_batch(config, mesh))
            found.append(sorted(collectives(step.compile().as_text())))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["retention", "attention", "hybrid"])
def test_eight_devices_compute_what_one_does(mixer):
    options: dict = {"mixer": mixer} | RATES
    if mixer == "hybrid":
        entry = dataclasses.replace(WINDOWED, layers=(1,), n_heads=8)
        options = {"attention_layers": (entry,), "remat": "full"} | RATES
    with jax.enable_x64(True):
        one, losses = run_on(MeshConfig(), variant(**options), jax.devices()[:1])
        for mesh in MESHES:
            eight, losses_of_eight = run_on(MeshConfig(**({"data": 1} | mesh)), variant(**options))
            assert_close(losses_of_eight, losses, what=str(mesh))
            assert_close(eight, one, what=str(mesh))
    _, undropped = on_one_device("attention" if mixer == "attention" else "retention")
    assert np.abs(undropped - losses).max() > 1e-3


@pytest.mark.slow
@pytest.mark.compiles(80, reason="whole runs")
def test_a_stopped_run_resumes_exactly(config, tmp_path, monkeypatch):
    """Bit for bit; and other rates may be given when a run is resumed."""
    model = dataclasses.replace(config.model, **RATES)
    config = dataclasses.replace(config, model=model)
    assert train(config, tmp_path / "whole").status == "finished"
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: signal.raise_signal(signal.SIGTERM))
        assert train(config, tmp_path / "run").status == "stopped"
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert train(config, tmp_path / "run").status == "finished"
    assert_same_losses(tmp_path / "run", tmp_path / "whole")
    config.model.dropout = 0.5
    assert train(config, tmp_path / "other").status == "finished"
    other, whole = metrics(tmp_path / "other"), metrics(tmp_path / "whole")
    assert [other[i]["loss"] == whole[i]["loss"] for i in (6, 10)] == [True, False]


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_rates_outside_of_0_to_1_are_refused(name, rate):
    with pytest.raises(ConfigError, match=rf"model.{name}={rate} is not in \[0, 1\)"):
        ModelConfig(**{name: rate}).check()


def test_keys_that_do_not_fit_are_named():
    model = jax.eval_shape(lambda: initial_state(DROPPED).model)
    tokens = jnp.zeros((2, 3), jnp.int32)
    call = inspect.unwrap(type(model).hidden)  # without the tests' check of annotations
    with pytest.raises(ValueError, match=r"dropout_keys are key<fry>\[3\]; .* need 2 typed keys"):
        call(model, tokens, dropout_keys=jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ValueError, match=r"dropout_keys are uint32\[2\]"):
        call(model, tokens, dropout_keys=jax.random.PRNGKey(0))
