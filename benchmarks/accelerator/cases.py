"""Measures case by case, and writes one JSON file that is complete after each case.

The record of a case has its numbers, or one of `not_here` (not supported by this device or
installation), `out_of_memory` and `error`; the supervisor adds `ended` (the process died or did not
end) and `cut_off` (the time of the section was over).
"""

import gc
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from retnet_jax.errors import brief

PROBLEMS = ("not_here", "out_of_memory", "error", "ended", "cut_off")


class Case(NamedTuple):
    """One measurement: its name in the section, and the function that returns its record."""

    name: str
    measure: Callable[[], dict[str, Any]]


class BrokenDeviceError(Exception):
    """An error of the device, after which the process cannot measure any more."""


class Results:
    """The JSON file of results."""

    def __init__(self, path: Path):
        self.path = path
        self.data: dict[str, Any] = {"sections": {}}
        if path.exists():
            self.data = json.loads(path.read_text())

    def plan(self, section: str, names: list[str]) -> None:
        """Records the names of all cases of a section, so that unreached ones can be listed."""
        self._section(section)["planned"] = names
        self._section(section).pop("problem", None)
        self._save()

    def begin(self, section: str, name: str) -> None:
        self.data["running"] = {"section": section, "name": name}
        self._save()

    def finish(self, section: str, name: str, record: dict[str, Any]) -> None:
        self._section(section)["cases"][name] = record
        self.data.pop("running", None)
        self._save()

    def fail_running(self, problem: str, reason: str) -> bool:
        """Records why the running case has no numbers; returns False if no case is running."""
        running = self.data.get("running")
        if running is None:
            return False
        self.finish(running["section"], running["name"], {problem: reason})
        return True

    def fail_section(self, section: str, problem: str, reason: str) -> None:
        """Records a problem outside the cases of a section."""
        self._section(section)["problem"] = f"{problem.replace('_', ' ')}: {reason}"
        self._save()

    def forget(self, problem: str) -> None:
        """Removes the records with this problem, so that their cases are measured again."""
        for section in self.data["sections"].values():
            kept = {name: x for name, x in section["cases"].items() if problem not in x}
            section["cases"] = kept
        self._save()

    def describe(self, **facts: Any) -> None:
        """Records facts such as device, versions and commit."""
        self.data |= facts
        self._save()

    def records(self, section: str) -> dict[str, dict[str, Any]]:
        """The records of a section, by the names of their cases."""
        return self._section(section)["cases"]

    def _section(self, section: str) -> dict[str, Any]:
        return self.data["sections"].setdefault(section, {"planned": [], "cases": {}})

    def _save(self) -> None:
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(unfinished, self.path)


def run(
    results: Results,
    section: str,
    cases: Iterable[Case],
    deadline: float,
    finished: Callable[[Case], None] = lambda case: None,
) -> None:
    """Measures the cases without a record, until the deadline (seconds since 1970).

    `finished` is called after each measured case, when its record is in the file.

    Raises:
      BrokenDeviceError: if the other cases must be measured in a new process.
    """
    cases = list(cases)
    results.plan(section, [case.name for case in cases])
    for case in cases:
        if case.name in results.records(section):
            continue
        if time.time() >= deadline:
            print(f"{section}: out of time before {case.name}", flush=True)
            return
        results.begin(section, case.name)
        begin = time.time()
        record, broken = _measured(case)
        record |= {"took_seconds": time.time() - begin, "commit": results.data.get("commit")}
        results.finish(section, case.name, record)
        print(f"{section}: {case.name}: {_shown(record)}", flush=True)
        finished(case)
        if broken:
            raise BrokenDeviceError(case.name)


def _measured(case: Case) -> tuple[dict[str, Any], bool]:
    """The record of a case, and whether the device may be broken for this process."""
    try:
        return case.measure(), False
    except Exception as error:
        message = brief(error)
        broken = False
        if isinstance(error, NotImplementedError | ImportError):
            record = {"not_here": message}
        elif isinstance(error, MemoryError) or _says_out_of_memory(message):
            record = {"out_of_memory": message}
        else:
            record = {"error": f"{type(error).__name__}: {message}"}
            broken = isinstance(error, jax.errors.JaxRuntimeError) or "CUDA" in message
    gc.collect()  # frees arrays held by the frames of the error
    return record, broken


def _says_out_of_memory(message: str) -> bool:
    return "RESOURCE_EXHAUSTED" in message or "out of memory" in message.lower()


def _shown(record: dict[str, Any]) -> str:
    """The main numbers of a record, to print while measuring."""
    for problem in PROBLEMS:
        if problem in record:
            return f"{problem.replace('_', ' ')}: {record[problem]}"
    names = ("largest_error", "ms", "tokens_per_second", "batch")
    names += ("bytes_per_second", "flops_per_second")
    return ", ".join(f"{name} {record[name]:.4g}" for name in names if name in record)
