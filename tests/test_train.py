"""train.py as a whole: what it leaves behind, how it resumes, and what it says when it cannot."""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from retnet_jax import interop, load_pretrained
from retnet_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ProfileConfig,
    TrainConfig,
)
from retnet_jax.config_json import config_from_json, to_json
from retnet_jax.data import BatchStream, build_store, number_of_windows, open_stores
from retnet_jax.data.tokenizers import ByteTokenizer
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.evaluation.run import evaluate
from retnet_jax.model import build_model
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.programs.evaluate import print_evaluation
from retnet_jax.runs.checkpoint import Checkpoints
from retnet_jax.runs.log import MetricsLog
from retnet_jax.runs.workdir import locked
from retnet_jax.training.held_out_loss import HeldOutLoss
from retnet_jax.training.loop import Evaluator, train
from retnet_jax.training.step import StepMetrics, loss_sum, make_step

ROOT = Path(__file__).parent.parent
STEPS = 10

# A whole run on eight devices, of which Orbax copies each array to the host.
pytestmark = pytest.mark.compiles(80, reason="whole runs, saved from eight devices")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A model of one layer on the paragraphs of the licence, bytes as tokens."""
    directory = tmp_path_factory.mktemp("data")
    for number, paragraph in enumerate((ROOT / "LICENSE").read_text().split("\n\n")):
        (directory / f"paragraph_{number:03}.txt").write_text(paragraph)
    return Config(
        model=ModelConfig(vocab_size=257, d_model=16, n_layers=1, n_heads=2),
        data=DataConfig(
            source="text",
            path=str(directory / "*.txt"),
            tokenizer="byte",
            store=str(directory / "store"),
            held_out=0.2,
            sequence_length=16,
        ),
        # The epsilon keeps Adam from making steps of the rounding of gradients near 0.
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, epsilon=1e-3),
        train=TrainConfig(
            steps=STEPS,
            batch_size=8,
            log_every=1,
            eval_every=5,
            eval_batches=2,
            checkpoint_every=4,
        ),
    )


def metrics(workdir):
    """The lines of metrics.jsonl with a loss, by step; no step may stand twice."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line]
    assert len({line["step"] for line in losses}) == len(losses)
    return {line["step"]: line for line in losses}


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert train(config, workdir).status == "finished"
    return workdir


def assert_same_losses(workdir, expected):
    actual, expected = metrics(workdir), metrics(expected)
    assert list(actual) == list(range(1, STEPS + 1))
    for step in actual:
        for name in ("loss", "gradient_norm", "learning_rate"):
            assert actual[step][name] == expected[step][name], (step, name)


def without_times(workdir):
    """The records of metrics.jsonl, in their order, without what the clock gave."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    computed = {"step", *StepMetrics._fields}
    return [
        line if "evaluator" in line else {name: line[name] for name in line if name in computed}
        for line in lines
    ]


def evaluations(workdir):
    """The steps and evaluators of the records that have one."""
    return [(x["step"], x["evaluator"]) for x in without_times(workdir) if "evaluator" in x]


def at_step(monkeypatch, step, action):
    """Calls `action` when the metrics of a step are written."""
    write = MetricsLog.write

    def patched(self, now, values):
        write(self, now, values)
        if now == step and "loss" in values:
            action()

    monkeypatch.setattr(MetricsLog, "write", patched)


def latest_step(workdir):
    checkpoints = Checkpoints(workdir / "checkpoints", keep=3)
    step = checkpoints.latest_step()
    checkpoints.close()
    return step


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


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_run_goes_on_exactly(
    config, uninterrupted, tmp_path, monkeypatch, number, capfd
):
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: signal.raise_signal(number))
        assert train(config, tmp_path / "run").status == "stopped"
    stopped = latest_step(tmp_path / "run")
    assert 6 <= stopped < STEPS
    assert f"{signal.Signals(number).name}: stopping after step {stopped}" in capfd.readouterr().err
    assert train(config, tmp_path / "run").status == "finished"
    assert_same_losses(tmp_path / "run", uninterrupted)


@pytest.fixture(scope="module")
def mixture(config, tmp_path_factory):
    """Two stores, read on row by row with the state carried."""
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
    # Bytes are the tokens, but for the BOS that ends a document.
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


WAITING = """
import sys, time
from pathlib import Path
from retnet_jax.runs import log

write = log.MetricsLog.write

def patched(self, step, values):
    write(self, step, values)
    if step == 5:  # steps are faster than the checkpoint of step 4
        while not (Path(sys.argv[-1].removeprefix("--workdir=")) / "checkpoints" / "4").exists():
            time.sleep(0.01)

log.MetricsLog.write = patched
exec(compile(Path("train.py").read_text(), "train.py", "exec"))
"""


def run_killed_at(config_file, workdir, step):
    """A run in a process of its own, killed with -9 when it has logged a step (or finished)."""
    command = [sys.executable, "-c", WAITING, f"--config={config_file}", f"--workdir={workdir}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if step is not None and line.startswith(f"step {step}/"):
            time.sleep(np.random.default_rng(step).uniform(0, 0.05))
            process.kill()
            break
    process.stderr.close()
    return process.wait(), lines


@pytest.fixture
def config_file(config, tmp_path):
    return write_config(config, tmp_path)


def write_config(config, directory):
    """A config as a file for the command line."""
    path = directory / "experiment.py"
    path.write_text(
        "from retnet_jax.config_json import config_from_json\n"
        f"def get_config(): return config_from_json({to_json(config)!r})\n"
    )
    return path


def test_killed_and_started_again_the_losses_are_the_same_bit_for_bit(
    config_file, uninterrupted, tmp_path
):
    assert run_killed_at(config_file, tmp_path / "run", 6)[0] == -signal.SIGKILL
    status, lines = run_killed_at(config_file, tmp_path / "run", None)
    assert status == 0, lines
    assert any(line.startswith("steps 4 to 10") for line in lines), lines
    assert_same_losses(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_killed_at_random_moments_again_and_again(config, tmp_path):
    """300 steps with a kill -9 wherever it falls: in steps, saves, start-up and evaluation.

    After one kill in three a bit of the newest checkpoint is flipped, if there is one before it.
    """
    steps, flipped = 300, 0
    soak = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=steps, checkpoint_every=7, eval_every=40),
    )
    path = write_config(soak, tmp_path)
    command = [sys.executable, "train.py", f"--config={path}"]
    random = np.random.default_rng(0)
    for start in range(100):
        with open(tmp_path / "said", "wb") as said:
            run = subprocess.Popen(
                [*command, f"--workdir={tmp_path}/run"], cwd=ROOT, stderr=said, stdout=said
            )
        if start < 15:
            end = time.monotonic() + 60
            while time.monotonic() < end and b"steps " not in (tmp_path / "said").read_bytes():
                time.sleep(0.05)
            time.sleep(random.uniform(0, 5))
            run.kill()
        if run.wait() == 0:
            break
        assert run.returncode == -signal.SIGKILL, (tmp_path / "said").read_text()
        if random.random() < 1 / 3:
            flipped += flip_a_bit_of_the_newest(tmp_path / "run" / "checkpoints", random)
    assert start >= 5
    assert flipped == len(list((tmp_path / "run" / "checkpoints").glob("*.damaged-*"))) > 0
    subprocess.run([*command, f"--workdir={tmp_path}/whole"], cwd=ROOT, check=True)
    assert list(metrics(tmp_path / "run")) == list(range(1, steps + 1))
    assert without_times(tmp_path / "run") == without_times(tmp_path / "whole")


def flip_a_bit_of_the_newest(checkpoints, random):
    """Flips a random bit in a random file of the newest of several checkpoints; whether it did."""
    steps = sorted(int(x.name) for x in checkpoints.glob("*") if x.name.isdecimal())
    if len(steps) < 2:
        return False
    newest = checkpoints / str(steps[-1])
    files = sorted(x for x in newest.rglob("*") if x.is_file() and x.stat().st_size)
    path = files[random.integers(len(files))]
    contents = bytearray(path.read_bytes())
    contents[random.integers(len(contents))] ^= 1 << random.integers(8)
    path.write_bytes(contents)
    return True


FULL_DISK = """
import resource, sys, time
from pathlib import Path
from retnet_jax.runs import log as metrics
from retnet_jax.programs import command_line

write = metrics.MetricsLog.write

def patched(self, step, values):
    write(self, step, values)
    if step == 5:
        while not (Path(sys.argv[-1].removeprefix("--workdir=")) / "checkpoints" / "4").exists():
            time.sleep(0.01)
        # Less than a checkpoint needs, more than metrics.jsonl does.
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))

metrics.MetricsLog.write = patched
if sys.argv.pop(1) == "freed":
    report = metrics.MetricsLog.say

    def freeing(self, message):
        report(self, message)
        if "could not be written" in message:
            infinity = resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (infinity, infinity))

    metrics.MetricsLog.say = freeing
from retnet_jax.programs.train import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["full to the end", "freed"])
def test_a_full_disk_costs_a_checkpoint_and_nothing_else(
    config, config_file, uninterrupted, tmp_path, disk
):
    """Files may not grow beyond 16 kB from step 5 on, or until the first failure is reported."""
    arguments = [disk, f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "-c", FULL_DISK, *arguments]
    environment = {x: os.environ[x] for x in os.environ if x != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert "a checkpoint could not be written" in done.stderr
    assert "the newest good one is of step 4" in done.stderr
    if disk == "freed":
        assert done.returncode == 0, done.stderr
        assert latest_step(tmp_path / "run") == STEPS
    else:
        assert done.returncode == 1, done.stderr
        assert latest_step(tmp_path / "run") == 4
        assert train(config, tmp_path / "run").status == "finished"
    assert_same_losses(tmp_path / "run", uninterrupted)


def test_steps_that_are_not_finite_are_passed_over_and_end_the_run(config, tmp_path, capfd):
    optimizer = dataclasses.replace(
        config.optimizer, learning_rate=1e30, clip_norm=1e30, warmup_steps=0
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
    # Without these batches, from the newest checkpoint: here from the beginning.
    passing = dataclasses.replace(
        bad, data=dataclasses.replace(config.data, skip_batches=(1, 2, 3))
    )
    assert train(passing, tmp_path / "run").status == "diverged"
    errors = capfd.readouterr().err
    assert "resumed with a changed option: data.skip_batches: () -> (1, 2, 3)" in errors
    assert "step 2 is skipped: batch 4 has a loss of " in errors


def test_a_spike_is_skipped_and_the_run_continues(config, tmp_path, capfd):
    """One batch whose targets are of another kind than all the others."""
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


def test_held_out_loss_is_the_mean_over_windows_for_every_batch_size(config, uninterrupted):
    """Their number divides by no batch: what fills the last one up has no weight."""
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


@pytest.mark.parametrize("step", [4, pytest.param(STEPS, marks=pytest.mark.slow)])
def test_an_evaluation_that_fails_costs_no_checkpoint(config, tmp_path, step):
    """It comes after the save of the same step, so a restart does not run into it unsaved."""

    def fail(model):
        raise MemoryError("out of memory")

    large = Evaluator("large", step, fail)
    for _ in range(2):
        with pytest.raises(MemoryError):
            train(config, tmp_path / "run", evaluators=[large])
        assert latest_step(tmp_path / "run") == step
    # Without it the run is finished, with nothing evaluated twice.
    assert train(config, tmp_path / "run").status == "finished"
    assert evaluations(tmp_path / "run") == [(5, "held-out loss"), (10, "held-out loss")]


def norm(model):
    return {"norm": float(np.linalg.norm(model.final_norm.scale[...]))}


def mean(model):
    return {"mean": float(np.mean(model.embedding[...]))}


def train_until_killed(config, workdir, step):
    """Ends this process with kill -9, in the second of three evaluators after a step is saved."""
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
        (4, 4, 0.0),
        pytest.param(8, 1000, 1e-9, marks=pytest.mark.slow),
        pytest.param(STEPS, 1000, 0.0, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_in_an_evaluation_makes_it_when_it_is_resumed(
    config, tmp_path, step, every, minutes, capfd
):
    """Once, so that metrics.jsonl is that of the run that was not killed; and before any step."""
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


def test_what_is_made_up_for_is_what_the_new_start_asks_for(config, uninterrupted, tmp_path):
    """A new evaluator and another `eval_every`, at the step that is resumed from and no other."""
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


def test_names_that_records_could_not_tell_apart_are_refused(config, uninterrupted, tmp_path):
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


def test_weights_that_are_not_finite_are_refused(config, tmp_path):
    model = build_model(config.model, rngs=nnx.Rngs(0))
    model.embedding[...] = model.embedding[...].at[3, 3].set(np.nan)
    interop.save(model, tmp_path / "model", "own")
    ByteTokenizer().save(tmp_path / "model")
    data = dataclasses.replace(config.data, store=str(tmp_path / "store"))
    begun = dataclasses.replace(config, data=data, init_from=str(tmp_path / "model"))
    with pytest.raises(CheckpointError, match=r"init_from=.*model has parameters .* NaN"):
        train(begun, tmp_path / "run")


def test_an_evaluator_is_added_without_touching_the_loop(config, uninterrupted, tmp_path):
    """What it computes is logged when it is due, and what train() returns is what was logged."""

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
    # The same call again finds the run finished, and takes no step.
    again = train(short, tmp_path / "run")
    assert (again.status, again.step, again.metrics) == ("finished", 7, [])


def test_a_finished_run_is_left_as_it_is(config, uninterrupted, capfd):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    assert train(config, uninterrupted).status == "finished"
    assert "the run is finished" in capfd.readouterr().err
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_another_config_is_refused_and_shown(config, uninterrupted):
    values = json.loads(to_json(config))
    values["model"]["d_model"] = 32
    other = config_from_json(json.dumps(values))
    with pytest.raises(ConfigError, match=r"model.d_model: 16 -> 32"):
        train(other, uninterrupted)


def test_a_directory_of_something_else_is_not_written_to(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"has files in it but no config.json"):
        train(config, tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("harm", ["cut off", "deleted"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    config, uninterrupted, tmp_path, harm, capfd
):
    shutil.copytree(uninterrupted, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / str(STEPS)
    path = next(path for path in (newest / "model").rglob("d/*") if path.stat().st_size > 64)
    if harm == "cut off":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    assert train(config, tmp_path / "run").status == "finished"
    said = capfd.readouterr().err
    assert f"checkpoint {newest} is damaged: model/" in said
    assert "it is renamed, and the previous checkpoint is used" in said
    assert "steps 8 to 10" in said
    assert_same_losses(tmp_path / "run", uninterrupted)
    assert len(list(newest.parent.glob(f"{STEPS}.damaged-*"))) == 1


def test_no_checkpoint_left_is_an_error(config, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    for directory in (tmp_path / "run" / "checkpoints").iterdir():
        (directory / "model" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)8 is damaged.*there is no other checkpoint"):
        train(config, tmp_path / "run")


def test_a_store_that_was_built_again_from_other_text_is_refused(config, tmp_path):
    """By the run that is resumed, and by the evaluation of what it would call held out."""
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " * 20)
    data = dataclasses.replace(
        config.data, path=str(tmp_path / "*.txt"), store=str(tmp_path / "store")
    )
    short = dataclasses.replace(config.train, steps=3)
    run = dataclasses.replace(config, data=data, train=short)
    assert train(run, tmp_path / "run").status == "finished"
    shutil.rmtree(tmp_path / "store")
    assert train(run, tmp_path / "run").status == "finished"  # built again, the same
    (tmp_path / "7.txt").write_text("another text " * 20)
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(ConfigError, match=r"store' holds other data .* than when the run in"):
        train(run, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"store' holds other data"):
        evaluate(tmp_path / "run")


def test_a_workdir_that_is_moved_while_training_loses_nothing(
    config, uninterrupted, tmp_path, monkeypatch, capfd
):
    """Where it was there is a whole workdir again, with the state from the next save on."""

    def move():
        while not (tmp_path / "run" / "checkpoints" / "4").exists():
            time.sleep(0.01)
        shutil.move(tmp_path / "run", tmp_path / "moved")

    with monkeypatch.context() as patch:
        at_step(patch, 5, move)
        assert train(config, tmp_path / "run").status == "finished"
    said = capfd.readouterr().err
    assert "the workdir was moved or deleted during training: it is written again from" in said
    before, after = metrics(tmp_path / "moved"), metrics(tmp_path / "run")
    assert sorted([*before, *after]) == list(range(1, STEPS + 1))
    expected = metrics(uninterrupted)
    for step, line in (before | after).items():
        assert line["loss"] == expected[step]["loss"]
    assert latest_step(tmp_path / "run") == STEPS
    assert train(config, tmp_path / "run").status == "finished"


def test_a_workdir_that_cannot_be_written_to_is_named(config, tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ConfigError, match=r"--workdir=.*file/run cannot be written to"):
        train(config, tmp_path / "file" / "run")


def test_a_workdir_in_use_is_refused(config, tmp_path):
    with (
        locked(epath.Path(tmp_path / "run")),
        pytest.raises(ConfigError, match=rf"is in use by another run \(process {os.getpid()} on "),
    ):
        train(config, tmp_path / "run")


def test_how_a_run_is_computed_may_change(config, uninterrupted, tmp_path, capfd):
    """Stopped on one mesh and gone on with on another, with another split of the batch."""
    other = dataclasses.replace(
        config,
        mesh=MeshConfig(data=2, fsdp=2, seq=2),
        train=dataclasses.replace(config.train, micro_batches=2),
    )
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(STEPS))
    assert train(other, tmp_path / "run").status == "finished"
    said = capfd.readouterr().err
    assert "resumed with a changed option: mesh.fsdp: 1 -> 2" in said
    assert "steps 8 to 10" in said
    found, expected = metrics(tmp_path / "run"), metrics(uninterrupted)
    assert found.keys() == expected.keys()
    for step in expected:
        assert found[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-5)


def test_a_run_goes_on_with_the_seconds_it_has(config, uninterrupted):
    lines = metrics(uninterrupted)
    for name in ("tokens_per_second", "step_seconds_p50", "training_seconds"):
        assert all(line[name] > 0 for line in lines.values())
    assert all(0 <= line["data_wait"] <= 1 for line in lines.values())
    assert all(0 < line["goodput"] <= 1 for line in lines.values())
    trained = [line["training_seconds"] for line in lines.values()]
    assert trained == sorted(trained)


@pytest.mark.slow
def test_a_trace_and_weights_and_biases(config, tmp_path, monkeypatch):
    """The trace holds the traced steps; what Weights & Biases would get is what is logged."""
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


def test_a_trace_of_steps_that_are_done_is_said_not_to_come(
    config, uninterrupted, tmp_path, capsys
):
    shutil.copytree(uninterrupted, tmp_path / "run")
    late = dataclasses.replace(config, profile=ProfileConfig(start=STEPS, steps=2))
    assert train(late, tmp_path / "run").status == "finished"
    said = f"no steps are traced: profile.start={STEPS} is already done; give a step after {STEPS}"
    assert said in capsys.readouterr().err


def test_another_tokenizer_is_refused(config, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").write_text(
        '{"model": {"type": "BPE", "vocab": {"<bos>": 0}, "merges": []}}'
    )
    with pytest.raises(ConfigError, match=r"tokenizer"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.stepz=3"], "config.train.stepz: no such field; did you mean train.steps"),
        (["--config.train.steps=many"], "--config.train.steps=many: 'many' is no integer"),
        (["--config.model.n_heads=3"], "is not divisible by model.n_heads=3"),
        (["--config.train.batch_size=12", "--config.mesh.data=8"], "batch_size"),
        (["steps=3"], "'steps=3' is not a flag"),
    ],
)
def test_command_line_errors_are_one_message(config_file, tmp_path, arguments, message):
    command = ["train.py", f"--config={config_file}", f"--workdir={tmp_path}/run"]
    done = programs.run(*command, *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
