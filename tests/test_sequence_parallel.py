"""Rows split over devices: the same numbers, and messages that do not grow with the rows."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train_step import CONFIG, batch, run_on
from tolerances import assert_close

from retnet_jax.config import DataConfig, MeshConfig
from retnet_jax.data import Batch
from retnet_jax.ops.retention import log_decay, on_mesh, retention, split_documents
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.parallel.sharding import batch_shardings
from retnet_jax.training.step import abstract_state, initial_state, loss_sum, make_step

B, T, H, K, V = 2, 64, 2, 8, 16
# One head forgets, one does not.
LOG_DECAY = jnp.concatenate([log_decay(rule, 1, (1 / 8, 1 / 8)) for rule in ("log_spaced", "none")])
MESHES = [{"seq": 8}, {"data": 2, "seq": 2, "tensor": 2}, {"seq": 4, "tensor": 2}]


def mesh_of(**axes):
    return make_mesh(MeshConfig(**({"data": 1} | axes)))


def inputs(length=T):
    rng = np.random.default_rng(0)
    shapes = ((B, length, H, K), (B, length, H, K), (B, length, H, V), (B, H, K, V))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def documents():
    """Borders inside parts and at cuts, documents over several parts; padding everywhere."""
    rng = np.random.default_rng(1)
    segments = np.sort(rng.integers(1, 5, (B, T)), axis=1)
    segments[0, 20:30] = 0
    segments[1, :9] = 0
    segments[1, 40:] = 0
    segments[0, 32:] = 9
    return jnp.asarray(segments, jnp.int32)


def outputs_and_gradients(q, k, v, state, segment_ids):
    def scalar(q, k, v, state):
        y, after = retention(q, k, v, LOG_DECAY, state, segment_ids)
        return (y**2).sum() + (after**3).sum(), (y, after)

    return jax.grad(scalar, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, state)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("exchange", ["gathered", "passed on"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_split_rows_are_whole_rows(packed, exchange, mesh, monkeypatch):
    arguments = (*inputs(), documents() if packed else None)
    expected = jax.jit(outputs_and_gradients)(*arguments)
    monkeypatch.setattr(on_mesh, "MOST_GATHERED", 8 if exchange == "gathered" else 1)
    with jax.set_mesh(mesh_of(**mesh)):
        # A new function, so that it is traced again with the patch.
        found = jax.jit(lambda *x: outputs_and_gradients(*x))(*arguments)
    assert_close(jax.device_get(found), jax.device_get(expected))


def test_without_a_state_and_with_documents_that_were_numbered_before():
    q, k, v, _ = inputs()
    expected = retention(q, k, v, LOG_DECAY, None, documents())
    with jax.set_mesh(mesh_of(seq=8)):
        found = jax.jit(lambda s: retention(q, k, v, LOG_DECAY, None, split_documents(s)))(
            documents()
        )
    assert_close(jax.device_get(found), jax.device_get(expected))


def collectives(text):
    """(kind, elements of the result, bytes of one) of each collective in a compiled program."""
    sizes = {"f32": 4, "s32": 4, "bf16": 2, "pred": 1}
    pattern = r"= (\w+)\[([\d,]*)\]\S* (all-gather|all-reduce|reduce-scatter|collective-permute)\("
    return [
        (kind, int(np.prod([int(n) for n in dims.split(",") if n])), sizes[dtype])
        for dtype, dims, kind in re.findall(pattern, text)
    ]


@pytest.mark.parametrize("length", [64, 512])
def test_bytes_between_devices_do_not_grow_with_the_row(length):
    """A device receives n - 1 states in a layer's forward pass, and n - 1 in its backward pass."""
    n = 8
    q, k, v, _ = inputs(length)
    mesh = mesh_of(seq=n)
    sharding = jax.NamedSharding(mesh, jax.P(None, "seq"))
    rows = jnp.ones((B, length), jnp.int32)

    def loss(q, k, v, rows):
        return (retention(q, k, v, LOG_DECAY, None, rows)[0] ** 2).sum()

    with jax.set_mesh(mesh):
        rows = jax.jit(split_documents)(rows)
        qkv = jax.device_put((q, k, v), sharding)
        forward = jax.jit(lambda *x: retention(*x[:3], LOG_DECAY, None, x[3])[0])
        one_way = collectives(forward.lower(*qkv, rows).compile().as_text())
        both = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*qkv, rows).compile().as_text()
    states = B * H * K * V
    # The result of an all-gather includes the device's own part; a reduce-scatter's is that part.
    assert one_way == [("all-gather", n * states, 4)]
    assert sorted(collectives(both)) == [
        ("all-gather", n * states, 4),
        ("reduce-scatter", states, 4),
    ]


def test_a_transformer_gathers_keys_and_values():
    model = dataclasses.replace(CONFIG.model, mixer="attention", tie_embeddings=False)
    config = dataclasses.replace(CONFIG, model=model)
    mesh, windows = mesh_of(seq=4, data=2), batch(0, t=16)
    with jax.set_mesh(mesh):
        lowered = jax.jit(lambda m, x: loss_sum(m, x)[0]).lower(
            abstract_state(config, mesh).model,
            jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                windows,
                batch_shardings(mesh, windows),
            ),
        )
    rows, length = windows.tokens.shape
    of_all = rows // 2 * length * config.model.d_model
    found = collectives(lowered.compile().as_text())
    gathers = [size for kind, size, _ in found if kind == "all-gather" and size == of_all]
    assert len(gathers) == 2 * config.model.n_layers


@pytest.mark.slow
def test_a_row_of_a_million_tokens_trains():
    length = 2**20
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, n_layers=1, remat="full"),
        data=DataConfig(sequence_length=length),
        train=dataclasses.replace(CONFIG.train, batch_size=1),
    )
    mesh = mesh_of(seq=8)
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.integers(0, 3, (1, length + 1)), axis=1).astype(np.int32) % 48
    row = Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=np.ones((1, length), np.int32),
        weights=np.ones((1, length), np.float32),
        continues=np.zeros(1, bool),
    )
    shape = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, shape)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda: initial_state(config), out_shardings=shardings)()
        step, losses = make_step(config, shape), []
        for _ in range(5):
            state, metrics = step(state, jax.device_put(row, batch_shardings(mesh, row)))
            losses.append(float(metrics.loss))
    assert losses[0] == pytest.approx(np.log(48), rel=0.05)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "remat",
    ["full", "dots", "q,k,v,up", "offload:q,k,v,up"],
)
def test_rematerialisation_does_not_change_the_losses(remat):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, n_layers=5))
    kept = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
    mesh = MeshConfig(data=2, seq=4)
    _, expected = run_on(mesh, config, steps=2)
    _, found = run_on(mesh, kept, steps=2)
    assert_close(found, expected)
