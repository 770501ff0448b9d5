"""Counts the FLOPs of a function and of its kernels from its jaxpr.

The compiler's `cost_analysis` counts the body of a loop once and Pallas kernels not at all; here
both are counted once for each time they run.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.extend import core

ClosedJaxpr = core.ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage] (public all the same)


class Kernel(NamedTuple):
    """A Pallas kernel, which the compiler's time estimate does not include."""

    count: int  # number of calls on one device
    flops: float  # in one call
    bytes: int  # size of the arguments and results of one call


class Costs(NamedTuple):
    """The costs of a function on a mesh."""

    flops: float  # of matrix products on all devices together, including recomputation
    kernels: list[Kernel]


def costs(jaxpr: ClosedJaxpr, devices: int) -> Costs:
    """Counts the FLOPs and kernels of a traced function.

    Args:
      jaxpr: The traced function.
      devices: Number of devices of the mesh. Inside a `shard_map`, shapes are those of one device.
    """
    equations = _equations(jaxpr.jaxpr, devices)
    kernels = [
        _kernel(equation, times, devices)
        for equation, times in equations
        if equation.primitive.name == "pallas_call"
    ]
    return Costs(_flops(equations), kernels)


def flops_of(function, *arguments) -> float:
    """FLOPs of the matrix products of a function; loops are counted for each iteration.

    For a Pallas kernel it is assumed that each of its programs does all the work it may do:
    attention that skips tiles of later tokens has the same count as attention that masks them.
    """
    return _flops(_equations(jax.make_jaxpr(function)(*arguments).jaxpr, 1))


def _equations(jaxpr: core.Jaxpr, devices: int, times: int = 1) -> list[tuple[Any, int]]:
    """The equations of a function and of functions it calls, and how often all devices run each."""
    found = []
    for equation in jaxpr.eqns:
        found += [(equation, times), *_inside(equation, devices, times)]
    return found


def _inside(equation, devices: int, times: int) -> list[tuple[Any, int]]:
    """The equations of the functions that an equation calls."""
    name = equation.primitive.name
    if name == "scan":
        times *= equation.params["length"]
    elif name == "shard_map":
        times *= devices  # shapes inside are of one device
    elif name == "pallas_call":
        times *= math.prod(equation.params["grid_mapping"].grid)
    called = [_equations(inner, devices, times) for inner in _inner(equation.params)]
    # One branch of a conditional runs; a choice by platform is a conditional too.
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
            continue  # rules for derivatives, which are not run here
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
