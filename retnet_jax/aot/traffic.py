"""Bytes that a compiled program reads from memory and writes to it, read from its text.

What is fused into one kernel passes memory once, and an update in place writes only what is new:

    {traffic.what: traffic.bytes for traffic in memory_traffic(compiled.as_text())}

Caches that are larger than an array make a program faster than this, and none makes it slower.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from retnet_jax.aot.hlo import Computations, array_bytes


class Traffic(NamedTuple):
    """What all runs of one instruction move."""

    what: str  # opcode, and jax's name of the operation where the compiler kept it
    times: int  # how often it runs
    bytes: int  # read and written, all runs together
    text: str


def memory_traffic(text: str) -> list[Traffic]:
    """The traffic of each instruction of a program's text, the largest first.

    Loops count as often as they run, if their number is fixed; else as one run.
    """
    computations = Computations(text)
    found = []
    for name, times in computations.kernels():
        parsed = _Computation(computations.lines(name))
        for instruction in parsed:
            size = _bytes(instruction, parsed, computations)
            if size:
                found.append(Traffic(instruction.what, times, times * size, instruction.text))
    return sorted(found, key=lambda traffic: -traffic.bytes)


# Arrays that a TPU keeps in its vector memory, whose layout says so, pass no other memory.
_ON_CHIP = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\(1\)[^}]*\}")


def _in_memory(arrays: str) -> str:
    return _ON_CHIP.sub("", arrays)


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    operands: list[str]
    text: str

    @property
    def what(self) -> str:
        named = re.search(r'op_name="([^"]*)"', self.text)
        return f"{self.opcode} {named[1]}" if named else self.opcode


_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")


class _Computation:
    """The instructions of one computation, by their names."""

    def __init__(self, lines: list[str]):
        self._found: dict[str, _Instruction] = {}
        self.users: dict[str, list[_Instruction]] = defaultdict(list)
        self.root = ""
        for line in lines:
            # `/*index=5*/` stands before every fifth of many operands.
            match = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))
            if match is None:
                continue
            name, kind, opcode, rest = match.groups()
            operands = re.findall(r"%([\w.-]+)", rest.split("), ")[0])
            instruction = _Instruction(name, kind, opcode, operands, line)
            self._found[name] = instruction
            if line.startswith("ROOT"):
                self.root = name
            for operand in set(operands):
                self.users[operand].append(instruction)

    def __iter__(self) -> Iterator[_Instruction]:
        return iter(self._found.values())

    def __getitem__(self, name: str) -> _Instruction:
        return self._found[name]

    def parameter(self, number: int) -> _Instruction:
        return next(x for x in self if f" parameter({number})" in x.text)

    def size(self, name: str) -> int:
        return sum(array_bytes(_in_memory(self._found[name].type)))

    def source(self, name: str) -> _Instruction:
        """What an instruction is another view of."""
        instruction = self._found[name]
        while instruction.opcode in ("bitcast", "copy", "convert", "get-tuple-element", "reshape"):
            instruction = self._found[instruction.operands[0]]
        return instruction


# What names an array and moves nothing, or has its parts counted where they stand.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "iota", "copy-done", "async-done", "async-start", "async-update"),
    *("partition-id", "opt-barrier", "slice-done", "dynamic-slice-done"),
}


def _bytes(instruction: _Instruction, around: _Computation, computations: Computations) -> int:
    if instruction.opcode in _FREE:
        return 0
    if instruction.opcode == "fusion":
        return _fusion_bytes(_called(instruction, computations), computations)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * around.size(instruction.name)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * around.size(instruction.operands[1])
    if instruction.opcode == "copy-start":
        return sum(array_bytes(_in_memory(instruction.type)))
    if instruction.opcode in ("slice-start", "dynamic-slice-start"):
        result = re.findall(r"\w+\[[\d,]*\]\{[^}]*\}", instruction.type)[1]
        return sum(array_bytes(result + _in_memory(result)))
    read = sum(map(around.size, instruction.operands))
    if instruction.opcode == "custom-call" and instruction.type.startswith("("):
        return read + array_bytes(instruction.type)[0]  # and scratch memory
    return read + around.size(instruction.name)


def _called(fusion: _Instruction, computations: Computations) -> "_Computation":
    name = re.search(r"calls=%?([\w.-]+)", fusion.text)[1]
    return _Computation(computations.lines(name))


def _fusion_bytes(inside: _Computation, computations: Computations) -> int:
    """What a fusion reads of its operands, and writes."""
    root = inside[inside.root]
    results = root.operands if root.opcode == "tuple" else [root.name]
    total = 0
    for name in results:
        result = inside.source(name)
        in_place = result.opcode == "dynamic-update-slice"
        total += inside.size(result.operands[1] if in_place else name)
    for instruction in inside:
        if instruction.opcode == "parameter":
            total += min(inside.size(instruction.name), _read(instruction, inside, computations))
    return total


def _read(instruction: _Instruction, inside: _Computation, computations: Computations) -> int:
    """Bytes that a fusion needs of an array: of its slices, if it takes nothing else of it."""
    total = 0
    for user in inside.users[instruction.name]:
        first = user.operands[0] == instruction.name
        if user.opcode in ("dynamic-slice", "slice", "gather") and first:
            total += inside.size(user.name)
        elif user.opcode in ("bitcast", "convert", "copy"):
            total += min(_read(user, inside, computations), inside.size(instruction.name))
        elif user.opcode == "fusion":
            within = _called(user, computations)
            for number, operand in enumerate(user.operands):
                if operand == instruction.name:
                    total += _read(within.parameter(number), within, computations)
        elif user.opcode == "dynamic-update-slice" and first:
            continue
        else:
            total += inside.size(instruction.name)
    return total
