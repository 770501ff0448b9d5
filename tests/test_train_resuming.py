"""Training runs that are killed, stopped or damaged resume as if nothing had happened."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from training_runs import (
    STEPS,
    assert_same_losses,
    at_step,
    latest_step,
    metrics,
    without_times,
    write_config,
)

from retnet_jax.config import (
    MeshConfig,
)
from retnet_jax.errors import CheckpointError
from retnet_jax.training.loop import train

ROOT = Path(__file__).parent.parent
# A whole run on eight devices; to save it, Orbax copies each array to the host.
pytestmark = pytest.mark.compiles(80, reason="whole runs, saved from eight devices")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_run_resumes_exactly(
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
    """Runs train.py in a process, and kills it with -9 when it has logged a step, unless None."""
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
    """300 steps with kill -9 at random times: in steps, saves, start-up and evaluation.

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
    """Flips a random bit of the newest checkpoint if there are several; whether it did."""
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
        # Too little for a checkpoint, enough for metrics.jsonl.
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
    # The cache of compiled programs would be full too.
    arguments = [disk, f"--config={config_file}", "--compilation_cache=off"]
    arguments.append(f"--workdir={tmp_path / 'run'}")  # the last, as FULL_DISK has it
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


@pytest.mark.parametrize("harm", ["cut off", "deleted"])
def test_a_damaged_checkpoint_is_renamed_and_the_previous_one_is_used(
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
    assert "it is renamed, and an older checkpoint is used" in said
    assert "steps 8 to 10" in said
    assert_same_losses(tmp_path / "run", uninterrupted)
    assert len(list(newest.parent.glob(f"{STEPS}.damaged-*"))) == 1


def test_no_checkpoint_left_is_an_error_as_often_as_it_is_tried(config, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    for directory in checkpoints.iterdir():
        (directory / "model" / "_METADATA").unlink()
    names = sorted(path.name for path in checkpoints.iterdir())
    for _ in range(2):  # the second does not begin the run anew
        with pytest.raises(CheckpointError, match=r"(?s)8 is damaged.*there is no other checkp"):
            train(config, tmp_path / "run")
    assert sorted(path.name for path in checkpoints.iterdir()) == names
    for path in checkpoints.iterdir():  # as runs did when all checkpoints were damaged
        path.rename(path.with_name(f"{path.name}.damaged-1"))
    with pytest.raises(CheckpointError, match=r"8\.damaged-1 was found damaged before"):
        train(config, tmp_path / "run")


def test_a_workdir_that_is_moved_while_training_loses_nothing(
    config, uninterrupted, tmp_path, monkeypatch, capfd
):
    """At the old place there is a whole workdir again, from the next save on."""

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


def test_how_a_run_is_computed_may_change(config, uninterrupted, tmp_path, capfd):
    """Stopped on one mesh and resumed on another, with another number of micro-batches."""
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
