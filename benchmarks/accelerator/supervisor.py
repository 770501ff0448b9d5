"""A process for each section, which is given up when it dies, hangs or is out of time."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.accelerator.cases import Results
from benchmarks.accelerator.sections import BROKEN, SECTIONS

ROOT = Path(__file__).parents[2]
_PATIENCE = 150  # seconds for one case; compilation is in it
_MEMORY_SECONDS = 2  # until a killed process's memory is the next one's


def run(sections: list[str], output: Path, seconds: float, options: list[str]) -> None:
    """Measures the sections, each in its share of the time.

    Args:
      sections: some of `sections.SECTIONS`.
      output: the JSON file.
      seconds: for all.
      options: of the command line, for the processes.
    """
    end = time.time() + seconds
    for i, section in enumerate(sections):
        share = SECTIONS[section] / sum(SECTIONS[name] for name in sections[i:])
        deadline = time.time() + share * (end - time.time())
        while not _ended(section, output, deadline, options):
            pass


def _ended(section: str, output: Path, deadline: float, options: list[str]) -> bool:
    """Runs a process for a section; whether it did all it could, or the time is over."""
    command = [sys.executable, "-m", "benchmarks.accelerator", *options]
    command += [f"--section={section}", f"--deadline={deadline}", f"--output={output}"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(section))
    problem = _watch(process, output, deadline)
    status = process.poll()
    results = Results(output)
    if problem is None and status not in (0, BROKEN):
        problem = ("ended", f"the process ended with status {status}, its output says why")
    if problem is not None and not results.fail_running(*problem):
        # Not in a case: another process would do no better.
        results.fail_section(section, *problem)
        return True
    return status == 0 or time.time() >= deadline


def _watch(process: subprocess.Popen, output: Path, deadline: float) -> tuple[str, str] | None:
    """Waits for a process; ends it, and says why, when it hangs or its time is over."""
    last = _written(output)
    since = time.time()
    while process.poll() is None:
        time.sleep(0.1)
        if _written(output) != last:
            last, since = _written(output), time.time()
        problem = None
        if time.time() >= deadline:
            problem = ("cut_off", "the section's time was over")
        elif time.time() - since > _PATIENCE:
            problem = ("ended", f"it did not end within {_PATIENCE} seconds")
        if problem is not None:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_MEMORY_SECONDS)  # one that waits for the device may not end
            time.sleep(_MEMORY_SECONDS)
            return problem
    return None


def _written(path: Path) -> float:
    return path.stat().st_mtime_ns if path.exists() else 0


def environment(section: str) -> dict[str, str]:
    """Where torch has memory too, jax takes what it needs; elsewhere nearly all, at once."""
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"}
    if section == "kernels":
        memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6"}
    return memory | os.environ
