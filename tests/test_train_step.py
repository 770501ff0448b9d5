"""The training step: sums, micro-batches, meshes, schedules and decay masks."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import assert_close

from retnet_jax import Config, ModelConfig
from retnet_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from retnet_jax.data import Batch
from retnet_jax.errors import ConfigError
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.parallel.sharding import batch_shardings, check_fit
from retnet_jax.training.held_out_loss import first_rows_loss
from retnet_jax.training.optim import learning_rate_factor, make_optimizer
from retnet_jax.training.step import (
    _where_continued,
    abstract_batch,
    abstract_state,
    gradient_sums,
    initial_state,
    loss_sum,
    make_step,
    train_step,
)
from retnet_jax.trees import leaf_name

CONFIG = Config(
    model=ModelConfig(vocab_size=48, d_model=16, n_layers=2, n_heads=2, tie_embeddings=True),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    train=TrainConfig(steps=10, batch_size=8),
)


sums_of_gradients = jax.jit(gradient_sums, static_argnums=2)


@jax.jit
def initial_model():
    return initial_state(CONFIG).model


def batch(step, b=8, t=12):
    """Windows of documents, with padding of a different length in each row."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 48, (b, t + 1)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (b, t)), axis=1).astype(np.int32)
    real = np.arange(t) < rng.integers(3, t + 1, (b, 1))
    continues = rng.integers(0, 2, b).astype(bool)
    segments = segments * real
    return Batch(tokens[:, :-1], tokens[:, 1:], segments, real.astype(np.float32), continues)


def run_on(mesh_config, config=CONFIG, devices=None, steps=3):
    """The model after the first step on a mesh, and the losses of some."""
    mesh = make_mesh(mesh_config, devices)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
    with jax.set_mesh(mesh):
        state = jax.jit(partial(initial_state, config), out_shardings=shardings)()
        step = jax.jit(partial(train_step, config), out_shardings=(shardings, None))
        losses, first = [], None
        for number in range(steps):
            windows = batch(number)
            state, metrics = step(state, jax.device_put(windows, batch_shardings(mesh, windows)))
            losses.append(metrics.loss)
            first = state.model if number == 0 else first
    return jax.device_get(first), np.asarray(losses)


def losses_of(config, mesh_config, devices):
    return run_on(mesh_config, config, devices)[1]


def variant(mixer="retention", optimizer="adamw", **model):
    return dataclasses.replace(
        CONFIG,
        # In float64, so that only the rounding of parameters differs.
        model=dataclasses.replace(
            CONFIG.model, mixer=mixer, n_heads=8, d_model=32, dtype="float64", **model
        ),
        # Adam turns rounding errors of gradients near 0 into full steps; an epsilon above those
        # errors makes parameters comparable.
        optimizer=dataclasses.replace(CONFIG.optimizer, name=optimizer, epsilon=1e-3),
        train=dataclasses.replace(CONFIG.train, z_loss=1e-3),
    )


MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"tensor": 8},
    {"seq": 4, "data": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "seq": 2, "tensor": 2},
]


@functools.cache
def on_one_device(mixer):
    with jax.enable_x64(True):
        return run_on(MeshConfig(), variant(mixer), jax.devices()[:1])


# The others run with all the long tests.
OFTEN = [("retention", {"fsdp": 2, "seq": 2, "tensor": 2})]
SELDOM = [
    (x, mesh) for x in ("retention", "attention") for mesh in MESHES if (x, mesh) not in OFTEN
]


@pytest.mark.parametrize(
    ("mixer", "mesh"),
    [*OFTEN, *(pytest.param(*x, marks=pytest.mark.slow) for x in SELDOM)],
    ids=str,
)
def test_eight_devices_compute_what_one_does(mixer, mesh):
    """Losses and updated parameters, for single axes and combinations."""
    one, losses = on_one_device(mixer)
    with jax.enable_x64(True):
        eight, losses_of_eight = run_on(MeshConfig(**({"data": 1} | mesh)), variant(mixer))
    assert_close(losses_of_eight, losses)
    assert_close(eight, one)


def steps_of(config, batches):
    """The states and metrics after each of some batches."""
    step = jax.jit(partial(train_step, config))
    state, found = jax.jit(partial(initial_state, config))(), []
    for windows in batches:
        state, metrics = step(state, windows)
        found.append((state, metrics))
    return found


def test_a_step_that_would_make_parameters_infinite_is_skipped():
    """Loss and gradient are ordinary, but the update overflows."""
    optimizer = dataclasses.replace(
        CONFIG.optimizer, learning_rate=3e38, warmup_steps=0, weight_decay=1e3, schedule="constant"
    )
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    ((state, metrics),) = steps_of(config, [batch(0)])
    assert np.isfinite(metrics.loss)
    assert np.isfinite(metrics.gradient_norm)
    assert (int(metrics.skipped), int(state.step)) == (1, 1)
    assert_close(state.model, jax.jit(partial(initial_state, config))().model)


def test_skipped_steps_do_not_delay_the_schedule():
    """The logged rate is the one used, and the last step has the last rate of the schedule."""
    config = dataclasses.replace(
        CONFIG,
        optimizer=dataclasses.replace(CONFIG.optimizer, weight_decay=0.0),
        train=dataclasses.replace(CONFIG.train, steps=8),
    )
    bad = batch(2)._replace(weights=np.full((8, 12), np.nan, np.float32))
    batches = [batch(0), batch(1), bad, bad, *map(batch, range(4, 8))]
    found = steps_of(config, batches)
    assert [int(metrics.skipped) for _, metrics in found] == [0, 0, 1, 2, 0, 0, 0, 0]
    factor = learning_rate_factor(config.optimizer, 8)
    for number, (_, metrics) in enumerate(found):
        np.testing.assert_allclose(metrics.learning_rate, 1e-2 * factor(number), rtol=1e-6)
    # As if the run had been at these steps, with the same moments: Adam's update scales with the
    # rate, so two runs of the same batches differ only by the ratio of the rates.
    (before, _), (after, metrics) = found[3:5]
    earlier = before._replace(step=jnp.int32(2))
    other, of_other = jax.jit(partial(train_step, config))(earlier, batches[4])
    ratio = float(metrics.learning_rate / of_other.learning_rate)
    assert ratio < 0.8
    update, other_update = (
        jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), x.model, before.model)
        for x in (after, other)
    )
    assert_close(update, jax.tree.map(lambda x: ratio * x, other_update), "bfloat16")


@pytest.mark.slow
def test_eight_devices_compute_what_one_does_with_muon():
    config = variant(optimizer="muon")
    with jax.enable_x64(True):
        one = losses_of(config, MeshConfig(), jax.devices()[:1])
        eight = losses_of(config, MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
    assert_close(eight, one)


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_micro_batches_weigh_tokens_not_parts(micro_batches):
    """The sums are compared, not parameters: Adam scales rounding errors of 0 up to its rate."""
    model = initial_model()
    # The norms after small embeddings would amplify the rounding of their gradients.
    model.embedding = nnx.Param(50 * model.embedding[...])
    sums = sums_of_gradients
    assert_close(sums(model, batch(0), micro_batches), sums(model, batch(0), 1))


@pytest.mark.slow
@pytest.mark.compiles(200, reason="a model, its states and gradients outside of jit")
def test_halves_of_windows_with_their_state_carried_are_the_whole():
    """A document that continues, one that begins, and one that ends in padding."""
    model = initial_model()
    whole = batch(0, b=3)._replace(continues=np.zeros(3, bool))
    segments = np.array([[1] * 12, [1] * 6 + [2] * 6, [1] * 9 + [0] * 3], np.int32)
    whole = whole._replace(segment_ids=segments, weights=(segments > 0).astype(np.float32))
    halves = [Batch(*(x[:, part] for x in whole[:4]), None) for part in (np.s_[:6], np.s_[6:])]
    first = halves[0]._replace(continues=np.array([True, True, False]))
    second = halves[1]._replace(continues=np.array([True, False, True]))

    def sums(*arguments):
        return jax.jit(loss_sum)(*arguments)[1]

    empty = model.init_state(3, capacity=0)
    expected, weight, nothing = sums(model, whole)
    assert nothing is None
    begun, first_weight, carry = sums(model, first, empty)
    ended, second_weight, carry = sums(model, second, carry)
    assert_close(begun + ended, expected)
    assert float(first_weight + second_weight) == float(weight)
    assert carry.position.tolist() == [12, 6, 9]
    # Logits, as the step calls the model for them.
    whole, first, second = (jax.tree.map(jnp.asarray, x) for x in (whole, first, second))
    logits, state = model(first.tokens, None, segment_ids=first.segment_ids)
    state = _where_continued(second.continues, state)
    after, _ = model(second.tokens, state, segment_ids=second.segment_ids)
    at_once, _ = model(whole.tokens, segment_ids=whole.segment_ids)
    both = jnp.concatenate([logits, after], axis=1)
    assert_close(both[segments > 0], at_once[segments > 0])
    # Without the carried state the losses are others.
    alone = sums(model, second, empty).loss
    assert abs(float(alone - ended)) > 1e-3 * float(ended)


@pytest.mark.parametrize("micro_batches", [2, 8])
def test_micro_batches_carry_the_state_of_their_rows(micro_batches):
    model = initial_model()
    model.embedding = nnx.Param(50 * model.embedding[...])
    sums = sums_of_gradients
    carry = model.init_state(8, capacity=0)
    carry = sums(model, batch(0), 1, carry)[1].carry
    expected = sums(model, batch(1), 1, carry)
    assert_close(sums(model, batch(1), micro_batches, carry), expected)
    assert (np.asarray(expected[1].carry.position) > 0).all()


@pytest.mark.slow
def test_eight_devices_carry_what_one_does():
    config = dataclasses.replace(
        CONFIG,
        data=DataConfig(windows="contiguous"),
        train=dataclasses.replace(CONFIG.train, carry_state=True),
    )
    config.check()
    one = losses_of(config, MeshConfig(), jax.devices()[:1])
    assert_close(losses_of(config, MeshConfig(data=2, fsdp=2, tensor=2), jax.devices()), one)
    plain = losses_of(CONFIG, MeshConfig(), jax.devices()[:1])
    assert plain[0] == one[0]
    assert abs(plain[2] - one[2]) > 1e-5


def test_loss_is_the_mean_over_real_positions():
    """Tokens in the padding make no difference to the loss of a batch."""
    state = jax.jit(partial(initial_state, CONFIG))()
    clean = batch(0)
    garbage = clean._replace(
        tokens=np.where(clean.segment_ids == 0, 7, clean.tokens),
        targets=np.where(clean.segment_ids == 0, 9, clean.targets),
    )
    step = jax.jit(partial(train_step, CONFIG))
    (_, first), (_, second) = step(state, clean), step(state, garbage)
    assert_close(second, first)


def test_abstract_state_is_the_real_one():
    mesh = make_mesh(MeshConfig(fsdp=2, data=-1))
    shape = abstract_state(CONFIG, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, shape)
    state = jax.jit(partial(initial_state, CONFIG), out_shardings=shardings)()
    assert jax.tree.structure(shape) == jax.tree.structure(state)
    for expected, leaf in zip(jax.tree.leaves(shape), jax.tree.leaves(state), strict=True):
        assert (expected.shape, expected.dtype) == (leaf.shape, leaf.dtype)
        assert expected.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    split = [x for x in jax.tree.leaves(state) if x.addressable_shards[0].data.size < x.size]
    assert sum(x.size for x in split) > 0.9 * sum(x.size for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, *np.linspace(1, 0, 10)[:-1]]),
        ("cosine", [0.25, 0.5, 0.75, *(0.5 + 0.5 * np.cos(np.pi * np.arange(9) / 9))]),
        ("wsd", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
    ],
)
def test_schedules(schedule, expected):
    config = OptimizerConfig(schedule=schedule, warmup_steps=3, decay_share=1 / 3)
    factor = learning_rate_factor(config, 12)
    actual = [float(factor(step)) for step in range(12)]
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_shrinks_only_matrices(name):
    """Without a gradient only weight decay changes parameters."""
    config = OptimizerConfig(
        name=name, learning_rate=0.1, muon_learning_rate=0.1, weight_decay=0.5, warmup_steps=0
    )
    optimizer = make_optimizer(config, steps=4)
    model = initial_model()
    zeros = jax.tree.map(jnp.zeros_like, model)
    updates, _ = jax.jit(optimizer.update)(zeros, jax.jit(optimizer.init)(model), model)
    for (path, update), parameter in zip(
        jax.tree_util.tree_flatten_with_path(updates)[0], jax.tree.leaves(model), strict=True
    ):
        leaf = leaf_name(path)
        decayed = leaf.endswith("kernel") or (name == "adamw" and leaf == "embedding")
        parameter = np.asarray(parameter)
        assert_close(update, -0.05 * parameter if decayed else 0 * parameter, what=leaf)


def test_muon_orthogonalises_each_matrix_of_a_stack():
    config = OptimizerConfig(name="muon", muon_learning_rate=1.0, weight_decay=0, warmup_steps=0)
    optimizer = make_optimizer(config, steps=4)
    model = initial_model()
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), model)
    updates, _ = jax.jit(optimizer.update)(gradients, jax.jit(optimizer.init)(model), model)
    for matrix in updates.layers.mixer.q.kernel[...]:
        singular = np.linalg.svd(np.asarray(matrix), compute_uv=False)
        # Newton-Schulz brings singular values near 1, between about 0.7 and 1.2.
        assert 0.5 < singular.min() < singular.max() < 1.5


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(data=3), r"mesh.data=3, .* does not fit 8 devices"),
        (MeshConfig(data=-1, fsdp=3), "does not fit 8 devices"),
    ],
)
def test_meshes_that_do_not_fit_the_devices(mesh, message):
    with pytest.raises(ConfigError, match=message):
        make_mesh(mesh)


def test_batches_and_parameters_that_do_not_divide():
    train = dataclasses.replace(CONFIG.train, batch_size=12, micro_batches=2)
    with pytest.raises(
        ConfigError, match=r"batch_size=12 .* a batch_size divisible by 16 would do"
    ):
        check_fit(make_mesh(MeshConfig()), dataclasses.replace(CONFIG, train=train))
    data = dataclasses.replace(CONFIG.data, sequence_length=12)
    with pytest.raises(ConfigError, match=r"mesh.seq=8 does not divide data.sequence_length=12"):
        check_fit(make_mesh(MeshConfig(data=1, seq=8)), dataclasses.replace(CONFIG, data=data))
    with pytest.raises(ConfigError, match=r"mesh.tensor=8 does not divide model.n_heads=2"):
        check_fit(make_mesh(MeshConfig(data=1, tensor=8)), CONFIG)
    odd = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, vocab_size=49))
    with pytest.raises(
        ConfigError, match=r"mesh.tensor=8 does not divide dimension 0 of model/emb"
    ):
        abstract_state(odd, make_mesh(MeshConfig(data=1, tensor=8)))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_an_evaluation_takes_less_memory_than_the_step_beside_it(remat):
    """So the memory that tools/compile_ahead.py reports for the step is enough for the run."""
    model = dataclasses.replace(CONFIG.model, d_model=64, n_layers=6, remat=remat)
    train = dataclasses.replace(CONFIG.train, batch_size=64, micro_batches=4)
    config = dataclasses.replace(
        CONFIG, model=model, train=train, data=DataConfig(sequence_length=64)
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = abstract_state(config, mesh)
    part = dataclasses.replace(config, train=dataclasses.replace(train, batch_size=16))
    with jax.set_mesh(mesh):
        step = make_step(config, state).lower(state, abstract_batch(config, mesh)).compile()
        windows = abstract_batch(part, mesh)
        evaluation = first_rows_loss.lower(state.model, windows, 16).compile()
    taken, allowed = (x.memory_analysis().temp_size_in_bytes for x in (evaluation, step))
    assert 0 < taken < allowed
