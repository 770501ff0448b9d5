"""Which part of a model the time of its compiled training step goes to, on a CPU.

    parts = time_of_parts(compiled, run, steps=5)

The profiler says when each instruction of the program ran; the program's text says from which
function it comes. Of instructions that run at once each gets its share of the time, so the parts
add up to the wall-clock time of a step. An instruction without a source, which the compiler made,
has the part of the first instruction that reads its result, or else of its first operand.
"""

import gzip
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from retnet_jax.aot.hlo import Computations, Instruction

# By file of the package, or function in it; the first entry that is among an instruction's callers
# names its part.
PARTS = (
    ("optax/", "optimiser"),
    ("training/optim.py", "optimiser"),
    ("training/spikes.py", "optimiser"),
    ("ops/cross_entropy.py", "head and loss"),
    ("ops/embedding.py", "embedding"),
    ("ops/gated_norm.py", "norm and gate"),
    ("ops/retention/", "retention"),
    ("ops/attention.py", "attention"),
    ("ops/rotation.py", "rotation"),
    ("ops/short_convolution.py", "short convolutions"),
    ("FeedForward.", "feed-forward"),
    ("Linear.", "projections"),
    ("Norm.", "norms"),
)
REST, IDLE = "the rest", "nothing ran"
# Their time is that of what they call.
_CALLERS = {"while", "conditional", "call"}


def time_of_parts(
    compiled: jax.stages.Compiled, run: Callable[[], Any], steps: int
) -> dict[str, float]:
    """Milliseconds of a step by part, largest first.

    Args:
      compiled: The step.
      run: Function that runs the step once and returns its results.
      steps: Number of calls of `run` that are traced.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, create_perfetto_trace=True):
            for _ in range(steps):
                jax.block_until_ready(run())
        (path,) = Path(directory).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    text = compiled.as_text()
    assert text is not None  # programs for CPUs have one
    part_of = _Program(text).part
    milliseconds: Counter[str] = Counter()
    for name, microseconds in _shares(events):
        milliseconds[part_of(name) if name else IDLE] += microseconds / 1000 / steps
    return dict(milliseconds.most_common())


def _shares(events: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Names of instructions and their shares of the wall-clock time; "" where nothing ran."""
    changes = []
    for event in events:
        name = event.get("args", {}).get("hlo_op")
        if name and event.get("ph") == "X" and not _is_caller(name):
            changes += [(event["ts"], 1, name), (event["ts"] + event["dur"], -1, name)]
    running: Counter[str] = Counter()
    last = None
    for time, change, name in sorted(changes):
        if last is not None and time > last:
            count = running.total()
            for other, times in running.items():
                yield other, (time - last) * times / count
            if not count:
                yield "", time - last
        running[name] += change
        running += Counter()  # drops those that ended
        last = time


def _is_caller(name: str) -> bool:
    return re.split(r"[.\d]", name)[0] in _CALLERS


class _Program:
    """The instructions of a program, and the functions that each comes from."""

    def __init__(self, text: str):
        self._computations = Computations(text)
        self._frames = _Frames(text)
        self._found = {
            instruction.name: instruction
            for computation, _ in self._computations.kernels()
            for instruction in computation
        }
        self._parts: dict[str, str | None] = {}

    def part(self, name: str) -> str:
        """The part of the instruction with this name."""
        instruction = self._found.get(name)
        return (instruction and self._part(instruction)) or REST

    def _part(self, instruction: Instruction) -> str | None:
        name = instruction.name
        if name not in self._parts:
            self._parts[name] = None  # for a circle of instructions without a source
            self._parts[name] = self._own(instruction) or self._of_neighbours(instruction)
        return self._parts[name]

    def _own(self, instruction: Instruction) -> str | None:
        inside = [x for name in instruction.called for x in self._computations[name]]
        for line in (instruction, *reversed(inside)):
            callers = self._frames.callers(line.text)
            if callers:
                return _part_of(callers)
        return None

    def _of_neighbours(self, instruction: Instruction) -> str | None:
        around = self._computations[instruction.computation]
        readers = around.users.get(instruction.name, [])
        operands = [self._found[name] for name in instruction.operands if name in self._found]
        return next(filter(None, map(self._part, readers + operands)), None)


def _part_of(callers: list[str]) -> str:
    named = (part for key, part in PARTS if any(key in caller for caller in callers))
    return next(named, REST)


class _Frames:
    """The tables of a program's text that say which functions called an instruction."""

    def __init__(self, text: str):
        files, functions, places, frames = (
            dict(re.findall(r"^(\d+) (.*)$", _table(text, name), re.MULTILINE))
            for name in ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
        )
        self._callers: dict[str, tuple[str, str]] = {}
        for number, frame in frames.items():
            place = places[_field(frame, "file_location_id") or ""]
            file = files[_field(place, "file_name_id") or ""].strip('"')
            function = functions[_field(place, "function_name_id") or ""].strip('"')
            # Frames count from 1, and are named as parents by the number after theirs.
            parent = int(_field(frame, "parent_frame_id") or 1) - 1
            self._callers[number] = f"{file} {function}", str(parent)

    def callers(self, line: str) -> list[str]:
        """Files and functions that an instruction comes from, the innermost first."""
        number, found = _field(line, "stack_frame_id"), []
        while number in self._callers and len(found) < 100:
            caller, number = self._callers[number]
            found.append(caller)
        return found


def _table(text: str, name: str) -> str:
    found = re.search(rf"^{name}\n((?:\d+ .*\n)*)", text, re.MULTILINE)
    return found[1] if found else ""


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"\b{name}=(\d+)", text)
    return found[1] if found else None
