"""Runs each section in a process, and stops it if it hangs or its time is over."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.accelerator.cases import Results
from benchmarks.accelerator.sections import BROKEN, SECTIONS

ROOT = Path(__file__).parents[2]
# Seconds for one case, including compilation and, in the kernels, fla's tuning.
_PATIENCE = {"checks": 45, "limits": 45, "kernels": 90, "training": 150, "decoding": 150}
_PATIENCE["sweep"] = 45
_MEMORY_SECONDS = 2  # until the memory of a killed process is free


def run(sections: list[str], output: Path, seconds: float, options: list[str]) -> None:
    """Measures the sections, each within its share of the time.

    Args:
      sections: Names from `sections.SECTIONS`.
      output: JSON file of results.
      seconds: Time for all sections.
      options: Command-line options for the processes.
    """
    end = time.time() + seconds
    for i, section in enumerate(sections):
        share = SECTIONS[section] / sum(SECTIONS[name] for name in sections[i:])
        run_section(section, output, time.time() + share * (end - time.time()), options)


def run_section(section: str, output: Path, deadline: float, options: list[str]) -> None:
    """Measures a section until the deadline (seconds since 1970); restarts processes that end."""
    while not _ended(section, output, deadline, options):
        pass


def _ended(section: str, output: Path, deadline: float, options: list[str]) -> bool:
    """Runs a process for a section; returns whether the section is finished or out of time."""
    command = [sys.executable, "-m", "benchmarks.accelerator", *options]
    command += [f"--section={section}", f"--deadline={deadline}", f"--output={output}"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(section))
    problem = _watch(process, output, deadline, _PATIENCE[section])
    status = process.poll()
    results = Results(output)
    if problem is None and status not in (0, BROKEN):
        problem = ("ended", f"the process ended with status {status}; see its output")
    if problem is not None and not results.fail_running(*problem):
        # It failed outside a case, so another process would fail too.
        results.fail_section(section, *problem)
        return True
    return status == 0 or time.time() >= deadline


def _watch(
    process: subprocess.Popen, output: Path, deadline: float, patience: float
) -> tuple[str, str] | None:
    """Waits for a process; if it hangs or its time is over, kills it and returns the problem."""
    last = _written(output)
    since = time.time()
    while process.poll() is None:
        time.sleep(0.1)
        if _written(output) != last:
            last, since = _written(output), time.time()
        problem = None
        if time.time() >= deadline:
            problem = ("cut_off", "the section's time was over")
        elif time.time() - since > patience:
            problem = ("ended", f"it did not end within {patience} seconds")
        if problem is not None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_MEMORY_SECONDS)  # may fail if it waits for the device
            time.sleep(_MEMORY_SECONDS)
            return problem
    return None


def _written(path: Path) -> float:
    return path.stat().st_mtime_ns if path.exists() else 0


def environment(section: str) -> dict[str, str]:
    """The environment of a process: jax preallocates, except beside torch in the kernels."""
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"}
    if section == "kernels":
        memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6"}
    return memory | os.environ
