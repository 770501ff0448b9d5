"""The device mesh, and the two tables that lay parameters and activations on it."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from retnet_jax.config import Config, MeshConfig
from retnet_jax.errors import ConfigError
from retnet_jax.trees import leaf_name

# In the order of the devices: those next to each other exchange the most, within `tensor`.
AXES = ("data", "fsdp", "seq", "tensor")

# Axes that split the words of an embedding or a head.
WORDS = ("tensor", "fsdp")

# The end of a parameter's path -> mesh axis of each dimension, or several such of which the first
# that divides counts. Optimiser moments have the same ends; what matches nothing is copied to all
# devices. `fsdp` splits the last dimension only if it must: a TPU keeps that in tiles of 128,
# and gathers narrower parts at twice the cost.
PARAMETERS = (
    (
        r"(embedding|head)",
        PartitionSpec(WORDS, None),
        PartitionSpec("tensor", "fsdp"),  # a vocabulary such as 257 or 50,257
    ),
    (r"(q|k|v|gate|up|linear)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r"(out|down)/kernel", PartitionSpec(None, ("tensor", "fsdp"), None)),
    (r"carry/layers", PartitionSpec(None, ("data", "fsdp"), "tensor")),
    (r"carry/position", PartitionSpec(("data", "fsdp"))),
)

# Letter of an activation's dimension (see `shapes.py`) -> mesh axes; others are not split.
ACTIVATIONS = {"b": ("data", "fsdp"), "t": "seq", "h": "tensor", "f": "tensor", "w": "tensor"}
BATCH = PartitionSpec(("data", "fsdp"), "seq")


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
    slices = number_of_slices(devices)
    if slices > 1:
        return _mesh_of_slices(sizes, slices, devices)
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def number_of_slices(devices: Iterable[jax.Device]) -> int:
    """Of TPUs, which have links within a slice and a network between slices; 1 for all others."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def _mesh_of_slices(sizes: list[int], slices: int, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of several TPU slices, between which only `data` exchanges."""
    data, *others = sizes
    if data % slices:
        raise ConfigError(
            f"mesh.data={data} does not divide over {slices} slices, whose network is slow: only "
            f"mesh.data can lie across them; {slices} or a multiple of it would do"
        )
    within = mesh_utils.create_hybrid_device_mesh(
        (data // slices, *others),
        (slices, *[1] * len(others)),
        devices=devices,
        allow_split_physical_axes=True,
    )
    return Mesh(within, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def backend() -> str:
    """What computes: the platform of the mesh that is set, else of jax's default device.

    A program can be compiled for devices that this machine does not have.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def device_kind() -> str:
    """The kind of device that computes, such as "TPU v5 lite", as `backend` finds it."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.devices()[0].device_kind if mesh.empty else mesh.abstract_device.device_kind


def many_devices() -> bool:
    """Whether a mesh of ours is set that has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and set(AXES) <= set(mesh.axis_names)


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh that is set; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get(axis, 1)


def layout(dimensions: str, shape: Sequence[int]) -> PartitionSpec:
    """How the mesh that is set splits an activation.

    Args:
      dimensions: a letter for each, such as "btd".
      shape: its sizes. One that its axes do not divide is not split.
    """
    places = []
    for letter, size in zip(dimensions, shape, strict=True):
        axes = ACTIVATIONS.get(letter, ())
        parts = math.prod(map(axis_size, (axes,) if isinstance(axes, str) else axes))
        places.append(axes if axes and size % parts == 0 else None)
    return PartitionSpec(*places)


def local_shape(dimensions: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the part of an activation that one device has, as `layout` splits it."""
    split = [axes_of((axes,)) for axes in layout(dimensions, shape)]
    return tuple(
        size // math.prod(map(axis_size, axes)) for size, axes in zip(shape, split, strict=True)
    )


def axes_of(layout: Iterable) -> tuple[str, ...]:
    """All mesh axes that a layout splits something over."""
    each = ((axes,) if isinstance(axes, str) else axes or () for axes in layout)
    return tuple(axis for axes in each for axis in axes)


def constrain(x: Any, dimensions: str) -> Any:
    """An activation laid on the mesh that is set as `layout` says."""
    if not many_devices():
        return x
    return jax.lax.with_sharding_constraint(x, layout(dimensions, x.shape))


def first_device() -> Mesh:
    """A mesh of the first device alone."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


def batch_shardings(mesh: Mesh, batch: Any) -> Any:
    """For each array of a batch: rows over `data` and `fsdp`, positions over `seq`."""
    return jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(*BATCH[: x.ndim])), batch)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that devices of this process hold."""
    rows = NamedSharding(mesh, PartitionSpec(BATCH[0]))
    held = rows.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for (part,) in held for row in range(*part.indices(batch_size))})


def place_batch(mesh: Mesh, batch: Any, rows: Sequence[int], batch_size: int) -> Any:
    """A batch on the mesh, from the rows that `local_rows` names."""
    shardings = batch_shardings(mesh, batch)
    if len(rows) == batch_size and jax.process_count() == 1:
        return jax.device_put(batch, shardings)
    place = {row: i for i, row in enumerate(rows)}

    def global_array(local, sharding):
        def part(index):
            wanted = range(*index[0].indices(batch_size))
            return local[(slice(place[wanted[0]], place[wanted[-1]] + 1), *index[1:])]

        shape = (batch_size, *local.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(global_array, batch, shardings)


def check_fit(mesh: Mesh, config: Config) -> None:
    """Raises `ConfigError` if rows, positions or heads do not divide over the mesh."""
    batch_size, micro_batches = config.train.batch_size, config.train.micro_batches
    rows, parts = batch_size // micro_batches, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise ConfigError(
            f"train.batch_size={batch_size} in train.micro_batches={micro_batches} gives {rows} "
            f"rows, which do not divide over mesh.data * mesh.fsdp = {parts} devices; "
            f"a batch_size divisible by {parts * micro_batches} would do"
        )
    for axis, name, size in (
        ("seq", "data.sequence_length", config.data.sequence_length),
        ("tensor", "model.n_heads", config.model.n_heads),
    ):
        if size % mesh.shape[axis]:
            raise ConfigError(f"mesh.{axis}={mesh.shape[axis]} does not divide {name}={size}")


def with_shardings(abstract: Any, mesh: Mesh) -> Any:
    """A tree of shapes with the sharding of each array by the table.

    Raises:
      ConfigError: for a dimension that its mesh axis does not divide.
    """

    def place(path, leaf):
        name = leaf_name(path)
        specs = next((specs for end, *specs in PARAMETERS if _ends_with(name, end)), ())
        problems = []
        for spec in specs:
            if leaf.ndim < len(spec):
                break
            problem = _indivisible(leaf.shape, spec, mesh)
            if problem is None:
                sharding = NamedSharding(mesh, spec)
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            problems.append(problem)
        if problems:
            raise ConfigError(f"{problems[-1]} of {name} {leaf.shape}")
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole)

    return jax.tree_util.tree_map_with_path(place, abstract)


def _indivisible(shape: Sequence[int], spec: PartitionSpec, mesh: Mesh) -> str | None:
    """Which axes do not divide which dimension; None if all divide."""
    for dimension, axes in enumerate(spec):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if shape[dimension] % parts:
            shown = " * ".join(f"mesh.{axis}" for axis in axes if mesh.shape[axis] > 1)
            return f"{shown}={parts} does not divide dimension {dimension}"
    return None


def _ends_with(name: str, end: str) -> bool:
    return re.search(f"(^|/){end}$", name) is not None
