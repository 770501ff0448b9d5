"""Several real processes on this machine, which train, evaluate, save, and are killed."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import programs
import pytest
from training_runs import STEPS, latest_step, metrics

from retnet_jax.errors import ConfigError
from retnet_jax.parallel import processes, rendezvous
from retnet_jax.training.loop import train

ROOT = Path(__file__).parent.parent
DEVICES = 8  # of all processes together; the process of the tests has the same number


def assert_losses_of(workdir, expected):
    """Equal up to rounding: several processes sum in another order than one."""
    actual, expected = metrics(workdir), metrics(expected)
    assert list(actual) == list(range(1, STEPS + 1))
    for step in actual:
        for name in ("loss", "parameter_norm"):
            assert actual[step][name] == pytest.approx(expected[step][name], rel=1e-5)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Group:
    """Processes of one program that connect to each other."""

    def __init__(self, program, count, *arguments, each=lambda index: [], devices=None):
        address = f"localhost:{free_port()}"
        devices = devices or [DEVICES // count] * count
        self.members = [
            subprocess.Popen(
                [
                    *(sys.executable, program, *map(str, arguments), *each(index)),
                    f"--coordinator_address={address}",
                    f"--num_processes={count}",
                    f"--process_id={index}",
                ],
                cwd=ROOT,
                env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices[index])},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]

    def ends(self, seconds=120):
        """The exit status, output and messages of each process, which must end within `seconds`."""
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
        """Reads the log of process 0 until it has a step."""
        for line in self.members[0].stderr:
            if line.startswith(f"step {step}/"):
                return
        raise AssertionError(f"step {step} never came")


def training(count, config_file, workdir, *arguments):
    return Group("train.py", count, f"--config={config_file}", f"--workdir={workdir}", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_like_one(count, config_file, uninterrupted, tmp_path):
    """Before and after a SIGTERM to one of them, which stops all at the same step."""
    group = training(count, config_file, tmp_path / "run")
    group.wait_for_step(5)
    group.members[-1].send_signal(signal.SIGTERM)
    ends = group.ends()
    assert [status for status, *_ in ends] == [0] * count, ends
    assert "SIGTERM: stopping after step" in ends[0][2]
    stopped = latest_step(tmp_path / "run")
    assert 5 <= stopped < STEPS
    assert all("step" not in errors for _, _, errors in ends[1:])  # only process 0 logs
    ends = training(count, config_file, tmp_path / "run").ends()
    assert [status for status, *_ in ends] == [0] * count, ends
    assert f"steps {stopped} to {STEPS}" in ends[0][2]
    assert_losses_of(tmp_path / "run", uninterrupted)
    starts = [json.loads(x) for x in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert [(x["step"], x["processes"]) for x in starts] == [(0, count), (stopped, count)]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.slow
def test_when_one_process_is_killed_the_others_end_and_fewer_resume(
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
    # One process with the devices of both.
    assert train(config, tmp_path / "run").status == "finished"
    assert_losses_of(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_processes_agree_on_the_evaluation_that_is_missing(config_file, uninterrupted, tmp_path):
    """The first reads in metrics.jsonl what was made, and all evaluate."""
    shutil.copytree(uninterrupted, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    *others, last = path.read_text().splitlines(keepends=True)
    path.write_text("".join(others))
    for _ in range(2):
        ends = training(2, config_file, tmp_path / "run").ends()
        assert [status for status, *_ in ends] == [0, 0], ends
        assert path.read_text().startswith("".join(others))
        (found,) = path.read_text().splitlines()[len(others) :]
        found, expected = json.loads(found), json.loads(last)
        assert found.pop("evaluator") == expected.pop("evaluator")
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_several_processes_evaluate_like_one(uninterrupted, tmp_path):
    arguments = [f"--workdir={uninterrupted}", "--batch_size=8", "--suite=paper", "--shots=1"]
    arguments += ["--tasks=copa", f"--data={ROOT}/tests/tasks"]
    ends = Group("eval.py", 2, *arguments, f"--output={tmp_path / 'two.json'}").ends()
    assert [status for status, *_ in ends] == [0, 0], ends
    assert "bits/byte" in ends[0][1]
    assert "bits/byte" not in ends[1][1]
    single = subprocess.run(
        [sys.executable, "eval.py", *arguments, f"--output={tmp_path / 'one.json'}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert b"bits/byte" in single.stdout
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    for protocol in ("window", "stateful"):
        bits = [x["protocols"][protocol]["bits_per_byte"] for x in (one, two)]
        assert bits[0] == pytest.approx(bits[1], rel=1e-6)
    assert one["tasks"] == two["tasks"]


@pytest.mark.slow
def test_processes_with_different_configs_are_refused(config_file, tmp_path):
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


def test_an_unreachable_coordinator_is_named(config_file, tmp_path):
    command = ["train.py", f"--config={config_file}", f"--workdir={tmp_path}/run"]
    flags = ["--coordinator_address=localhost:1", "--num_processes=2", "--process_id=1"]
    done = programs.run(*command, *flags, "--connect_seconds=2")
    assert done.returncode == 2, done.stderr
    assert "--coordinator_address=localhost:1 could not be reached" in done.stderr
    done = programs.run(*command, *flags[:2])
    assert done.returncode == 2, done.stderr
    assert "belong together" in done.stderr


# A program with the arguments of `connect`. Process 1 allocates more memory than there is.
OUT_OF_MEMORY = """
import sys
import jax.numpy as jnp
from retnet_jax.parallel import processes
address, count, index = (argument.partition("=")[2] for argument in sys.argv[1:])
processes.connect(address, int(count), int(index), 60)
with processes.ending_with_the_others("Advice."):
    if index == "1":
        jnp.zeros((1 << 30, 1 << 14)).block_until_ready()
    processes.gather_texts("x" * 100_000)
"""


@pytest.mark.slow
def test_an_error_in_one_process_is_reported_there_as_its_own(tmp_path):
    """It takes HEARTBEAT_SECONDS until the other process ends."""
    program = tmp_path / "program.py"
    program.write_text(OUT_OF_MEMORY)
    (first, _, gone), (second, _, own) = Group(str(program), 2).ends()
    # JAX may kill the other process (-6) before that sees that an operation has failed.
    assert first in (1, -signal.SIGABRT), gone
    assert second == 1, own
    assert "Traceback" in own
    assert "process 1 of 2 ends after an error of its own, and the others with it. Advice." in own
    assert "because another" not in own
    assert re.search("process 0 of 2 end.* another", gone), gone
    assert "error of its own" not in gone


@pytest.mark.parametrize(
    ("message", "others"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes.", False),
        ("INTERNAL: NCCL operation failed: Cuda failure 'out of memory'", False),
        ("INTERNAL: cuBLAS error", False),
        ("FAILED_PRECONDITION: Gloo all-reduce failed: Connection closed by peer", True),
        ("INTERNAL: NCCL operation failed: remote process exited or there was a network", True),
        ("UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats)", True),
    ],
)
def test_messages_of_xla_about_other_processes_are_recognised(message, others):
    assert processes.is_about_others(message) == others


@pytest.mark.slow
def test_processes_with_different_numbers_of_devices_are_refused(config_file, tmp_path):
    group = Group(
        "train.py", 2, f"--config={config_file}", f"--workdir={tmp_path}/run", devices=[4, 2]
    )
    for status, _, errors in group.ends():
        assert status == 2, errors
        assert "different numbers of devices (process 0 has 4, process 1 has 2)" in errors
        assert "Traceback" not in errors


def test_a_process_by_itself_ends_with_one_line(config_file, tmp_path):
    """One that the others never join, one at whose port something else is, one without srun."""
    command = [sys.executable, "train.py", f"--config={config_file}", f"--workdir={tmp_path}/run"]
    never = f"localhost:{free_port()}"
    with socket.create_server(("", free_port())) as other:
        taken = f"localhost:{other.getsockname()[1]}"
        first = ["--num_processes=2", "--process_id=0", "--connect_seconds=1"]
        expected = {
            f"--coordinator_address={never}": "waited 1 s, but of --num_processes=2 these did not",
            f"--coordinator_address={taken}": f"another program uses port {taken[10:]} of this",
            "--noconfig.data.strict": "SLURM_NTASKS=4 says that this is one of several processes",
        }
        slurm = [{}, {}, {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "3"}]
        started = [
            subprocess.Popen(
                [*command, flag, *([] if more else first)],
                cwd=ROOT,
                env=os.environ | more,
                stderr=subprocess.PIPE,
                text=True,
            )
            for flag, more in zip(expected, slurm, strict=True)
        ]
        for process, message in zip(started, expected.values(), strict=True):
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 2, errors
            (line,) = errors.splitlines()
            assert message in line
    assert not (tmp_path / "run").exists()


def meet(*arguments):
    """The error of `meet`, or "met"."""
    try:
        rendezvous.meet(*arguments)
    except ConfigError as error:
        return str(error)
    return "met"


def together(calls):
    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(lambda arguments: meet(*arguments), calls))


def test_processes_meet_or_raise_an_error_of_one_line():
    port = free_port()
    address = f"localhost:{port}"
    for _ in range(2):  # the second time shows that the port is free again
        assert together([(address, 3, i, 60) for i in (2, 0, 1)]) == ["met"] * 3
    missing, waiting = together([(address, 3, 0, 1), (address, 3, 2, 1)])
    assert "waited 1 s, but of --num_processes=3 these did not connect: 1; start them" in missing
    assert f"{address} could not be reached" in waiting
    with socket.create_server(("", port)) as other:
        assert f"another program uses port {port} of this" in meet(address, 2, 0, 1)
        with ThreadPoolExecutor(1) as thread:
            asked = thread.submit(meet, address, 2, 1, 60)
            with other.accept()[0] as connection:
                connection.sendall(b"SSH-2.0\n")
            assert "another program than process 0 of this run answers there" in asked.result()
    assert "is not HOST:PORT" in meet("localhost", 2, 0, 1)


def test_processes_with_another_count_or_an_equal_number_are_refused(tmp_path):
    address = f"localhost:{free_port()}"
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(meet, address, 3, 0, 60)
        assert "process 0 has --num_processes=3, but process 1 has 2" in meet(address, 2, 1, 60)
        one, other = (threads.submit(meet, address, 3, 1, 60) for _ in range(2))
        told = next(iter(as_completed([one, other]))).result()
        assert "another process has --process_id=1 too" in told
        assert meet(address, 3, 2, 60) == "met"
        assert first.result() == "met"
        assert {one.result(), other.result()} == {"met", told}


def test_the_environment_of_slurm_and_mpi(monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.setenv(name, "")
    processes.connect(None, None, None)  # a single process
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="OMPI_COMM_WORLD_SIZE=two in the environment is not a"):
        processes.connect(None, None, None)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(ConfigError, match=r"SLURM_NTASKS=4 .* srun did not start it .*--num_proc"):
        processes.connect(None, None, None)
    processes.connect(None, 1, None)  # a single process in spite of SLURM_NTASKS


SLICES = "ACCELERATOR_TYPE: 'v5p-8'\nMEGASCALE_NUM_SLICES: '2'\n"


@pytest.mark.parametrize(
    ("attributes", "several"),
    [
        ({"worker-network-endpoints": "10.0.0.1,10.0.0.2"}, True),
        ({"worker-network-endpoints": "10.0.0.1", "tpu-env": "ACCELERATOR_TYPE: 'v5p-8'"}, False),
        ({"worker-network-endpoints": "10.0.0.1", "tpu-env": SLICES}, True),
    ],
)
def test_the_hosts_of_a_tpu_slice_are_in_the_metadata(attributes, several, monkeypatch):
    errors = [503]  # once

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.partition("/computeMetadata/v1/instance/attributes/")[2]
            known = name in attributes and self.headers["Metadata-Flavor"] == "Google"
            status = errors.pop() if errors else 200 if known else 404
            self.send_response(status)
            self.end_headers()
            self.wfile.write(attributes[name].encode() if status == 200 else b"")

        def log_message(self, *_):
            pass

    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", *_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # as jax does without a TPU
        assert not processes._in_cluster()
        assert errors
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
        assert processes._in_cluster() == several
        assert not errors
        server.shutdown()
    assert not processes._in_cluster()  # nobody answers any more


def test_metadata_that_cannot_be_had_are_an_error(monkeypatch):
    class Failing(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(503)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(processes.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    with HTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        with pytest.raises(ConfigError, match=r"answer 503.*--num_processes=1"):
            processes._is_of_tpu_slice()
        server.shutdown()


_VARIABLES = (*processes._TPU_HOSTS, *processes._COORDINATORS)
