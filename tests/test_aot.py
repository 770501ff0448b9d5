"""Programs compiled ahead: they are those that train.py runs, and reports on them are right."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from test_train_step import CONFIG
from training_runs import metrics

from retnet_jax.aot import evaluation, topologies
from retnet_jax.aot import fit as search
from retnet_jax.aot.compile_step import (
    DoesNotFitError,
    compile_step,
    device_bytes,
    load,
    save,
)
from retnet_jax.aot.fit import arrangements, fit, ranking
from retnet_jax.aot.flops import flops_of
from retnet_jax.aot.hlo import Computations, Program, _group
from retnet_jax.aot.report import report
from retnet_jax.config import MeshConfig, ModelConfig
from retnet_jax.errors import ConfigError
from retnet_jax.model import build_model
from retnet_jax.parallel import chips
from retnet_jax.parallel.chips import Chip, chip
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.training import held_out_loss, loop
from retnet_jax.training.loop import train
from retnet_jax.training.step import abstract_state, make_step


@pytest.fixture(scope="module")
def tpus(tpu_compiler):
    """Four v5e chips, as libtpu describes them."""
    return topologies.tpus("v5e:2x2")


def program(function, mesh, *arguments):
    with jax.set_mesh(mesh):
        return Program(jax.jit(function).lower(*arguments).compile(), mesh)


def test_messages_in_loops_are_counted_as_often_as_they_run():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    numbers, loops = 2**19, 3

    def exchange(x):
        def step(total, _):
            gathered = jax.lax.all_gather(total, "fsdp", tiled=True)
            scattered = jax.lax.psum_scatter(gathered, ("data", "tensor"), tiled=True)
            shifted = jax.lax.ppermute(total, "tensor", [(0, 1), (1, 0)])
            return total + shifted + jnp.tile(scattered, 2), None

        total, _ = jax.lax.scan(step, x, None, length=loops)
        return jax.lax.psum(total, ("data", "fsdp"))

    shared = jax.shard_map(exchange, in_specs=P(), out_specs=P(), check_vma=False)
    found = program(shared, mesh, jnp.zeros(numbers)).messages
    size = 4 * numbers
    assert {(x.kind, x.axes): (x.count, x.bytes) for x in found} == {
        ("all-gather", ("fsdp",)): (loops, loops * size),
        ("reduce-scatter", ("data", "tensor")): (loops, loops * 3 * size // 2),
        ("collective-permute", ("tensor",)): (loops, loops * size),
        ("all-reduce", ("data", "fsdp")): (1, 2 * 3 * size // 4),
    }


def test_an_asynchronous_collective_is_counted_once():
    """XLA for TPU names it in the fusions that start it, overlap it, and end it."""
    gather = "%g = f32[8]{0} all-gather(%x), channel_id=1, replica_groups={{0,1}}"
    parts = ("fused_computation.1", "async_collective_fusion.2", "fused_computation.3")
    text = "".join(f"%{name} (x: f32[4]) -> f32[8] {{\n  {gather}\n}}\n" for name in parts)
    text += (
        "ENTRY %main (x: f32[4]) -> f32[8] {\n"
        "  %async-collective-start = f32[8]{0} fusion(%x), calls=%fused_computation.1\n"
        "  %fusion.2 = f32[8]{0} fusion(%x), calls=%async_collective_fusion.2\n"
        "  ROOT %async-collective-done = f32[8]{0} fusion(%x), calls=%fused_computation.3\n}\n"
    )
    found = [x.text for x, _ in Computations(text).instructions() if "all-gather" in x.text]
    assert found == [gather]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [0, 2]),
        ("replica_groups=[4,2]<=[8], x", [0, 1]),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, x", [0, 4]),
        ("source_target_pairs={{1,3},{3,1}}", [1, 3]),
        ("replica_groups={}", list(range(8))),
    ],
)
def test_groups_of_devices(groups, expected):
    assert _group(f"all-reduce(%x), {groups}", 8) == expected


@pytest.mark.parametrize("mixer", ["retention", "attention"])
def test_counted_flops_equal_the_formula_and_the_compilers_count(mixer):
    """The compiler counts loops once, so it gets a model of one layer and one chunk."""
    model = ModelConfig(vocab_size=512, d_model=64, n_layers=1, n_heads=2, mixer=mixer)
    length = 64
    tokens = jnp.zeros((2, length), int)

    def loss(model):
        return (model(tokens, form="parallel")[0] ** 2).sum()

    built = build_model(model, rngs=nnx.Rngs(0))
    found = flops_of(jax.grad(loss), built) / tokens.size
    compiled = jax.jit(jax.grad(loss)).lower(built).compile().cost_analysis()["flops"] / tokens.size
    # The compiler also counts elementwise work.
    assert 0.85 * compiled < found < compiled
    # The parallel form computes all scores; the formula counts only what the algorithm needs.
    formula = model.training_flops_per_token(length)
    assert formula < found < 1.35 * formula
    deep = dataclasses.replace(model, n_layers=7)
    many = flops_of(jax.grad(loss), build_model(deep, rngs=nnx.Rngs(0))) / tokens.size
    a_layer = (many - found) / 6
    assert many == pytest.approx(found + 6 * a_layer)
    head = 6 * model.vocab_size * model.d_model
    assert found == pytest.approx(head + a_layer, rel=1e-6)


def test_recomputation_is_counted():
    tokens = jnp.zeros((2, 64), int)

    def flops(remat):
        config = dataclasses.replace(CONFIG.model, n_layers=6, remat=remat)
        model = build_model(config, rngs=nnx.Rngs(0))
        return flops_of(jax.grad(lambda model: model(tokens)[0].sum()), model)

    once = flops("none")
    assert 1.15 * once < flops("full") < 4 / 3 * once
    # With these only the matrix products inside retention are recomputed.
    assert once <= flops("q,k,v,gate,retention,out,up") < 1.1 * once


@pytest.fixture(scope="module")
def split(config):
    """A step in two micro-batches, split over eight devices."""
    return compile_step(
        dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, vocab_size=258),
            mesh=MeshConfig(data=2, seq=2, tensor=2),
            train=dataclasses.replace(config.train, steps=3, micro_batches=2),
        )
    )


@pytest.mark.slow
@pytest.mark.compiles(80, reason="a whole run, saved from eight devices")
def test_it_compiles_what_train_runs(split, tmp_path, monkeypatch):
    """The step, and the evaluation beside it."""
    lowered, evaluations, first_rows_loss = [], set(), held_out_loss.first_rows_loss

    def look_at_evaluation(*arguments):
        evaluations.add(first_rows_loss.lower(*arguments).as_text())
        return first_rows_loss(*arguments)

    monkeypatch.setattr(held_out_loss, "first_rows_loss", look_at_evaluation)

    def looking(config, mesh, state_shape):
        step = make_step(config, state_shape)

        def look(state, batch):
            lowered.append(step.lower(state, batch).as_text())
            return step(state, batch)

        return look

    assert train(split.config, tmp_path / "run", step=looking).status == "finished"
    assert lowered == 3 * [split.lowered.as_text()]
    beside = evaluation.lower_evaluation(split.config, split.mesh, split.state)
    assert evaluations == {beside.as_text()}


def test_the_memory_of_the_evaluation_is_reported(split):
    """It has the whole state in memory too, but stores fewer activations than a step."""
    found = report(split)
    tokens = found.rows * split.config.data.sequence_length // 2  # of a micro-batch on a device
    assert found.evaluation_temporary_bytes > 4 * tokens * split.config.model.d_model
    assert found.evaluation_temporary_bytes < found.temporary_bytes
    state = found.parameter_bytes + found.optimizer_bytes
    assert found.evaluation_peak_bytes > state + found.evaluation_temporary_bytes
    assert found.evaluation_peak_bytes < found.peak_bytes == found.needed_bytes
    larger = dataclasses.replace(found, evaluation_peak_bytes=3 * 2**30, memory_bytes=2**32)
    assert larger.needed_bytes == 3 * 2**30
    expected = r"peak of an evaluation +3\.00\n  the larger peak is 75% of the device's 4\.0\n"
    assert re.search(expected, larger.text())
    written = json.loads(json.dumps(found.as_dict()))
    for name in ("evaluation_peak_bytes", "evaluation_temporary_bytes", "needed_bytes"):
        assert written[name] == getattr(found, name)
    # A state that is carried from step to step stays on the device too.
    carrying = dataclasses.replace(split.config.train, carry_state=True)
    state = abstract_state(dataclasses.replace(split.config, train=carrying), split.mesh)
    grown = evaluation.evaluation_memory(split._replace(state=state))
    assert grown.peak_bytes - found.evaluation_peak_bytes == device_bytes(state.carry) > 0


@pytest.fixture
def small_memory(monkeypatch):
    """A CPU with 8 GiB in its data sheet, and an evaluation that needs 6 GiB for each row."""

    @jax.jit
    def hungry(model, batch, rows):
        numbers = jnp.arange(6 * 2**28, dtype=jnp.float32) * batch.weights[:, :1]
        return jnp.sort(numbers * rows, axis=1).sum()

    monkeypatch.setattr(chips, "CHIPS", (Chip("cpu", 1e12, 8 * 2**30, 1e11, 1e10, 1e9),))
    monkeypatch.setattr(evaluation, "first_rows_loss", hungry)


@pytest.mark.usefixtures("small_memory")
def test_an_evaluation_that_does_not_fit_is_refused_with_numbers(split):
    """Each device has two rows of the batch."""
    with pytest.raises(
        DoesNotFitError,
        match=r"the evaluation during training does not fit in the memory of a cpu: it needs 12.0 "
        r"GiB, more than its 8.0 GiB. It needs less with train.micro_batches=4 ",
    ):
        report(split)


@pytest.mark.slow
@pytest.mark.usefixtures("small_memory")
def test_an_arrangement_whose_evaluation_does_not_fit_is_left_out(monkeypatch):
    """Of arrangements with one and two rows, whose steps fit."""
    monkeypatch.setattr(search, "REMATS", search.REMATS[:1])
    config = dataclasses.replace(
        CONFIG,
        train=dataclasses.replace(CONFIG.train, batch_size=2),
        data=dataclasses.replace(CONFIG.data, sequence_length=16),
    )
    device = jax.devices()[:1]
    both = [x.config for x in arrangements(config, device)]
    assert {x.train.micro_batches for x in both} == {1, 2}
    for each in both:
        compile_step(each, device)
    (found,) = fit(config, device, most=2)
    assert (found.rows, found.evaluation_peak_bytes // 2**30) == (1, 6)
    assert f" {found.evaluation_peak_bytes / 2**30:.1f} " in ranking([found])


def saved(path):
    """As train.py --compiled=PATH."""
    return lambda config, mesh, state_shape: load(path, config, mesh, state_shape)


@pytest.mark.slow
@pytest.mark.usefixtures("no_compilation_cache")
def test_a_saved_step_trains_to_the_same_losses(config, uninterrupted, tmp_path, monkeypatch):
    step = compile_step(config)
    save(step, tmp_path / "step")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_step", None)  # so that only the saved step can be used
        assert train(config, tmp_path / "run", step=saved(tmp_path / "step")).status == "finished"
    found, expected = metrics(tmp_path / "run"), metrics(uninterrupted)
    assert {i: x["loss"] for i, x in found.items()} == {i: x["loss"] for i, x in expected.items()}
    other = dataclasses.replace(config, mesh=MeshConfig(data=4, fsdp=2))
    with pytest.raises(ConfigError, match=r"holds another step than this one:\n  mesh: "):
        train(other, tmp_path / "other", step=saved(tmp_path / "step"))
    (tmp_path / "text").write_text("no program")
    with pytest.raises(ConfigError, match="is not a compiled step"):
        train(config, tmp_path / "other", step=saved(tmp_path / "text"))
    with pytest.raises(ConfigError, match="does not exist"):
        train(config, tmp_path / "other", step=saved(tmp_path / "nothing"))


def on_four(**changes):
    model = dataclasses.replace(
        CONFIG.model, n_layers=6, d_model=256, n_heads=2, dtype="bfloat16", **changes
    )
    data = dataclasses.replace(CONFIG.data, sequence_length=128)
    return dataclasses.replace(CONFIG, model=model, data=data, mesh=MeshConfig(data=2, fsdp=2))


def test_a_step_for_tpus(tpus):
    config = on_four()
    step = compile_step(config, tpus)
    found = report(step)
    assert found.device == "TPU v5 lite"
    parameters = 4 * config.model.parameter_count()
    assert parameters / 2 < found.parameter_bytes < 0.55 * parameters  # norms are not split
    assert found.optimizer_bytes == pytest.approx(2 * found.parameter_bytes, rel=0.01)
    memory = step.compiled.memory_analysis()
    assert found.peak_bytes >= memory.argument_size_in_bytes + memory.temp_size_in_bytes
    state = found.parameter_bytes + found.optimizer_bytes
    assert state < found.evaluation_peak_bytes < found.peak_bytes
    assert found.estimated_seconds > found.compute_seconds > 0
    assert 0 < found.mfu < 1
    assert {"fsdp", "data"} <= {axis for x in found.messages for axis in x.axes}
    assert json.loads(json.dumps(found.as_dict()))["mfu"] == found.mfu
    assert f"MFU {found.mfu:.1%}" in found.text()


@pytest.mark.slow
def test_offloaded_activations_are_in_the_hosts_memory(tpus):
    def bytes_on_host(remat):
        memory = compile_step(on_four(remat=remat), tpus).compiled.memory_analysis()
        return memory.host_temp_size_in_bytes

    assert bytes_on_host("q,k,v") == 0
    config = on_four()
    tokens = config.train.batch_size * config.data.sequence_length // 4
    kept = 2 * config.model.n_layers * tokens * 4 * config.model.d_model  # q, k and the wider v
    assert bytes_on_host("offload:q,k,v") == kept


def test_meshes_that_split_a_dimension_of_the_torus(tpus):
    mesh = make_mesh(MeshConfig(data=8, fsdp=8), topologies.tpus("v5p:4x4x4"))
    assert len(set(mesh.devices.flat)) == 64
    assert dict(mesh.shape) == {"data": 8, "fsdp": 8, "seq": 1, "tensor": 1}


@pytest.mark.slow
def test_slices_exchange_over_the_network(tpus):
    """They exchange gradients of parameters that fsdp does not split over slices."""
    config = dataclasses.replace(on_four(), mesh=MeshConfig(data=2, fsdp=4))
    with pytest.raises(ConfigError, match=r"mesh.data=1 does not divide over 2 slices"):
        compile_step(
            dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=8)),
            topologies.tpus("v5e:2x2", slices=2),
        )
    found = report(compile_step(config, topologies.tpus("v5e:2x2", slices=2)))
    between = sum(x.bytes for x in found.messages if x.axes == ("slices",))
    assert found.parameter_bytes / 2 < between < 2 * found.parameter_bytes
    assert found.message_seconds >= between / chip("TPU v5 lite").network_bandwidth


def test_what_does_not_fit_is_refused_with_numbers(tpus):
    huge = dataclasses.replace(on_four(), model=ModelConfig(d_model=8192, n_layers=30, n_heads=32))
    with pytest.raises(DoesNotFitError, match=r"needs [\d.]+ GiB, more than its .*mesh.fsdp=4"):
        compile_step(huge, tpus)


@pytest.mark.slow
def test_the_fastest_arrangements_first(tpus):
    config = on_four()
    found = fit(config, tpus, most=2)
    seconds = [x.step_seconds for x in found]
    assert seconds == sorted(seconds)
    assert len(found) == 2
    assert all(np.prod(list(x.mesh.values())) == 4 for x in found)
    table = ranking(found).splitlines()
    assert [f"{x.mfu:.1%}" in line for x, line in zip(found, table[2:], strict=True)] == [True] * 2
    for arrangement in arrangements(config, tpus):
        assert arrangement.config.train.batch_size == config.train.batch_size
        assert arrangement.bytes < chip("TPU v5 lite").memory


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v9:2x2"], "--topology=v9:2x2 is not known to libtpu"),
        (["--topology=v5e:2x2", "--config.mesh.data=3"], "mesh.data=3"),
        (["--topology=v5e:2x2", "--gpu=h200"], "give only one of them"),
        (["--gpu=gtx"], "--gpu=gtx is not one of h100, h200"),
    ],
)
def test_command_line_errors(tpus, arguments, message):
    done = programs.run("tools/compile_ahead.py", "--config=configs/retnet_200m.py", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
