"""Compiles the step that train.py runs for any devices, and saves and loads it."""

import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from retnet_jax.aot.flops import ClosedJaxpr
from retnet_jax.aot.hlo import memory_of
from retnet_jax.config import Config
from retnet_jax.errors import ConfigError, brief
from retnet_jax.parallel.chips import chip
from retnet_jax.parallel.mesh import Device, make_mesh
from retnet_jax.parallel.sharding import check_fit
from retnet_jax.training.step import TrainState, abstract_batch, abstract_state, make_step


class DoesNotFitError(ConfigError):
    """The step or the evaluation needs more memory than a device has."""


class CompiledStep(NamedTuple):
    """A compiled training step, and the time it took to lower and compile it."""

    config: Config
    mesh: Mesh
    state: TrainState  # shapes and shardings
    jaxpr: ClosedJaxpr
    lowered: jax.stages.Lowered
    compiled: jax.stages.Compiled
    lower_seconds: float
    compile_seconds: float


def compile_step(
    config: Config, devices: Sequence[Device] | None = None, one_document: bool = False
) -> CompiledStep:
    """Compiles the training step of a config.

    Args:
      config: Config of a run; its mesh must fit the devices.
      devices: Devices to compile for, such as those of `topologies.py`; None: this machine's.
      one_document: As in `abstract_batch`. The step of train.py has several documents in a window.

    Raises:
      ConfigError: if the mesh does not fit the devices.
      DoesNotFitError: if the step needs too much memory, saying how much and what would fit.
    """
    mesh = make_mesh(config.mesh, devices)
    check_fit(mesh, config)
    state = abstract_state(config, mesh)
    with jax.set_mesh(mesh):
        begin = time.perf_counter()
        batch = abstract_batch(config, mesh, one_document)
        traced = make_step(config, state).trace(state, batch)
        lowered = traced.lower()
        lower_seconds = time.perf_counter() - begin
        begin = time.perf_counter()
        compiled = compile_if_it_fits(lowered, "step", config, mesh)
    step = CompiledStep(
        config,
        mesh,
        state,
        traced.jaxpr,
        lowered,
        compiled,
        lower_seconds,
        time.perf_counter() - begin,
    )
    memory = memory_of(compiled)
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    check_memory(needed, "step", config, mesh)
    return step


def compile_if_it_fits(
    lowered: jax.stages.Lowered, what: str, config: Config, mesh: Mesh
) -> jax.stages.Compiled:
    """Compiles; raises `DoesNotFitError` if the compiler finds that the device has no room."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        numbers = _overflow(str(error))
        raise DoesNotFitError(_does_not_fit(what, config, mesh, numbers)) from error


def check_memory(needed: int, what: str, config: Config, mesh: Mesh) -> None:
    """Raises `DoesNotFitError` if a device with a data sheet has less memory than needed."""
    device = chip(mesh.devices.flat[0].device_kind)
    if device is not None and needed > device.memory:
        numbers = f"{needed / 2**30:.1f} GiB, more than its {device.memory / 2**30:.1f} GiB"
        raise DoesNotFitError(_does_not_fit(what, config, mesh, numbers))


def device_bytes(tree: Any) -> int:
    """Size in bytes of the parts of arrays that one device holds."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(tree)
    )


def _overflow(message: str) -> str:
    sizes = re.search(r"Used ([\d.]+)G of ([\d.]+)G|\(([\d.]+)G\).*\(([\d.]+)G\)", message)
    if sizes is None:
        return " ".join(message.split())[:300]
    needed, there = filter(None, sizes.groups())
    return f"{needed} GiB, more than its {there} GiB"


def _does_not_fit(what: str, config: Config, mesh: Mesh, numbers: str) -> str:
    rows = config.train.batch_size // config.train.micro_batches
    rows //= mesh.shape["data"] * mesh.shape["fsdp"]
    ways = []
    if rows > 1:
        ways.append(f"train.micro_batches={config.train.micro_batches * rows} (one row at a time)")
    if what == "step" and config.model.remat != "full":
        ways.append("model.remat='full'")
    if mesh.shape["data"] > 1:
        ways.append(f"mesh.fsdp={mesh.shape['fsdp'] * mesh.shape['data']} with mesh.data=1")
    if config.optimizer.moment_dtype == "float32":
        ways.append("optimizer.moment_dtype='bfloat16'")
    ways.append("more devices, with a larger mesh.tensor or mesh.seq")
    kind = mesh.devices.flat[0].device_kind
    return (
        f"the {what} does not fit in the memory of a {kind}: it needs {numbers}. "
        f"It needs less with {'; or '.join(ways)}"
    )


def save(step: CompiledStep, path: Path) -> None:
    """Writes a compiled step to a file for `load`.

    Raises:
      ConfigError: if the compiler cannot serialise it.
    """
    try:
        program, _, _ = serialize_executable.serialize(step.compiled)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"the program for {step.mesh.devices.flat[0].device_kind} cannot be saved: "
            f"{brief(error)}"
        ) from error
    path.write_bytes(json.dumps(_described(step.lowered, step.mesh)).encode() + b"\n" + program)


def load(path: Path, config: Config, mesh: Mesh, state: TrainState) -> jax.stages.Compiled:
    """Loads a step that `save` wrote: (state, batch) -> (state, metrics).

    The step is lowered again, which takes seconds, to check that it is the same.

    Raises:
      ConfigError: if there is no such file, if it holds the step of another config or mesh, or if
        this machine's runtime cannot load it.
    """
    if not path.is_file():
        raise ConfigError(
            f"--compiled={path} does not exist: tools/compile_ahead.py --save={path} writes it"
        )
    header, _, program = path.read_bytes().partition(b"\n")
    with jax.set_mesh(mesh):
        lowered = make_step(config, state).lower(state, abstract_batch(config, mesh))
    try:
        found = json.loads(header)
    except ValueError:
        raise ConfigError(f"--compiled={path} is not a compiled step") from None
    expected = _described(lowered, mesh)
    if found != expected:
        shown = [
            f"{name}: {found.get(name)!r} in the file, {value!r} here"
            for name, value in expected.items()
            if found.get(name) != value
        ]
        raise ConfigError(
            f"--compiled={path} holds another step than this one:\n  " + "\n  ".join(shown)
        )
    try:
        return serialize_executable.deserialize_and_load(
            program, lowered.in_tree, lowered.out_tree, execution_devices=list(mesh.devices.flat)
        )
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"--compiled={path} cannot be loaded by this machine's runtime ({brief(error)}); "
            "without --compiled the step is compiled here"
        ) from error


def _described(lowered: jax.stages.Lowered, mesh: Mesh) -> dict[str, Any]:
    """A description that is equal for equal programs."""
    return {
        "jax": jax.__version__,
        "device": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "program": hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16],
    }
