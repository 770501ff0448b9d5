"""The device mesh, and the one table that lays parameters on it."""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from retnet_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")

# The end of a parameter's path -> mesh axis of each dimension. Optimiser moments have the same
# ends; what matches nothing is copied to all devices.
PARAMETERS = (
    (r"(embedding|head)", PartitionSpec("tensor", "fsdp")),
    (r"(q|k|v|gate|up|linear)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"(out|down)/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r"carry/layers", PartitionSpec(None, ("data", "fsdp"), "tensor")),
    (r"carry/position", PartitionSpec(("data", "fsdp"))),
)
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `devices`, None for all.

    Raises:
      ConfigError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    sizes = [getattr(config, axis) for axis in AXES]
    shown = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    elif -1 in sizes or known != count:
        raise ConfigError(
            f"{shown} does not fit {count} devices: the sizes must multiply to {count}, "
            "where one of them may be -1"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def first_device() -> Mesh:
    """A mesh of the first device alone."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the axes `data` and `fsdp`."""
    return NamedSharding(mesh, BATCH)


def check_batch(mesh: Mesh, batch_size: int, micro_batches: int) -> None:
    """Raises `ConfigError` if the rows of a micro-batch do not divide over the mesh."""
    rows, parts = batch_size // micro_batches, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise ConfigError(
            f"train.batch_size={batch_size} in train.micro_batches={micro_batches} gives {rows} "
            f"rows, which do not divide over mesh.data * mesh.fsdp = {parts} devices; "
            f"a batch_size divisible by {parts * micro_batches} would do"
        )


def with_shardings(abstract: Any, mesh: Mesh) -> Any:
    """A tree of shapes with the sharding of each array by the table.

    Raises:
      ConfigError: for a dimension that its mesh axis does not divide.
    """

    def place(path, leaf):
        name = path_name(path)
        spec = next((spec for end, spec in PARAMETERS if _ends_with(name, end)), PartitionSpec())
        if leaf.ndim < len(spec):
            spec = PartitionSpec()
        for dimension, axes in enumerate(spec):
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                if leaf.shape[dimension] % mesh.shape[axis]:
                    raise ConfigError(
                        f"mesh.{axis}={mesh.shape[axis]} does not divide dimension {dimension} of "
                        f"{name} {leaf.shape}"
                    )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, abstract)


def path_name(path) -> str:
    """The name of a leaf in a train state, such as model/layers/mixer/q/kernel."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value")  # the array inside an nnx.Param


def _ends_with(name: str, end: str) -> bool:
    return re.search(f"(^|/){end}$", name) is not None
