"""FLOPs of a function and the kernels it calls, counted in its jaxpr.

The compiler's `cost_analysis` counts the body of a loop once and a Pallas kernel as nothing; here
both count as often as they run.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.extend import core

ClosedJaxpr = core.ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage] (public all the same)


class Kernel(NamedTuple):
    """A Pallas kernel, which the compiler's estimate of time leaves out."""

    count: int  # calls on one device
    flops: float  # of a call
    bytes: int  # of a call: its arguments and results


class Costs(NamedTuple):
    """What a function costs on a mesh."""

    flops: float  # of the matrix products of all devices together, recomputation included
    kernels: list[Kernel]


def costs(jaxpr: ClosedJaxpr, devices: int) -> Costs:
    """Counts what a traced function runs.

    Args:
      jaxpr: as traced.
      devices: of the mesh; inside a `shard_map` shapes are of one of them.
    """
    equations = _equations(jaxpr.jaxpr, devices)
    kernels = [
        _kernel(equation, times, devices)
        for equation, times in equations
        if equation.primitive.name == "pallas_call"
    ]
    return Costs(_flops(equations), kernels)


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
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
