"""Counts the bytes that a compiled program reads from memory and writes to it, from its text.

    {traffic.what: traffic.bytes for traffic in memory_traffic(compiled.as_text())}

A fused kernel reads its operands and writes its results once, and an update in place writes only
the new values. An array that stays in a cache causes less traffic than counted here.
"""

import re
from typing import NamedTuple

from retnet_jax.aot.hlo import Computation, Computations, Instruction, array_bytes


class Traffic(NamedTuple):
    """The memory traffic of one instruction."""

    what: str  # opcode, and jax's name of the operation if the compiler kept it
    times: int  # number of times it runs
    bytes: int  # read and written, in all runs together
    text: str


def memory_traffic(text: str) -> list[Traffic]:
    """The traffic of each instruction in a program's text, largest first.

    A loop is counted for each iteration if their number is fixed, otherwise once.
    """
    computations = Computations(text)
    found = []
    for computation, times in computations.kernels():
        for instruction in computation:
            size = _bytes(instruction, computation, computations)
            if size:
                found.append(Traffic(_what(instruction), times, times * size, instruction.text))
    return sorted(found, key=lambda traffic: -traffic.bytes)


# Arrays in a TPU's vector memory, marked S(1) in their type, cause no traffic.
_ON_CHIP = re.compile(r"\w+\[[\d,]*\]\{[^}]*S\(1\)[^}]*\}")


def _in_memory(arrays: str) -> str:
    return _ON_CHIP.sub("", arrays)


def _what(instruction: Instruction) -> str:
    named = re.search(r'op_name="([^"]*)"', instruction.text)
    return f"{instruction.opcode} {named[1]}" if named else instruction.opcode


def _size(instruction: Instruction) -> int:
    """Size of the result in bytes."""
    return sum(array_bytes(_in_memory(instruction.type)))


def _source(instruction: Instruction, around: Computation) -> Instruction:
    """The instruction whose result this one only views, copies or converts."""
    while instruction.opcode in ("bitcast", "copy", "convert", "get-tuple-element", "reshape"):
        instruction = around[instruction.operands[0]]
    return instruction


# Instructions that move nothing, or whose called computations are counted separately.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "iota", "copy-done", "async-done", "async-start", "async-update"),
    *("partition-id", "opt-barrier", "slice-done", "dynamic-slice-done"),
}


def _bytes(instruction: Instruction, around: Computation, computations: Computations) -> int:
    if instruction.opcode in _FREE:
        return 0
    if instruction.opcode == "fusion":
        return _fusion_bytes(_called(instruction, computations), computations)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _size(instruction)
    if instruction.opcode == "dynamic-update-slice":
        return 2 * _size(around[instruction.operands[1]])
    if instruction.opcode == "copy-start":
        return _size(instruction)
    if instruction.opcode in ("slice-start", "dynamic-slice-start"):
        result = re.findall(r"\w+\[[\d,]*\]\{[^}]*\}", instruction.type)[1]
        return sum(array_bytes(result + _in_memory(result)))
    read = sum(_size(around[name]) for name in instruction.operands)
    if instruction.opcode == "custom-call" and instruction.type.startswith("("):
        return read + array_bytes(instruction.type)[0]  # and scratch memory
    return read + _size(instruction)


def _called(fusion: Instruction, computations: Computations) -> Computation:
    return computations[fusion.called[0]]


def _fusion_bytes(inside: Computation, computations: Computations) -> int:
    """The bytes that a fusion reads and writes."""
    root = inside.root
    results = root.operands if root.opcode == "tuple" else [root.name]
    total = 0
    for name in results:
        result = _source(inside[name], inside)
        in_place = result.opcode == "dynamic-update-slice"
        total += _size(inside[result.operands[1] if in_place else name])
    for instruction in inside:
        if instruction.opcode == "parameter":
            total += min(_size(instruction), _read(instruction, inside, computations))
    return total


def _read(instruction: Instruction, inside: Computation, computations: Computations) -> int:
    """The bytes of an array that a fusion reads: only slices, if it uses nothing else."""
    total = 0
    for user in inside.users[instruction.name]:
        first = user.operands[0] == instruction.name
        if user.opcode in ("dynamic-slice", "slice", "gather") and first:
            total += _size(user)
        elif user.opcode in ("bitcast", "convert", "copy"):
            total += min(_read(user, inside, computations), _size(instruction))
        elif user.opcode == "fusion":
            within = _called(user, computations)
            for number, operand in enumerate(user.operands):
                if operand == instruction.name:
                    total += _read(within.parameter(number), within, computations)
        elif user.opcode == "dynamic-update-slice" and first:
            continue
        else:
            total += _size(instruction)
    return total
