"""Shardings: a table for parameters, a table for activations, and the functions that apply them."""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from retnet_jax.config import Config
from retnet_jax.errors import ConfigError
from retnet_jax.parallel.mesh import axis_size, many_devices
from retnet_jax.trees import leaf_name

# Axes that split the words of an embedding or a head.
WORDS = ("tensor", "fsdp")

# Path suffix -> PartitionSpecs to try in order; the first that divides the shape is used. Optimiser
# moments have the same suffixes. An array without an entry is copied to all devices. `fsdp` splits
# the last dimension only if no other is possible: a TPU stores that dimension in tiles of 128, and
# gathers narrower parts at twice the cost.
PARAMETERS = (
    (
        r"(embedding|head)",
        PartitionSpec(WORDS, None),
        PartitionSpec("tensor", "fsdp"),  # a vocabulary such as 257 or 50,257
    ),
    (r"(q|gate|up|linear)/kernel", PartitionSpec(None, "fsdp", "tensor")),
    # Heads of keys and values may be fewer than those of queries.
    (r"(k|v)/kernel", PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "fsdp")),
    (r"(out|down)/kernel", PartitionSpec(None, ("tensor", "fsdp"), None)),
    (r"(q|k|v)_conv/weight", PartitionSpec(None, "tensor"), PartitionSpec()),
    (  # last inputs of convolutions
        r"carry/layers/(.+/)?(q|k|v)",
        PartitionSpec(None, ("data", "fsdp"), None, "tensor"),
        PartitionSpec(None, ("data", "fsdp")),
    ),
    (
        r"carry/layers(/.+)?",
        PartitionSpec(None, ("data", "fsdp"), "tensor"),
        PartitionSpec(None, ("data", "fsdp")),  # fewer key heads than devices
    ),
    (r"carry/position", PartitionSpec(("data", "fsdp"))),
)

# Letter of an activation's dimension (see `shapes.py`) -> mesh axes. Other letters are not split.
ACTIVATIONS = {"b": ("data", "fsdp"), "t": "seq", "h": "tensor", "f": "tensor", "w": "tensor"}
BATCH = PartitionSpec(("data", "fsdp"), "seq")


def activation_spec(dimensions: str, shape: Sequence[int]) -> PartitionSpec:
    """The PartitionSpec of an activation on the mesh that is set.

    Args:
      dimensions: One letter for each dimension, such as "btd".
      shape: Sizes of the dimensions. A size that its axes do not divide is not split.
    """
    places = []
    for letter, size in zip(dimensions, shape, strict=True):
        axes = ACTIVATIONS.get(letter, ())
        parts = math.prod(map(axis_size, (axes,) if isinstance(axes, str) else axes))
        places.append(axes if axes and size % parts == 0 else None)
    return PartitionSpec(*places)


def local_shape(dimensions: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one device's part of an activation, as `activation_spec` splits it."""
    split = [axes_of((axes,)) for axes in activation_spec(dimensions, shape)]
    return tuple(
        size // math.prod(map(axis_size, axes)) for size, axes in zip(shape, split, strict=True)
    )


def axes_of(spec: Iterable) -> tuple[str, ...]:
    """All mesh axes that a PartitionSpec names."""
    each = ((axes,) if isinstance(axes, str) else axes or () for axes in spec)
    return tuple(axis for axes in each for axis in axes)


def constrain(x: Any, dimensions: str) -> Any:
    """`x` with the sharding from `activation_spec`; unchanged on one device."""
    if not many_devices():
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(dimensions, x.shape))


def batch_shardings(mesh: Mesh, batch: Any) -> Any:
    """The sharding of each array of a batch: rows over `data` and `fsdp`, positions over `seq`."""
    return jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(*BATCH[: x.ndim])), batch)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that devices of this process hold."""
    rows = NamedSharding(mesh, PartitionSpec(BATCH[0]))
    held = rows.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in held if index for row in range(*index[0].indices(batch_size))})


def place_batch(mesh: Mesh, batch: Any, rows: Sequence[int], batch_size: int) -> Any:
    """Places a batch on the mesh.

    Args:
      mesh: Mesh of all processes.
      batch: Arrays of this process's rows.
      rows: Numbers of these rows, from `local_rows`.
      batch_size: Number of rows of all processes.
    """
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
    """Raises `ConfigError` if the mesh does not divide the rows, positions or heads."""
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
    """A tree of shapes with the sharding of each array from the table `PARAMETERS`.

    Raises:
      ConfigError: for an array that none of its PartitionSpecs divides.
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
    """A sentence about the first dimension that its axes do not divide; None if all divide."""
    for dimension, axes in enumerate(spec):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if shape[dimension] % parts:
            shown = " * ".join(f"mesh.{axis}" for axis in axes if mesh.shape[axis] > 1)
            return f"{shown}={parts} does not divide dimension {dimension}"
    return None


def _ends_with(name: str, end: str) -> bool:
    return re.search(f"(^|/){end}$", name) is not None
