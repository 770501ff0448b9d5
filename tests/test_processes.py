"""Several real processes on this machine: training, evaluation, checkpoints, and their deaths."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import programs
import pytest
from test_train import STEPS, config, config_file, latest_step, metrics, uninterrupted

from retnet_jax.training.loop import train

__all__ = ["config", "config_file", "uninterrupted"]  # fixtures

ROOT = Path(__file__).parent.parent
DEVICES = 8  # in all, as in the tests' own process


def assert_losses_of(workdir, expected):
    """To rounding: processes sum up in another order than devices of one."""
    actual, expected = metrics(workdir), metrics(expected)
    assert list(actual) == list(range(1, STEPS + 1))
    for step in actual:
        for name in ("loss", "parameter_norm"):
            assert actual[step][name] == pytest.approx(expected[step][name], rel=1e-5)


class Group:
    """Processes of one program that find each other."""

    def __init__(self, program, count, *arguments, each=lambda index: []):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(DEVICES // count)}
        self.members = [
            subprocess.Popen(
                [
                    *(sys.executable, program, *map(str, arguments), *each(index)),
                    f"--coordinator_address={address}",
                    f"--num_processes={count}",
                    f"--process_id={index}",
                ],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]

    def ends(self, seconds=120):
        """The exit status, output and messages of each, which have so long to end."""
        found = []
        end = time.monotonic() + seconds
        try:
            for member in self.members:
                output, errors = member.communicate(timeout=end - time.monotonic())
                found.append((member.returncode, output, errors))
        finally:
            for member in self.members:
                member.kill()
        return found

    def wait_for_step(self, step):
        """Reads what the first says until it has logged a step."""
        for line in self.members[0].stderr:
            if line.startswith(f"step {step}/"):
                return
        raise AssertionError(f"step {step} never came")


def training(count, config_file, workdir, *arguments):
    return Group("train.py", count, f"--config={config_file}", f"--workdir={workdir}", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes_train_what_one_does(count, config_file, uninterrupted, tmp_path):
    """Before and after one of them had a SIGTERM, which ends all at the same step."""
    group = training(count, config_file, tmp_path / "run")
    group.wait_for_step(5)
    group.members[-1].send_signal(signal.SIGTERM)
    ends = group.ends()
    assert [status for status, *_ in ends] == [0] * count, ends
    assert "SIGTERM: stopping after step" in ends[0][2]
    stopped = latest_step(tmp_path / "run")
    assert 5 <= stopped < STEPS
    assert all("step" not in errors for _, _, errors in ends[1:])  # one logs
    ends = training(count, config_file, tmp_path / "run").ends()
    assert [status for status, *_ in ends] == [0] * count, ends
    assert f"steps {stopped} to {STEPS}" in ends[0][2]
    assert_losses_of(tmp_path / "run", uninterrupted)
    starts = [json.loads(x) for x in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert [(x["step"], x["processes"]) for x in starts] == [(0, count), (stopped, count)]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.slow
def test_when_one_is_killed_the_others_end_and_fewer_go_on(
    victim, config, config_file, uninterrupted, tmp_path
):
    group = training(2, config_file, tmp_path / "run")
    group.wait_for_step(9)  # by then the checkpoint of step 4 is written
    group.members[victim].kill()
    (survivor,) = [x for i, x in enumerate(group.ends(seconds=60)) if i != victim]
    status, _, errors = survivor
    assert status not in (0, -signal.SIGKILL)
    assert re.search(f"process {1 - victim} of 2 end.* another", errors), errors
    assert "The same command resumes from the newest checkpoint" in errors
    assert latest_step(tmp_path / "run") in (4, 8)
    assert train(config, tmp_path / "run").status == "finished"  # one process, as many devices
    assert_losses_of(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_processes_evaluate_what_one_does(uninterrupted, tmp_path):
    arguments = [f"--workdir={uninterrupted}", "--batch_size=8", "--suite=paper", "--shots=1"]
    arguments += ["--tasks=copa", f"--data={ROOT}/tests/tasks"]
    ends = Group("eval.py", 2, *arguments, f"--output={tmp_path / 'two.json'}").ends()
    assert [status for status, *_ in ends] == [0, 0], ends
    assert "bits/byte" in ends[0][1]
    assert "bits/byte" not in ends[1][1]
    alone = subprocess.run(
        [sys.executable, "eval.py", *arguments, f"--output={tmp_path / 'one.json'}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert b"bits/byte" in alone.stdout
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    for protocol in ("window", "stateful"):
        bits = [x["protocols"][protocol]["bits_per_byte"] for x in (one, two)]
        assert bits[0] == pytest.approx(bits[1], rel=1e-6)
    assert one["tasks"] == two["tasks"]


def test_processes_that_were_not_started_alike_are_refused(config_file, tmp_path):
    group = Group(
        "train.py",
        2,
        f"--config={config_file}",
        f"--workdir={tmp_path / 'run'}",
        each=lambda index: [f"--config.train.seed={index}"],
    )
    for status, _, errors in group.ends():
        assert status == 2, errors
        assert "processes 0 and 1 were not started alike" in errors
        assert "config.train.seed: 0, in process 1 1" in errors
    assert not (tmp_path / "run").exists()


def test_a_coordinator_that_is_not_there_is_named(config_file, tmp_path):
    command = ["train.py", f"--config={config_file}", f"--workdir={tmp_path}/run"]
    flags = ["--coordinator_address=localhost:1", "--num_processes=2", "--process_id=1"]
    done = programs.run(*command, *flags, "--connect_seconds=2")
    assert done.returncode == 2, done.stderr
    assert "--coordinator_address=localhost:1 cannot be reached" in done.stderr
    done = programs.run(*command, *flags[:2])
    assert done.returncode == 2, done.stderr
    assert "belong together" in done.stderr
