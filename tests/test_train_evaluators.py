"""Evaluators during training: the held-out loss, the user's own, and those that a kill cut off."""

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from training_runs import STEPS, evaluations, latest_step, without_times

from retnet_jax import load_pretrained
from retnet_jax.data import BatchStream, number_of_windows, open_stores
from retnet_jax.errors import ConfigError
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.training.held_out_loss import HeldOutLoss
from retnet_jax.training.loop import Evaluator, train
from retnet_jax.training.step import loss_sum

# A whole run on eight devices; to save it, Orbax copies each array to the host.
pytestmark = pytest.mark.compiles(80, reason="whole runs, saved from eight devices")


def test_held_out_loss_is_the_mean_over_windows_for_every_batch_size(config, uninterrupted):
    """No batch size divides their number; the rest of the last batch has no weight."""
    stores = open_stores(config.data, 257)
    (split,) = (store.held_out for store in stores.stores.values())
    model = load_pretrained(uninterrupted)
    windows = number_of_windows(split, 16)
    assert windows % 48
    options = {"sequence_length": 16, "bos_id": 256, "seed": 0}
    stream = BatchStream([split], [1.0], batch_size=windows, **options)
    _, sums = jax.jit(loss_sum)(model, stream[0])
    expected = float(sums.loss) / float(sums.weight)
    mesh = make_mesh(config.mesh)
    for batch_size, micro_batches in ((8, 1), (48, 2), (8 * windows, 1)):
        sizes = {"batch_size": batch_size, "micro_batches": micro_batches, "eval_batches": 10**6}
        sized = dataclasses.replace(config, train=dataclasses.replace(config.train, **sizes))
        with jax.set_mesh(mesh):
            found = HeldOutLoss(sized, mesh, stores)(
                jax.device_put(model, NamedSharding(mesh, P()))
            )
        assert found["held_out_loss"] == pytest.approx(expected, rel=1e-6), batch_size


def test_an_evaluator_is_added_without_touching_the_loop(config, uninterrupted, tmp_path):
    """Its values are logged when due, and train() returns the logged records."""

    def bytes_of_parameters(model):
        return {"bytes": float(sum(x.nbytes for x in jax.tree.leaves(model)))}

    seen = []
    short = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=7))
    result = train(
        short,
        tmp_path / "run",
        evaluators=[Evaluator("size", 3, bytes_of_parameters)],
        on_log=seen.append,
    )
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result.metrics == lines == seen
    expected = 4.0 * config.model.parameter_count()
    assert [(x["step"], x["bytes"]) for x in lines if "bytes" in x] == [
        (step, expected) for step in (3, 6, 7)
    ]
    (restored,) = jax.tree.leaves(load_pretrained(tmp_path / "run").layers.ffn.up)
    np.testing.assert_array_equal(restored, result.model.layers.ffn.up.kernel[...])
    # The same call finds the run finished, and takes no step.
    again = train(short, tmp_path / "run")
    assert (again.status, again.step, again.metrics) == ("finished", 7, [])


def norm(model):
    return {"norm": float(np.linalg.norm(model.final_norm.scale[...]))}


def mean(model):
    return {"mean": float(np.mean(model.embedding[...]))}


@pytest.mark.parametrize("step", [4, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_an_evaluation_that_fails_costs_no_checkpoint(config, tmp_path, step):
    """It comes after the save of the same step, so no step is lost when it fails."""

    def fail(model):
        raise MemoryError("out of memory")

    large = Evaluator("large", step, fail)
    for _ in range(2):
        with pytest.raises(MemoryError):
            train(config, tmp_path / "run", evaluators=[large])
        assert latest_step(tmp_path / "run") == step
    # Without this evaluator the run finishes, and nothing is evaluated twice.
    assert train(config, tmp_path / "run").status == "finished"
    assert evaluations(tmp_path / "run") == [(5, "held-out loss"), (10, "held-out loss")]


def train_until_killed(config, workdir, step):
    """Trains until kill -9 in the second of three evaluators, after a step is saved."""
    steps = iter((4, 8, STEPS))

    def norm_or_death(model):
        if next(steps) == step:
            while not (workdir / "checkpoints" / str(step)).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return norm(model)

    evaluators = [Evaluator("norm", 4, norm_or_death), Evaluator("mean", 4, mean)]
    train(config, workdir, evaluators=evaluators)


@pytest.mark.parametrize(
    ("step", "every", "minutes"),
    [
        pytest.param(4, 4, 0.0, marks=pytest.mark.slow),
        pytest.param(8, 1000, 1e-9, marks=pytest.mark.slow),
        pytest.param(STEPS, 1000, 0.0, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_in_an_evaluation_makes_it_when_it_is_resumed(
    config, tmp_path, step, every, minutes, capfd
):
    """Once and before any step, so metrics.jsonl is that of a run that was not killed."""
    changes = {"eval_every": 4, "checkpoint_every": every, "checkpoint_minutes": minutes}
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))
    arguments = config, tmp_path / "run", step
    process = multiprocessing.get_context("spawn").Process(
        target=train_until_killed, args=arguments
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert evaluations(tmp_path / "run")[-1] == (step, "held-out loss")
    assert latest_step(tmp_path / "run") == step
    evaluators = [Evaluator("norm", 4, norm), Evaluator("mean", 4, mean)]
    capfd.readouterr()
    assert train(config, tmp_path / "run", evaluators=evaluators).status == "finished"
    said = capfd.readouterr().err
    assert f"step {step} was not evaluated by norm, mean: doing that first" in said
    assert train(config, tmp_path / "whole", evaluators=evaluators).status == "finished"
    assert without_times(tmp_path / "run") == without_times(tmp_path / "whole")
    names = ("held-out loss", "norm", "mean")
    assert evaluations(tmp_path / "run") == [(x, name) for x in (4, 8, STEPS) for name in names]
    again = train(config, tmp_path / "run", evaluators=evaluators)
    assert (again.status, again.metrics) == ("finished", [])
    assert without_times(tmp_path / "run") == without_times(tmp_path / "whole")


@pytest.mark.parametrize("left", ["nothing", "a part"])
def test_a_finished_run_without_its_last_evaluation_makes_it_once(
    config, uninterrupted, tmp_path, left
):
    shutil.copytree(uninterrupted, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    *_, last = whole.splitlines(keepends=True)
    path.write_bytes(whole[: -len(last) + (20 if left == "a part" else 0)])
    result = train(config, tmp_path / "run")
    assert (result.status, result.metrics) == ("finished", [json.loads(last)])
    assert path.read_bytes() == whole
    assert train(config, tmp_path / "run").metrics == []
    assert path.read_bytes() == whole


def test_missing_evaluations_follow_the_options_of_the_new_start(config, uninterrupted, tmp_path):
    """A new evaluator and another `eval_every` count only at the step that is resumed from."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    changed = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=4))
    evaluators = [Evaluator("norm", 2, norm), Evaluator("mean", 5, mean)]
    assert train(changed, tmp_path / "run", evaluators=evaluators).status == "finished"
    assert evaluations(tmp_path / "run") == [
        (5, "held-out loss"),
        *((8, name) for name in ("held-out loss", "norm")),
        *((10, name) for name in ("held-out loss", "norm", "mean")),
    ]


def test_evaluations_of_older_versions_name_no_evaluator_and_are_not_repeated(
    config, uninterrupted, tmp_path, capfd
):
    shutil.copytree(uninterrupted, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    old = path.read_text().replace('"evaluator": "held-out loss", ', "")
    path.write_text(old)
    result = train(config, tmp_path / "run", evaluators=[Evaluator("norm", 5, norm)])
    assert (result.status, result.metrics) == ("finished", [])
    said = capfd.readouterr().err
    assert "has an evaluation of step 10 without the name of its evaluator" in said
    assert path.read_text() == old


def test_evaluators_with_the_same_name_are_refused(config, uninterrupted, tmp_path):
    for name in ("held-out loss", "norm"):
        twice = [Evaluator(name, 5, norm), Evaluator("norm", 7, norm)]
        with pytest.raises(ConfigError, match=f"2 evaluators are named '{name}', but"):
            train(config, tmp_path / "new", evaluators=twice)
    assert not (tmp_path / "new").exists()
    shutil.copytree(uninterrupted, tmp_path / "run")
    bad = Evaluator("size", 5, lambda model: {"step": 1.0})
    with pytest.raises(ConfigError, match="evaluator 'size' returned a value named 'step', but"):
        train(config, tmp_path / "run", evaluators=[bad])
    assert train(config, tmp_path / "run").metrics == []
