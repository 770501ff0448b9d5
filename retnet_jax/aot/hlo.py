"""What a compiled training step will need and do, read from the program itself.

    program = Program(lowered.compile(), traced.jaxpr, mesh)

Memory comes from the compiler. Messages between devices and the compiler's own estimate of the time
come from the text of the program, FLOPs from the traced function: `cost_analysis` counts the body
of a loop once, here it counts as often as it runs.
"""

import math
import re
from collections import Counter, defaultdict
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from jax.sharding import Mesh

from retnet_jax.parallel.mesh import number_of_slices


class Messages(NamedTuple):
    """What each device receives in a step by collectives of one kind along some mesh axes."""

    kind: str
    axes: tuple[str, ...]  # ("slices",) for what goes over the network between TPU slices
    count: int
    bytes: int


class Kernel(NamedTuple):
    """A Pallas kernel, which the compiler's estimate leaves out."""

    count: int  # calls on one device
    flops: float  # of a call
    bytes: int  # of a call: its arguments and results


class Program:
    """A compiled program, its mesh and the function it came from."""

    def __init__(self, compiled: jax.stages.Compiled, jaxpr: core.ClosedJaxpr, mesh: Mesh):
        self.memory = compiled.memory_analysis()
        self._jaxpr = jaxpr
        self._mesh = mesh
        self._computations = Computations(compiled.as_text())

    @property
    def peak_bytes(self) -> int:
        """Most memory of a device at once: arguments, results that are none, and all between."""
        memory = self.memory
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        code = memory.generated_code_size_in_bytes
        return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes + code

    @cached_property
    def flops(self) -> float:
        """FLOPs of all matrix products of all devices together, recomputation included."""
        return _flops(self._equations)

    @cached_property
    def kernels(self) -> list[Kernel]:
        """The kernels for TPUs, as often as they are called."""
        return [
            _kernel(equation, times, self._mesh.size)
            for equation, times in self._equations
            if equation.primitive.name == "pallas_call"
        ]

    @cached_property
    def _equations(self) -> list[tuple[Any, int]]:
        return _equations(self._jaxpr.jaxpr, self._mesh.size)

    @cached_property
    def messages(self) -> list[Messages]:
        """All messages but those of a few bytes, the largest first."""
        count, received = Counter(), Counter()
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
        """Cycles that the compiler expects for all but messages and kernels; TPUs only, else 0."""
        return sum(
            times * int(match[1])
            for instruction, times in self._computations.instructions()
            if (match := re.search(r'"estimated_cycles":"(\d+)"', instruction.text))
        )


def flops_of(function, *arguments) -> float:
    """FLOPs of the matrix products of a function, loops as often as they run.

    A Pallas kernel counts as if each of its programs did all that it can: attention that passes
    over tiles of later tokens has as many as attention that masks them.
    """
    return _flops(_equations(jax.make_jaxpr(function)(*arguments).jaxpr, 1))


def _equations(jaxpr: core.Jaxpr, devices: int, times: int = 1) -> list[tuple[Any, int]]:
    """Each equation of a function and of what it calls, and how often all devices run it."""
    found = []
    for equation in jaxpr.eqns:
        found += [(equation, times), *_inside(equation, devices, times)]
    return found


def _inside(equation, devices: int, times: int) -> list[tuple[Any, int]]:
    """The equations of what an equation calls."""
    name = equation.primitive.name
    if name == "scan":
        times *= equation.params["length"]
    elif name == "shard_map":
        times *= devices  # shapes inside are of one device
    elif name == "pallas_call":
        times *= math.prod(equation.params["grid_mapping"].grid)
    called = [_equations(inner, devices, times) for inner in _inner(equation.params)]
    # Of a conditional one branch runs; what a platform decides is one, too.
    chosen = [max(called, key=_flops)] if name == "cond" else called
    return [pair for equations in chosen for pair in equations]


def _flops(equations: list[tuple[Any, int]]) -> float:
    total = 0.0
    for equation, times in equations:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            total += 2 * times * depth * math.prod(equation.outvars[0].aval.shape)
    return total


def _kernel(equation, times: int, devices: int) -> Kernel:
    arrays = (x.aval for x in (*equation.invars, *equation.outvars))
    return Kernel(
        count=times // devices,
        flops=_flops(_inside(equation, 1, 1)),
        bytes=sum(x.size * x.dtype.itemsize for x in arrays),
    )


def _inner(params: dict[str, Any]):
    for name, value in params.items():
        if name.startswith(("fwd", "bwd", "jvp")):
            continue  # rules of a derivative that was not taken
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


# XLA for TPU splits an asynchronous collective over several fusions, each of which names all of it:
# one that starts it, others that do something else meanwhile, one that ends it.
_CONTINUES = re.compile(r".*calls=%?async_collective_fusion|(ROOT )?%?async-collective-done")


class _Instruction(NamedTuple):
    text: str
    computation: str  # name of the computation it stands in


class Computations:
    """The parts of a program's text, and how often each of them runs."""

    def __init__(self, text: str):
        self._instructions: dict[str, list[str]] = defaultdict(list)
        entry = name = ""
        for line in text.splitlines():
            begin = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
            if begin:
                name = begin[2]
                entry = name if begin[1] else entry
            elif line.startswith("  "):
                self._instructions[name].append(line.strip())
        self._times: Counter[str] = Counter()
        self._run(entry, 1)

    def lines(self, name: str) -> list[str]:
        """The instructions of one part."""
        return self._instructions[name]

    def kernels(self):
        """The parts that are no part of a fusion, and how often each of them runs."""
        fused = {
            name
            for lines in self._instructions.values()
            for text in lines
            for name in re.findall(r" fusion\(.*calls=%?([\w.-]+)", text)
        }
        yield from ((name, times) for name, times in self._times.items() if name not in fused)

    def instructions(self):
        """Each instruction and how often it runs."""
        for name, times in self._times.items():
            for text in self._instructions[name]:
                yield _Instruction(text, name), times

    def _run(self, name: str, times: int) -> None:
        self._times[name] += times
        for text in self._instructions[name]:
            loop = re.search(r"condition=%?([\w.-]+), body=%?([\w.-]+)", text)
            if loop:
                self._run(loop[2], times * self._trips(text, loop[1]))
            for called in re.findall(r"calls=%?([\w.-]+)", text):
                if not _CONTINUES.match(text):
                    self._run(called, times)
            if re.search(r" call\(", text):
                self._run(re.search(r"to_apply=%?([\w.-]+)", text)[1], times)
            branches = re.search(r"branch_computations=\{([^}]*)\}", text)
            if branches:
                self._run(branches[1].split(",")[0].strip(" %"), times)

    def _trips(self, loop: str, condition: str) -> int:
        known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop)
        if known:
            return int(known[1])
        # Loops of `lax.scan` count up to a constant in their condition.
        limits = re.findall(r"constant\((\d+)\)", "\n".join(self._instructions[condition]))
        return max(map(int, limits), default=1)


_COLLECTIVE = re.compile(
    r"= (\(.*?\)|\S+) "
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_DTYPE_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "f64": 8}


# How XLA for TPU writes a collective whose devices are in several slices.
_BETWEEN_SLICES = re.compile(r'= (\(.*?\)) send\(.*_xla_megascale_transfer_type="(\w+)"')


def array_bytes(shapes: str) -> list[int]:
    """The sizes of all arrays in the type of an instruction."""
    return [
        math.prod(map(int, filter(None, dims.split(",")))) * _DTYPE_BYTES.get(dtype, 4)
        for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    ]


def _collective(instruction: _Instruction, mesh: Mesh) -> tuple[str, tuple[str, ...], int] | None:
    """Its kind, its mesh axes and the bytes that a device receives; None for something else."""
    between = _BETWEEN_SLICES.search(instruction.text)
    if between is not None:
        kind = between[2].lower().replace("_", "-")
        slices = number_of_slices(mesh.devices.flat)
        share = 2 * (slices - 1) / slices if kind == "all-reduce" else 1
        return kind, ("slices",), int(share * array_bytes(between[1])[0])
    match = _COLLECTIVE.search(instruction.text)
    if match is None:
        return None
    result, kind, start = match.groups()
    sizes = array_bytes(result)
    # What starts a gather or a permutation names its operand too, and its semaphores.
    size = max(sizes) if start and kind != "all-reduce" else sum(sizes)
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
