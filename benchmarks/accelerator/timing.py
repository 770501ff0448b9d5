"""Device time of compiled functions, and their memory."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

REPEATS = 5
# Programs that are enqueued at once: fewer than jax lets be under way, so that enqueuing does not
# wait for the device.
_MOST_ENQUEUED = 24
_ROUND_SECONDS = 0.05


class Measured(NamedTuple):
    """Numbers for a record, and what the function returned for the first arguments."""

    times: dict[str, Any]
    result: Any


def device_time(function: Callable, sets: Sequence[tuple], repeats: int = REPEATS) -> Measured:
    """Milliseconds that a function takes for one set of arguments, on the device.

    Args:
      function: of the arguments in a set; not jitted.
      sets: independent arguments, for which one program calls it one after the other.
      repeats: rounds.

    Returns:
      Times: ms, the median; samples_ms of the rounds; host_share, in which the host was enqueuing
      (near 1: ms is the host's time, and the device's is less); temporary_bytes of the program.
    """
    program = jax.jit(lambda sets: [function(*arguments) for arguments in sets])
    compiled = program.lower(sets).compile()
    times = rounds(lambda: compiled(sets), jax.block_until_ready, len(sets), repeats)
    times["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
    return Measured(times, compiled(sets)[0])


def rounds(call: Callable[[], Any], wait: Callable[[Any], Any], parts: int, repeats: int) -> dict:
    """Times rounds of enqueued calls, each of so many parts, as `device_time` says."""
    wait(call())
    begin = time.perf_counter()
    wait(call())
    once = time.perf_counter() - begin
    calls = max(1, min(_MOST_ENQUEUED, round(_ROUND_SECONDS / max(once, 1e-6))))
    seconds, shares = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in range(calls):
            last = call()  # earlier results are freed in the order of the device's work
        enqueued = time.perf_counter() - begin
        wait(last)
        total = time.perf_counter() - begin
        seconds.append(total / calls / parts)
        shares.append(enqueued / total)
    return summary(seconds) | {"host_share": round(statistics.median(shares), 3)}


def summary(seconds: Sequence[float]) -> dict:
    """The median, and all of them, in milliseconds."""
    samples = [1000 * x for x in seconds]
    return {"ms": statistics.median(samples), "samples_ms": samples}


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Most memory of a program: arguments, results that are none of them, and all between."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def memory_limit() -> int | None:
    """Bytes that jax can have of the device; None where it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def check_memory(needed: int) -> None:
    """Raises `MemoryError` for a program that needs more than there is."""
    limit = memory_limit()
    if limit is not None and needed > limit:
        raise MemoryError(f"needs {needed / 2**30:.1f} GiB of {limit / 2**30:.1f} GiB")
