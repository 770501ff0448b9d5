"""Shared by the benchmarks: interleaved timing, inputs of retention, child processes, results."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Heads of the benchmarks of single operations, and the widths of their q, k and of their v.
HEADS, KEY_WIDTH, VALUE_WIDTH = 4, 64, 128


def interleaved_seconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Wall-clock seconds of each call in every round; all calls take turns.

    The first round is a warm-up and is not returned. Taking turns slows all calls equally if the
    speed of the machine drifts; compare them by ratios of each round or of medians. A call that
    takes less than half a second is repeated untimed before it is timed, so that the memory and
    caches of a large call before it have no effect.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            if seconds[name] and seconds[name][-1] < 0.5:
                jax.block_until_ready(call())
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: kept for name, (_, *kept) in seconds.items()}


def require_cpu() -> None:
    """Exits if JAX runs on an accelerator."""
    if jax.default_backend() != "cpu":
        raise SystemExit(
            f"this benchmark is for CPUs, but JAX runs on {jax.default_backend()}: "
            "set JAX_PLATFORMS=cpu"
        )


def median_milliseconds(seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds)


def copy_bandwidth(copied: int = 2**28) -> float:
    """Bytes read and written per second by a copy of an array of `copied` bytes, in no cache."""
    x = jnp.ones(copied // 4)
    copy = jax.jit(lambda x: -x).lower(x).compile()
    seconds = interleaved_seconds({"copy": partial(copy, x)}, 5)["copy"]
    return 2 * copied / (median_milliseconds(seconds) / 1000)


def lengths(longest: int) -> Iterator[int]:
    """Sequence lengths: powers of two from 512 to `longest`."""
    length = 512
    while length <= longest:
        yield length
        length *= 2


def retention_inputs(length: int) -> list[np.ndarray]:
    """Random q, k [1 t heads k], v and the gradient of y [1 t heads v], float32; q is scaled."""
    rng = np.random.default_rng(0)
    widths = (KEY_WIDTH, KEY_WIDTH, VALUE_WIDTH, VALUE_WIDTH)
    q, k, v, d_y = (rng.normal(size=(1, length, HEADS, w)).astype(np.float32) for w in widths)
    return [q * np.float32(KEY_WIDTH**-0.5), k, v, d_y]


def output_of_process(program: str, *arguments: str) -> str:
    """The stdout of Python code that runs in its own process.

    The code can call `memory(name)`: a number of bytes in /proc/self/status, such as "VmHWM", the
    peak of its resident memory.
    """
    command = [sys.executable, "-c", _MEMORY + program, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


_MEMORY = """
def memory(name):
    import re
    from pathlib import Path
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(name + r":\\s+(\\d+)", status)[1])
"""


def provenance() -> dict[str, str]:
    """Date, device, versions and commit, which are recorded with all results."""
    device = jax.devices()[0]
    processor = device.device_kind
    if device.platform == "cpu":
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        processor = f"{len(names)} x {names[0].split(':')[1].strip()}"
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "device": processor,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": current_commit(),
    }


def current_commit(root: Path = ROOT) -> str:
    """The commit of the code in `root`, "-dirty" if it was changed since; "unknown" without git.

    Results and figures are not code: a program that writes them is not changed by it.
    """
    results = [f":!{path}" for path in ("*/results/*", "docs/figures/*.png")]
    try:
        commit = _git(root, "describe", "--always")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *results)
    except (FileNotFoundError, subprocess.CalledProcessError):  # there is no git, or no repository
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    """What git prints."""
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Writes results and their provenance to `benchmarks/results/NAME.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(provenance() | results, indent=2) + "\n")
    return path
