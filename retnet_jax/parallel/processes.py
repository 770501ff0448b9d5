"""Several processes that train one model: how they connect, agree, and stop together.

They use `jax.distributed`: a service in process 0 with which all others stay connected. When one
process dies, JAX ends the others within `HEARTBEAT_SECONDS`, so that none waits for ever. The same
command then resumes from the newest checkpoint, with any number of processes.
"""

import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from retnet_jax.config import Config
from retnet_jax.config.as_json import flatten
from retnet_jax.errors import CheckpointError, ConfigError, DamagedCheckpointError, brief
from retnet_jax.parallel.rendezvous import meet
from retnet_jax.provenance import code_fingerprint

T = TypeVar("T")

HEARTBEAT_SECONDS = 30


def connect(
    coordinator: str | None, count: int | None, index: int | None, seconds: int = 300
) -> None:
    """Connects the processes of this run, before jax is used; for a single process a no-op.

    Args:
      coordinator: HOST:PORT of process 0; None: found by JAX in TPU pods, SLURM and MPI.
      count: Number of processes. 1 without a coordinator: a single process, even in SLURM or MPI.
      index: Number of this process, from 0.
      seconds: Time to wait for the other processes.

    Raises:
      ConfigError: if only some of the arguments are given; if the coordinator or other processes
        do not connect in time; if processes have different numbers of devices.
    """
    given = (coordinator, count, index)
    if count == 1 and coordinator is None:
        return
    if all(x is None for x in given) and not _in_cluster():
        return
    if None in given and any(x is not None for x in given):
        raise ConfigError(
            "--coordinator_address, --num_processes and --process_id belong together; "
            f"given are {coordinator}, {count} and {index}"
        )
    if coordinator is not None and count is not None and index is not None:
        if not 0 <= index < count:
            raise ConfigError(f"--process_id={index} is not one of --num_processes={count}")
        meet(coordinator, count, index, seconds)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the processes of this run did not connect within {seconds} s, with the coordinator "
            f"{coordinator or 'of the cluster'}: {brief(error, 300)}. A single process is started "
            "with --num_processes=1"
        ) from error
    _check_devices()


def _check_devices() -> None:
    """Raises `ConfigError` in all processes if they have different numbers of devices."""
    counts = Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        each = ", ".join(f"process {index} has {n}" for index, n in sorted(counts.items()))
        raise ConfigError(
            f"the processes have different numbers of devices ({each}): give all the same number, "
            "for example with CUDA_VISIBLE_DEVICES, or JAX_NUM_CPU_DEVICES on CPUs"
        )


def _in_cluster() -> bool:
    """Whether the environment says that this is one of several processes.

    Raises:
      ConfigError: if this is a SLURM job of several processes, but srun did not start them.
    """
    slurm = _number("SLURM_NTASKS") > 1
    if slurm and not os.environ.get("SLURM_STEP_NODELIST"):
        raise ConfigError(
            f"SLURM_NTASKS={os.environ['SLURM_NTASKS']} says that this is one of several processes "
            "of a job, but srun did not start it (SLURM_STEP_NODELIST is not set): start the "
            "program with srun, or as a single process with --num_processes=1"
        )
    several = slurm or _number("OMPI_COMM_WORLD_SIZE") > 1
    several |= any("," in os.environ.get(name, "") for name in _TPU_HOSTS)
    several |= any(os.environ.get(name) for name in _COORDINATORS)
    return several or _is_of_tpu_slice()


# Variables of a TPU slice on GKE, and those that name a coordinator.
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_COORDINATORS = ("JAX_COORDINATOR_ADDRESS", "MEGASCALE_COORDINATOR_ADDRESS")


def _is_of_tpu_slice() -> bool:
    """Whether Google's metadata name several hosts of this TPU slice, or several slices.

    So it is on VMs made with gcloud. jax asks them for the numbers and addresses of the hosts.
    """
    if "TPU_SKIP_MDS_QUERY" in os.environ:  # jax sets it when it is imported without a TPU
        return False
    slices = re.search(r"MEGASCALE_NUM_SLICES\W+(\d+)", _metadata("tpu-env"))
    several_slices = slices is not None and int(slices[1]) > 1
    return several_slices or "," in _metadata("worker-network-endpoints")


def _metadata(name: str) -> str:
    """An attribute of this virtual machine on Google Cloud; "" if there is none, or elsewhere."""
    address = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{address}/computeMetadata/v1/instance/attributes/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for wait in (0.5, 1, 2, 4, None):
        try:
            with without_proxy.open(request, timeout=10) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code < 500:  # not set
                return ""
            if wait is None:
                raise ConfigError(
                    f"Google's metadata at {address} answer {error.code}, so the hosts of this TPU "
                    "slice are not known: start again, or a single process with --num_processes=1"
                ) from error
            time.sleep(wait)
        except (OSError, http.client.HTTPException, ValueError):  # not on Google Cloud
            break
    return ""


def _number(variable: str) -> int:
    """A number of processes from the environment; 1 if it is unset or empty."""
    text = os.environ.get(variable, "").strip() or "1"
    if not text.isdecimal():
        raise ConfigError(
            f"{variable}={text} in the environment is not a number of processes: unset it, or "
            "start a single process with --num_processes=1"
        )
    return int(text)


def is_first() -> bool:
    """Whether this is process 0, which logs and writes files."""
    return jax.process_index() == 0


def gather_texts(text: str) -> list[str]:
    """The texts of all processes, in the order of their numbers; all have to call it."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    padded = np.pad(data, (0, int(sizes.max()) - len(data)))
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def facts() -> dict[str, str | int]:
    """The hardware and software of this run, for its log."""
    return {
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "code": code_fingerprint(),
    }


def check_alike(config: Config) -> None:
    """Raises `ConfigError` in all processes if one has another config, code or jax than process 0.

    The error lists the differences.
    """
    described = {f"config.{name}": value for name, value in flatten(config).items()} | {
        "jax": jax.__version__,
        "code of retnet_jax": code_fingerprint(),
    }
    lines = "\n".join(f"{name}: {value!r}" for name, value in described.items())
    first, *others = (text.splitlines() for text in gather_texts(lines))
    for index, other in enumerate(others, start=1):
        changes = [
            f"  {mine}, in process {index} {theirs.partition(': ')[2]}"
            for mine, theirs in zip(first, other, strict=False)
            if mine != theirs
        ]
        if other != first:
            raise ConfigError(
                f"processes 0 and {index} were not started alike:\n" + "\n".join(changes)
            )


def once(action: Callable[[], T]) -> T | None:
    """Calls `action` in process 0. All processes wait for it, and raise its error.

    Returns:
      The result of the action in process 0; None in the other processes.

    Raises:
      ConfigError, CheckpointError: if the action raised it.
    """
    return together(action if is_first() else lambda: None)


def together(action: Callable[[], T]) -> T:
    """Calls `action` in every process. All wait for all, and all raise if one of them did.

    Returns:
      The result of the action in this process.

    Raises:
      ConfigError, CheckpointError: if the action raised it: this process's own error, or else that
        of the first process with one.
    """
    try:
        result = action()
    except _SHARED as error:
        _tell_all(error)
        raise
    for text in _tell_all(None):
        kind, _, message = text.partition("\n")
        for error in _SHARED:
            if kind == error.__name__:
                raise error(message)
    return result


def _tell_all(failure: Exception | None) -> list[str]:
    """Every process's failure, or None, as its type and message."""
    return gather_texts(f"{type(failure).__name__}\n{failure}")


_SHARED = (ConfigError, DamagedCheckpointError, CheckpointError)


def any_of_us(wish: bool) -> bool:
    """Whether `wish` is true in any process."""
    return any(text == "yes" for text in gather_texts("yes" if wish else "no"))


class StopRequest:
    """A SIGTERM or SIGINT to any of the processes, which all see at the same step."""

    name = ""  # name of the signal, once it was seen

    def seen(self, step: int) -> bool:
        """Whether all processes are to stop before this step; call it before every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.name = "SIGTERM"
        return bool(self.name)


SECONDS_TO_REPEAT = 1.0


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Treats SIGINT and SIGTERM as requests to stop, and prints that. A second one acts as usual.

    A second signal within `SECONDS_TO_REPEAT` is ignored: it comes from a key that is held down, or
    from a terminal and a scheduler that both signal the process. Only the main thread receives
    signals; in another thread nothing requests a stop.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    several = jax.process_count() > 1  # then JAX handles SIGTERM, and tells the other processes
    first = None  # time of the first signal

    def handle(number, _):
        nonlocal first
        name, now = signal.Signals(number).name, time.monotonic()
        if first is not None and now - first < SECONDS_TO_REPEAT:
            return
        if first is not None:
            signal.signal(number, before[number])
            signal.raise_signal(number)
            return
        first = now
        # Not with print: the signal may have interrupted a print.
        message = f"{name}: saving; once more ends at once\n"
        with contextlib.suppress(OSError):
            os.write(2, message.encode())
        if several:
            signal.raise_signal(signal.SIGTERM)
        else:
            request.name = name

    numbers = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ending_with_the_others(advice: str) -> Iterator[None]:
    """Ends this process with a message when another process of the run has ended.

    A collective operation then fails, or it hangs until JAX or its communication library kills this
    process from within, where no Python code runs any more. So a small child process prints the
    message when its input ends. An error of this process's own, such as out of memory, keeps its
    traceback.
    """
    if jax.process_count() == 1:
        yield
        return
    who = f"process {jax.process_index()} of {jax.process_count()}"
    watch = subprocess.Popen(
        [
            *(sys.executable, "-S", "-c", _LAST_WORDS),
            f"{who} ended abruptly: it was killed, or another process was. {advice}",
        ],
        stdin=subprocess.PIPE,
        start_new_session=True,  # out of reach of Ctrl-C
    )
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if is_about_others(str(error)):
            message = (
                f"{who} ends, because another process has ended or cannot be reached "
                f"({brief(error, 300)}). {advice}"
            )
        else:
            traceback.print_exc()
            message = f"{who} ends after an error of its own, and the others with it. {advice}"
        print(message, file=sys.stderr, flush=True)
        watch.communicate(b"said")
        os._exit(1)  # a normal exit would wait for the other processes
    finally:
        if watch.poll() is None:
            watch.communicate(b"said")


def is_about_others(message: str) -> bool:
    """Whether XLA's message is about another process, and not an error of this one."""
    if re.search("RESOURCE_EXHAUSTED|out of memory|INVALID_ARGUMENT", message, re.IGNORECASE):
        return False
    return bool(re.search(_OTHERS, message, re.IGNORECASE))


# Words in messages of gloo, NCCL, the networks of TPUs and the coordination service.
_OTHERS = (
    "gloo|nccl|connection|by peer|broken pipe|socket|UNAVAILABLE|DEADLINE_EXCEEDED|timed out|"
    "timeout|heartbeat|coordination|barrier|remote process|preempt|ABORTED|CANCELLED"
)
# The program of the child process. Its input ends without "said" when its parent is killed.
_LAST_WORDS = """
import sys
if not sys.stdin.buffer.read():
    print(sys.argv[1], file=sys.stderr, flush=True)
"""
