"""The sections, and the work of the process that measures one."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.accelerator.cases import BrokenDeviceError, Case, Results, run
from benchmarks.accelerator.timing import memory_limit
from benchmarks.measure import provenance

# In order of importance, with shares of the time; the time that one leaves goes to later ones.
SECTIONS = {"checks": 0.12, "limits": 0.05, "kernels": 0.32, "training": 0.25, "decoding": 0.26}
BROKEN = 75  # exit status of a process that must be started again


def measure(
    section: str, output: Path, tiny: bool, only: str, deadline: float, commit: str
) -> None:
    """Measures a section, in a process started by the supervisor."""
    results = Results(output)
    describe(results, tiny, commit)
    cases = [case for case in cases_of(section, tiny) if re.search(only, case.name)]
    with exit_if_broken():
        run(results, section, cases, deadline)


@contextlib.contextmanager
def exit_if_broken() -> Iterator[None]:
    """Ends the process when the device is broken, so that the supervisor starts another."""
    try:
        yield
    except BrokenDeviceError:
        sys.stdout.flush()
        os._exit(BROKEN)  # clean-up can hang on a broken device


def describe(results: Results, tiny: bool, commit: str) -> None:
    """Records date, device, versions, commit and the available memory of the device.

    Raises:
      SystemExit: if the file has the records of another device.
    """
    facts = provenance() | {"commit": commit, "memory_limit": memory_limit(), "tiny": tiny}
    for name in ("device", "tiny"):
        before = results.data.get(name, facts[name])
        if before != facts[name]:
            sys.exit(f"{results.path} was measured with {name} {before}, not {facts[name]}")
    results.describe(**facts)


def cases_of(section: str, tiny: bool) -> list[Case]:
    """All cases of a section, the most important first."""
    # Imported here, so that a section needs only its own libraries.
    if section == "checks":
        from benchmarks.accelerator import checks as module
    elif section == "limits":
        from benchmarks.accelerator import limits as module
    elif section == "kernels":
        from benchmarks.accelerator import kernels as module
    elif section == "training":
        from benchmarks.accelerator import training as module
    else:
        from benchmarks.accelerator import decoding as module
    return list(module.cases(tiny))
