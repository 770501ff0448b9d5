"""Training runs as a whole: their files, skipped steps, mixtures and traces."""

import dataclasses
import json
import re
import shlex
import shutil
import signal
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import programs
import pytest
from training_runs import STEPS, assert_same_losses, at_step, latest_step, metrics

from retnet_jax.config import (
    ProfileConfig,
)
from retnet_jax.config.as_json import to_json
from retnet_jax.data import build_store
from retnet_jax.errors import ConfigError
from retnet_jax.programs.evaluate import print_evaluation
from retnet_jax.training.loop import train
from retnet_jax.training.step import make_step

ROOT = Path(__file__).parent.parent
# A whole run on eight devices; to save it, Orbax copies each array to the host.
pytestmark = pytest.mark.compiles(80, reason="whole runs, saved from eight devices")


def test_a_run_leaves_config_metrics_and_checkpoints(config, uninterrupted):
    assert (uninterrupted / "config.json").read_text() == to_json(config)
    lines = metrics(uninterrupted)
    assert list(lines) == list(range(1, STEPS + 1))
    assert lines[1]["loss"] == pytest.approx(np.log(257), rel=0.05)
    assert lines[STEPS]["loss"] < lines[1]["loss"]
    assert {"tokens_per_second", "goodput", "learning_rate"} <= set(lines[3])
    text = (uninterrupted / "metrics.jsonl").read_text()
    held_out = [json.loads(line) for line in text.splitlines() if "held_out_loss" in line]
    assert [line["step"] for line in held_out] == [5, 10]
    assert held_out[1]["held_out_loss"] < held_out[0]["held_out_loss"]
    assert latest_step(uninterrupted) == STEPS
    assert list(uninterrupted.glob("events.out.tfevents.*"))


@pytest.fixture(scope="module")
def mixture(config, tmp_path_factory):
    """Two stores, with contiguous windows and carried states."""
    directory = tmp_path_factory.mktemp("stores")
    stores = {}
    for name, pattern, weight in (
        ("tests", "test_*.py", 3.0),
        ("model", "../retnet_jax/**/*.py", 1.0),
    ):
        data = dataclasses.replace(
            config.data, path=str(ROOT / "tests" / pattern), store=str(directory / name)
        )
        stores[build_store(data, 257).directory] = weight
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, mixture=stores, windows="contiguous"),
        train=dataclasses.replace(config.train, carry_state=True, batch_size=16, micro_batches=2),
    )


@pytest.mark.slow
def test_carried_states_of_a_mixture_resume_exactly(mixture, tmp_path, monkeypatch, capfd):
    assert train(mixture, tmp_path / "whole").status == "finished"
    said = capfd.readouterr().err
    assert re.search(r"75\.0% of .*/tests: [\d,]+ tokens", said)
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: signal.raise_signal(signal.SIGTERM))
        assert train(mixture, tmp_path / "run").status == "stopped"
    assert latest_step(tmp_path / "run") < STEPS
    assert train(mixture, tmp_path / "run").status == "finished"
    assert_same_losses(tmp_path / "run", tmp_path / "whole")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    (held_out,) = [x for x in map(json.loads, lines) if x["step"] == 5 and "held_out_loss" in x]
    losses = [held_out[f"held_out_loss/{name}"] for name in ("tests", "model")]
    assert held_out["held_out_loss"] == pytest.approx(0.75 * losses[0] + 0.25 * losses[1])
    # Tokens are bytes, except for the BOS that ends a document.
    for name, loss in zip(("tests", "model"), losses, strict=True):
        assert held_out[f"held_out_bits_per_byte/{name}"] == pytest.approx(loss / np.log(2))
        assert held_out[f"held_out_perplexity/{name}"] == pytest.approx(np.exp(loss))
    print_evaluation(
        tmp_path / "whole",
        protocols=("window",),
        output=tmp_path / "result.json",
    )
    record = json.loads((tmp_path / "result.json").read_text())["protocols"]["window"]
    assert record["sources"].keys() == mixture.data.mixture.keys()
    for kind in ("documents", "tokens", "bytes"):
        assert sum(found[kind] for found in record["sources"].values()) == record[kind]
    bits = [found["bits_per_byte"] for found in record["sources"].values()]
    assert min(bits) < record["bits_per_byte"] < max(bits)
    plain = dataclasses.replace(
        mixture, train=dataclasses.replace(mixture.train, carry_state=False)
    )
    assert train(plain, tmp_path / "plain").status == "finished"
    carried, other = metrics(tmp_path / "whole"), metrics(tmp_path / "plain")
    assert carried[1]["loss"] == other[1]["loss"]
    assert carried[STEPS]["loss"] != other[STEPS]["loss"]


def test_stores_of_a_mixture_that_do_not_fit_are_named(mixture, tmp_path):
    (first, *_) = mixture.data.mixture
    for changes, message in (
        ({str(tmp_path / "nothing"): 1.0}, "nothing' is missing or damaged"),
        ({first: 1.0, first + "/": 1.0}, "two stores with the name 'tests'"),
    ):
        bad = dataclasses.replace(mixture, data=dataclasses.replace(mixture.data, mixture=changes))
        with pytest.raises(ConfigError, match=message):
            train(bad, tmp_path / "run")


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(config, tmp_path, capfd):
    optimizer = dataclasses.replace(
        config.optimizer, learning_rate=1e30, clip_norm=1e30, warmup_steps=0, weight_decay=0.0
    )
    train_config = dataclasses.replace(config.train, max_skipped=3, checkpoint_every=100)
    bad = dataclasses.replace(config, optimizer=optimizer, train=train_config)
    assert train(bad, tmp_path / "run").status == "diverged"
    errors = capfd.readouterr().err
    assert "step 2 is skipped: batch 1 has a loss of " in errors
    assert "the last 3 steps, up to step 4, were skipped" in errors
    assert "paragraph_" in errors.split("Their batches have parts of these documents:")[1]
    assert "--config.data.skip_batches='(1,2,3,)' resumes" in errors
    assert [line["loss"] for line in list(metrics(tmp_path / "run").values())[1:]] == [None] * 2
    # Without these batches it resumes from the newest checkpoint, here from the beginning.
    passing = dataclasses.replace(
        bad, data=dataclasses.replace(config.data, skip_batches=(1, 2, 3))
    )
    assert train(passing, tmp_path / "run").status == "diverged"
    errors = capfd.readouterr().err
    assert "resumed with a changed option: data.skip_batches: () -> (1, 2, 3)" in errors
    assert "step 2 is skipped: batch 4 has a loss of " in errors


def test_a_spike_is_skipped_and_the_run_continues(config, tmp_path, capfd):
    """One batch has targets that are unlike those of all others."""
    steps, spike = 66, 60
    train_config = dataclasses.replace(
        config.train, steps=steps, checkpoint_every=55, spike_deviations=6.0
    )
    long = dataclasses.replace(config, train=train_config)

    def spoiling(config, mesh, state_shape):
        step = make_step(config, state_shape)

        def spoilt(state, batch):
            if int(state.step) == spike - 1:
                batch = batch._replace(targets=jnp.full_like(batch.targets, 255))
            return step(state, batch)

        return spoilt

    result = train(long, tmp_path / "run", step=spoiling)
    assert (result.status, result.step) == ("finished", steps)
    said = capfd.readouterr().err
    assert re.findall(r"step (\d+) is skipped: batch (\d+)", said) == [("60", "59")]
    lines = metrics(tmp_path / "run")
    assert lines[60]["loss"] > lines[59]["loss"] + 1
    assert lines[61]["parameter_norm"] == lines[60]["parameter_norm"]
    assert lines[60]["parameter_norm"] != lines[59]["parameter_norm"]


def test_a_finished_run_is_left_as_it_is(config, uninterrupted, capfd):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert train(config, uninterrupted).status == "finished"
    said = capfd.readouterr().err
    assert "the run is finished" in said
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before
    places = dict(re.findall(r"^(checkpoint|metrics): +(.+)$", said, re.MULTILINE))
    assert list(places) == ["checkpoint", "metrics"]
    assert all(Path(place).exists() for place in places.values())


def test_the_commands_named_at_the_end_use_the_model(uninterrupted, config_file, tmp_path):
    workdir = tmp_path / "a run"
    shutil.copytree(uninterrupted, workdir)
    done = programs.run("train.py", f"--config={config_file}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    commands = re.findall(r"^(?:evaluate|generate): +python (.+)$", done.stderr, re.MULTILINE)
    evaluated, generated = map(shlex.split, commands)
    done = programs.run(*evaluated, "--protocol=window")
    assert "window of 16" in done.stdout, done.stderr
    done = programs.run(*generated, "--max_tokens=1")
    assert done.stdout.startswith("..."), done.stderr


def test_metrics_have_the_times_of_a_run(config, uninterrupted):
    lines = metrics(uninterrupted)
    for name in ("tokens_per_second", "step_seconds_p50", "training_seconds"):
        assert all(line[name] > 0 for line in lines.values())
    assert all(0 <= line["data_wait"] <= 1 for line in lines.values())
    assert all(0 < line["goodput"] <= 1 for line in lines.values())
    trained = [line["training_seconds"] for line in lines.values()]
    assert trained == sorted(trained)


@pytest.mark.slow
def test_a_trace_and_weights_and_biases(config, tmp_path, monkeypatch):
    """The trace has the traced steps, and Weights & Biases gets the logged metrics."""
    sent = []

    class Recorder:
        def log(self, values, step):
            sent.append((step, values))

        def finish(self):
            sent.append("finished")

    def init(**settings):
        assert (settings["project"], settings["resume"]) == ("retention", "allow")
        return Recorder()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    changed = dataclasses.replace(
        config,
        profile=ProfileConfig(start=3, steps=2),
        train=dataclasses.replace(config.train, steps=6, wandb="retention"),
    )
    assert train(changed, tmp_path / "run").status == "finished"
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert b"jit_train_step" in trace.read_bytes()
    assert sent[-1] == "finished"
    losses = {step: values["loss"] for step, values in sent[:-1] if "loss" in values}
    assert losses == {step: x["loss"] for step, x in metrics(tmp_path / "run").items()}
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"train.wandb='retention' needs the package wandb"):
        train(changed, tmp_path / "other")


def test_a_trace_of_finished_steps_is_reported_as_impossible(
    config, uninterrupted, tmp_path, capsys
):
    shutil.copytree(uninterrupted, tmp_path / "run")
    late = dataclasses.replace(config, profile=ProfileConfig(start=STEPS, steps=2))
    assert train(late, tmp_path / "run").status == "finished"
    said = f"no steps are traced: profile.start={STEPS} is already done; give a step after {STEPS}"
    assert said in capsys.readouterr().err
