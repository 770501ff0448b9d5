"""Device time of compiled functions and of their kernels, and memory; references by the CPU."""

import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

REPEATS = 5
# Most programs enqueued at once. This is below jax's limit, so enqueuing does not wait for the
# device.
_MOST_ENQUEUED = 24
_ROUND_SECONDS = 0.05


class Measured(NamedTuple):
    """Numbers for a record, and the function's result for the first set of arguments."""

    times: dict[str, Any]
    result: Any
    kernels_ms: dict[str, float]  # of one call, as from `kernel_times`


def device_time(function: Callable, sets: Sequence[tuple], repeats: int = REPEATS) -> Measured:
    """Measures the device time of a function for one set of arguments.

    Args:
      function: Function of the arguments in a set; not jitted.
      sets: Independent sets of arguments; one program calls the function for all of them.
      repeats: Number of rounds.

    Returns:
      Times: ms, the median; samples_ms of the rounds; host_share, the part of a round in which the
      host was enqueuing (near 1, the host is the limit and the device faster than ms); and
      temporary_bytes of the program.
    """
    program = jax.jit(lambda sets: [function(*arguments) for arguments in sets])
    compiled = program.lower(sets).compile()
    times = rounds(lambda: compiled(sets), jax.block_until_ready, len(sets), repeats)
    times["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
    kernels = {name: ms / len(sets) for name, ms in kernel_times(lambda: compiled(sets)).items()}
    return Measured(times, compiled(sets)[0], kernels)


def rounds(call: Callable[[], Any], wait: Callable[[Any], Any], parts: int, repeats: int) -> dict:
    """Times rounds of enqueued calls as in `device_time`; each call computes `parts` sets."""
    wait(call())
    begin = time.perf_counter()
    wait(call())
    once = time.perf_counter() - begin
    calls = max(1, min(_MOST_ENQUEUED, round(_ROUND_SECONDS / max(once, 1e-6))))
    seconds, shares = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            last = call()  # earlier results are freed when the device is done with them
        enqueued = time.perf_counter() - begin
        wait(last)
        total = time.perf_counter() - begin
        seconds.append(total / calls / parts)
        shares.append(enqueued / total)
    return summary(seconds) | {"host_share": round(statistics.median(shares), 3)}


def summary(seconds: Sequence[float]) -> dict:
    """The median and all samples, in milliseconds."""
    samples = [1000 * x for x in seconds]
    return {"ms": statistics.median(samples), "samples_ms": samples}


def kernel_times(call: Callable[[], Any], most: int = 16) -> dict[str, float]:
    """Milliseconds of the kernels that `call` runs on a GPU, summed by name; empty elsewhere.

    Args:
      call: Enqueues a program that has run before, and returns its results.
      most: Number of names; the others are summed as "others".
    """
    sums: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(call())
        for path in Path(directory).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                if plane.name.startswith("/device:GPU"):
                    for line in plane.lines:
                        if line.name.startswith("Stream"):
                            for event in line.events:
                                sums[_kind(event.name)] += event.duration_ns / 1e6
    ordered = sorted(sums.items(), key=lambda x: -x[1])
    others = {"others": sum(ms for _, ms in ordered[most:])} if len(ordered) > most else {}
    return dict(ordered[:most]) | others


def _kind(name: str) -> str:
    """The name of a kernel without the numbers that distinguish it from others of its kind."""
    return re.sub(r"[_.]\d+$", "", name)[:80]


def on_cpu(function: Callable, arrays: Sequence[jax.Array]) -> list[np.ndarray]:
    """The results of a function for these arrays in float32, by the CPU, which rounds no operands.

    It also compiles in a second what takes a GPU's compiler half a minute of tuning.
    """
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        exact = [jnp.asarray(np.asarray(x, np.float32)) for x in arrays]
        return [np.asarray(x, np.float32) for x in jax.jit(function)(*exact)]


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Peak memory of a program: arguments, results that do not alias them, and temporaries."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def memory_limit() -> int | None:
    """Bytes of device memory available to jax; None if unknown."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def check_memory(needed: int) -> None:
    """Raises `MemoryError` for a program that needs more memory than the device has."""
    limit = memory_limit()
    if limit is not None and needed > limit:
        raise MemoryError(f"needs {needed / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB")
