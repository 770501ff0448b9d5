"""The device mesh, and the platform, devices and axes of the mesh that is set."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from retnet_jax.config import MeshConfig
from retnet_jax.errors import ConfigError

if TYPE_CHECKING:
    from jaxlib._jax import Device  # `jax.Device`, which is a variable to type checkers
else:
    Device = jax.Device

# The last axis has neighbouring devices: those of `tensor` exchange the most data.
AXES = ("data", "fsdp", "seq", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[Device] | None = None) -> Mesh:
    """The mesh of `devices`, by default of all.

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
            f"{shown} does not fit {count} devices: the sizes must multiply to {count}; one of "
            "them may be -1"
        )
    slices = number_of_slices(devices)
    if slices > 1:
        return _mesh_of_slices(sizes, slices, devices)
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _mesh_of_slices(sizes: list[int], slices: int, devices: Sequence[Device]) -> Mesh:
    """A mesh of several TPU slices; only the axis `data` extends over more than one slice."""
    data, *others = sizes
    if data % slices:
        raise ConfigError(
            f"mesh.data={data} does not divide over {slices} slices: set it to a multiple of "
            f"{slices}. No other axis can extend over slices: the network between them is slow"
        )
    within = mesh_utils.create_hybrid_device_mesh(
        (data // slices, *others),
        (slices, *[1] * len(others)),
        devices=devices,
        allow_split_physical_axes=True,
    )
    return Mesh(within, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def first_device() -> Mesh:
    """A mesh of only the first device."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


def number_of_slices(devices: Iterable[Device]) -> int:
    """The number of TPU slices that the devices belong to; 1 for other devices."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def backend() -> str:
    """The platform that runs the program: that of the mesh that is set, or jax's default.

    The mesh may have devices that this machine does not have: programs are also only compiled.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def device_kind() -> str:
    """The kind of device that runs the program, such as "TPU v5 lite"; see `backend`."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.devices()[0].device_kind if mesh.empty else mesh.abstract_device.device_kind


def many_devices() -> bool:
    """Whether a mesh with the axes `AXES` and more than one device is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and set(AXES) <= set(mesh.axis_names)


def axis_size(axis: str) -> int:
    """The number of devices on an axis of the mesh that is set; 1 if none is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get(axis, 1)
