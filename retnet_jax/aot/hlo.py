"""Memory, messages and estimated time of a compiled program.

    program = Program(lowered.compile(), mesh)

The compiler reports the memory. Messages between devices and the compiler's time estimate are read
from the program's text, where loops are counted for each iteration. (`flops.py` counts FLOPs.)
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from retnet_jax.parallel.mesh import number_of_slices


class Messages(NamedTuple):
    """Collectives of one kind over the same mesh axes, and the bytes each device receives."""

    kind: str
    axes: tuple[str, ...]  # ("slices",) for messages over the network between TPU slices
    count: int
    bytes: int


class Program:
    """A compiled program and its mesh."""

    def __init__(self, compiled: jax.stages.Compiled, mesh: Mesh):
        self.memory = memory_of(compiled)
        self._mesh = mesh
        text = compiled.as_text()
        assert text is not None  # programs for CPUs, GPUs and TPUs have one
        self._computations = Computations(text)

    @property
    def peak_bytes(self) -> int:
        """Peak memory of a device."""
        return peak_bytes(self.memory)

    @cached_property
    def messages(self) -> list[Messages]:
        """The messages of at least 1 MiB, largest first."""
        count: Counter[tuple[str, tuple[str, ...]]] = Counter()
        received: Counter[tuple[str, tuple[str, ...]]] = Counter()
        for instruction, times in self._computations.instructions():
            found = _collective(instruction, self._mesh)
            if found is not None:
                kind, axes, size = found
                count[kind, axes] += times
                received[kind, axes] += times * size
        found = [Messages(*key, count[key], received[key]) for key in received]
        return sorted((x for x in found if x.bytes >= 2**20), key=lambda x: -x.bytes)

    @cached_property
    def estimated_cycles(self) -> int:
        """The compiler's estimate of cycles, without messages and kernels; 0 except on TPUs."""
        return sum(
            times * int(match[1])
            for instruction, times in self._computations.instructions()
            if (match := re.search(r'"estimated_cycles":"(\d+)"', instruction.text))
        )


def memory_of(compiled: jax.stages.Compiled) -> Any:
    """The bytes of a program by purpose: `memory_analysis()`, which CPUs, GPUs and TPUs have."""
    return compiled.memory_analysis()


def peak_bytes(memory: Any) -> int:
    """Bytes of arguments, other results, temporary arrays and code, from `memory_analysis()`."""
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes + code


class Instruction(NamedTuple):
    """A line of a program's text: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes
    text: str  # the whole line
    computation: str  # the name of the computation that contains it

    @property
    def operands(self) -> list[str]:
        """The names of the instructions that it reads."""
        return re.findall(r"%([\w.-]+)", self.rest.split("), ")[0])

    @property
    def called(self) -> list[str]:
        """The names of the computations that it calls, such as the body of a fusion."""
        return re.findall(r"calls=%?([\w.-]+)", self.text)


class Computation:
    """A computation of a program: its instructions, by name."""

    def __init__(self, instructions: list[Instruction]):
        self._found = {x.name: x for x in instructions}

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self._found.values())

    def __getitem__(self, name: str) -> Instruction:
        return self._found[name]

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the result of the computation."""
        return next(x for x in self if x.text.startswith("ROOT"))

    def parameter(self, number: int) -> Instruction:
        """The instruction of a parameter, by the parameter's number."""
        return next(x for x in self if f" parameter({number})" in x.text)

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read the result of each instruction."""
        users = defaultdict(list)
        for instruction in self:
            for operand in set(instruction.operands):
                users[operand].append(instruction)
        return users


class Computations:
    """The computations in a program's text, and how often each runs."""

    def __init__(self, text: str):
        lines: dict[str, list[Instruction]] = defaultdict(list)
        entry = name = ""
        for line in text.splitlines():
            begin = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
            if begin:
                name = begin[2]
                entry = name if begin[1] else entry
            elif line.startswith("  ") and (instruction := _parsed(line.strip(), name)):
                lines[name].append(instruction)
        self._parts = {name: Computation(found) for name, found in lines.items()}
        self._times: Counter[str] = Counter()
        self._run(entry, 1)

    def __getitem__(self, name: str) -> Computation:
        return self._parts.get(name) or Computation([])

    def kernels(self) -> Iterator[tuple[Computation, int]]:
        """The computations that are not the body of a fusion, and how often each runs."""
        fused = {
            name
            for part in self._parts.values()
            for instruction in part
            if instruction.opcode == "fusion"
            for name in instruction.called
        }
        yield from ((self[name], times) for name, times in self._times.items() if name not in fused)

    def instructions(self) -> Iterator[tuple[Instruction, int]]:
        """Each instruction and how often it runs."""
        for name, times in self._times.items():
            for instruction in self[name]:
                yield instruction, times

    def _run(self, name: str, times: int) -> None:
        self._times[name] += times
        for instruction in self[name]:
            text = instruction.text
            loop = re.search(r"condition=%?([\w.-]+), body=%?([\w.-]+)", text)
            if loop:
                self._run(loop[2], times * self._trips(text, loop[1]))
            if not _continues(instruction):
                for called in instruction.called:
                    self._run(called, times)
            if instruction.opcode == "call":
                self._run(re.findall(r"to_apply=%?([\w.-]+)", text)[0], times)
            branches = re.search(r"branch_computations=\{([^}]*)\}", text)
            if branches:
                self._run(branches[1].split(",")[0].strip(" %"), times)

    def _trips(self, loop: str, condition: str) -> int:
        known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop)
        if known:
            return int(known[1])
        # Loops of `lax.scan` count up to a constant in their condition.
        text = "\n".join(x.text for x in self[condition])
        return max(map(int, re.findall(r"constant\((\d+)\)", text)), default=1)


_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")


def _parsed(line: str, computation: str) -> Instruction | None:
    """The instruction in a line; None for a line without one."""
    # In long lists there is a comment such as `/*index=5*/` before every fifth operand.
    match = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line) if "/*" in line else line)
    if match is None:
        return None
    name, kind, opcode, rest = match.groups()
    return Instruction(name, kind, opcode, rest, line, computation)


def _continues(instruction: Instruction) -> bool:
    """Whether an instruction continues an asynchronous collective that another one started.

    XLA for TPU splits a collective over several fusions: one starts it, others do other work
    meanwhile, one ends it. The text of each names the whole collective.
    """
    return instruction.name.startswith("async-collective-done") or any(
        name.startswith("async_collective_fusion") for name in instruction.called
    )


_DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "f64": 8}


def array_bytes(shapes: str) -> list[int]:
    """The sizes in bytes of all arrays in the type of an instruction."""
    return [
        math.prod(map(int, filter(None, dims.split(",")))) * _DTYPE_BYTES.get(dtype, 4)
        for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    ]


_COLLECTIVES = "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
# XLA for TPU writes a collective between slices as a send with this attribute.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


def _collective(instruction: Instruction, mesh: Mesh) -> tuple[str, tuple[str, ...], int] | None:
    """Kind, mesh axes and bytes received per device of a collective; None if it is not one."""
    between = _BETWEEN_SLICES.search(instruction.text)
    if between is not None and instruction.opcode == "send":
        kind = between[1].lower().replace("_", "-")
        slices = number_of_slices(mesh.devices.flat)
        share = 2 * (slices - 1) / slices if kind == "all-reduce" else 1
        return kind, ("slices",), int(share * array_bytes(instruction.type)[0])
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _COLLECTIVES:
        return None
    sizes = array_bytes(instruction.type)
    # The type of an instruction that starts a collective also has its operand and semaphores.
    starts = instruction.opcode != kind
    size = max(sizes) if starts and kind != "all-reduce" else sum(sizes)
    groups = _group(instruction.text, mesh.size)
    places = np.array(np.unravel_index(groups, mesh.devices.shape))
    axes = tuple(
        name for name, place in zip(mesh.axis_names, places, strict=True) if len(set(place)) > 1
    )
    n = len(groups)
    if kind == "all-reduce" and instruction.computation.startswith("all-reduce-scatter"):
        kind, size = "reduce-scatter", size // n
    share = {
        "all-gather": (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "all-reduce": 2 * (n - 1) / n,
        "reduce-scatter": n - 1,
        "collective-permute": 1,
    }[kind]
    return kind, axes, int(share * size)


_NAMED_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?"
    r" \{([^}]*)\}"
)


def _group(text: str, devices: int) -> list[int]:
    """The devices of the first group that exchange with each other."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text)
    if pairs:
        return [int(pairs[1]), int(pairs[2])]
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return [int(x) for x in listed[1].split(",")]
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if iota:
        shape = [int(x) for x in iota[3].split(",")]
        order = np.arange(devices).reshape(shape)
        if iota[4]:
            order = order.transpose([int(x) for x in iota[4].split(",")])
        return order.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    named = _NAMED_GROUPS.search(text)
    if named and ":" not in named[4]:
        axes = re.findall(r"'([^']+)'=(\d+)", named[1])
        order = np.arange(devices)
        if named[2]:
            shape, turned = ([int(x) for x in named[i].split(",")] for i in (2, 3))
            order = order.reshape(shape).transpose(turned)
        chosen = re.findall(r"'([^']+)'", named[4])
        group = tuple(slice(None) if name in chosen else 0 for name, _ in axes)
        return order.reshape([int(size) for _, size in axes])[group].ravel().tolist()
    return list(range(devices))
