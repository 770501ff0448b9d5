"""The memory that training cannot do without, before anything is compiled."""

import math
import os
from pathlib import Path

import jax

from retnet_jax.config import Config
from retnet_jax.errors import ConfigError
from retnet_jax.parallel.mesh import Device
from retnet_jax.training.step import TrainState

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def least_bytes(state_shape: TrainState) -> int:
    """Bytes of the parameters, gradients and optimiser state of a run, over all devices.

    Args:
      state_shape: Shapes and dtypes of the training state.
    """
    model, optimizer = _bytes(state_shape.model), _bytes(state_shape.optimizer)
    return 2 * model + optimizer  # gradients have the size of the parameters


def check_memory(config: Config, state_shape: TrainState) -> str:
    """The least memory of a device, in a sentence: that of parameters, optimiser and gradients.

    Activations come on top; `tools/compile_ahead.py` counts them.

    Args:
      config: What is trained.
      state_shape: Shapes, dtypes and shardings of the training state.

    Raises:
      ConfigError: if a device has less.
    """
    parameters = _bytes_of_a_device(state_shape.model)
    optimizer = _bytes_of_a_device(state_shape.optimizer)
    needed = 2 * parameters + optimizer  # gradients have the size of the parameters
    device = jax.local_devices()[0]
    available = device_memory(device)
    parts = (
        f"{gigabytes(parameters)} of parameters, {gigabytes(optimizer)} of optimiser state and "
        f"{gigabytes(parameters)} of gradients"
    )
    if available is not None and needed > available:
        devices = math.ceil(least_bytes(state_shape) / available)
        raise ConfigError(
            f"not enough memory: {config.model.parameter_count():,} parameters need at least "
            f"{gigabytes(needed)} on each device, and a {device.device_kind} has "
            f"{gigabytes(available)} here\n"
            f"  these are {parts} on the mesh {_shown(state_shape)}; activations come on top\n"
            f"  at least {devices} such devices can hold them, divided by --config.mesh.fsdp=-1; "
            "docs/many_devices.md says how to find out what fits which devices\n"
            "  smaller models are --config=retnet_200m and --config=quickstart"
        )
    share = "" if available is None else f" of {gigabytes(available)}"
    return (
        f"memory of a device: at least {gigabytes(needed)}{share}: {parts}; activations come on top"
    )


def device_memory(device: Device) -> int | None:
    """Bytes that a device has; of a CPU its share of the machine's. None: unknown."""
    statistics = device.memory_stats()
    if statistics and statistics.get("bytes_limit"):
        return statistics["bytes_limit"]
    if device.platform != "cpu":
        return None
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else ""
    if limit.isdecimal():
        machine = min(machine, int(limit))
    return machine // jax.local_device_count()


def _bytes_of_a_device(tree) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _bytes(tree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _shown(state_shape: TrainState) -> str:
    mesh = jax.tree.leaves(state_shape.model)[0].sharding.mesh
    return ", ".join(f"{name}={size}" for name, size in mesh.shape.items())


def gigabytes(size: float) -> str:
    """A number of bytes with its unit, such as "25.9 GB"."""
    return f"{size / 1e9:.3g} GB"
