"""What the benchmarks share: interleaved timing, provenance, and where results go."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


def interleaved_seconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Wall seconds of each call in every round, all in turn, after a round that is not kept.

    Taking turns lets a machine whose speed drifts slow all of them alike; ratios are to be taken
    round by round or of medians. A call of under half a second is made once more, untimed, before
    it is timed, so that it does not pay for the memory and caches that a large one before it left.
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


def median_milliseconds(seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds)


def provenance() -> dict[str, str]:
    """Date, device, versions and commit, to stand beside every number."""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # no git here
        commit = ""
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
        "commit": commit or "unknown",
    }


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Writes `benchmarks/results/NAME.json` with its provenance."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(provenance() | results, indent=2) + "\n")
    return path
