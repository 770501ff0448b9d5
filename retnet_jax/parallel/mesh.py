"""The device mesh, and questions about the one that is set: its platform, devices and axes."""

from collections.abc import Iterable, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from retnet_jax.config import MeshConfig
from retnet_jax.errors import ConfigError

# In the order of the devices: those next to each other exchange the most, within `tensor`.
AXES = ("data", "fsdp", "seq", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `devices`; None: of all devices.

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


def first_device() -> Mesh:
    """A mesh of the first device alone."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


def number_of_slices(devices: Iterable[jax.Device]) -> int:
    """The number of TPU slices, with links within each and a network between them; else 1."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def backend() -> str:
    """The platform that runs the program: of the mesh that is set, else jax's default device.

    A program can be compiled for devices that this machine does not have.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def device_kind() -> str:
    """The kind of device that runs the program, such as "TPU v5 lite", as `backend` finds it."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.devices()[0].device_kind if mesh.empty else mesh.abstract_device.device_kind


def many_devices() -> bool:
    """Whether a mesh with these axes is set that has more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and set(AXES) <= set(mesh.axis_names)


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh that is set; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get(axis, 1)
