"""Accelerators: peak FLOP/s, memory and bandwidths of one device, and the tiling of its kernels.

The numbers are from data sheets, for one `jax.Device`: a TPU7x chip is two devices, a v4 or v5p
chip is one. Memory is the part that programs can use. Bandwidths are for one direction: links
within a slice (ICI) or a node (NVLink), and the network of a device to other slices and nodes.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """Dense bfloat16 FLOP/s, bytes, bytes/s and Hz of one device."""

    kind: str  # start of `jax.Device.device_kind`
    flops: float
    memory: float
    memory_bandwidth: float
    links_bandwidth: float  # of all links of a device together
    network_bandwidth: float
    clock: float = 0.0  # of a TPU's cores; computed from the peak and the units of its cores
    vmem: int = 0  # of one core of a TPU
    chunk: int = 0  # tokens, in bfloat16, of a chunk that fills its matrix units: `pallas_tpu.py`


_GIB, _MIB = 2**30, 2**20

CHIPS = (
    Chip("TPU v4", 275e12, 32 * _GIB, 1.23e12, 300e9, 6.25e9, 1.05e9, 16 * _MIB, 128),
    Chip("TPU v5 lite", 197e12, 15.75 * _GIB, 0.82e12, 200e9, 3.1e9, 1.5e9, 128 * _MIB, 128),
    Chip("TPU v5", 459e12, 95 * _GIB, 2.77e12, 600e9, 6.25e9, 1.75e9, 64 * _MIB, 128),
    Chip("TPU v6 lite", 918e12, 31.25 * _GIB, 1.64e12, 400e9, 12.5e9, 1.75e9, 128 * _MIB, 256),
    Chip("TPU7x", 1153e12, 96 * _GIB, 3.69e12, 300e9, 6.25e9, 0.0, 64 * _MIB, 256),
    Chip("NVIDIA A100", 312e12, 79 * _GIB, 2.04e12, 300e9, 25e9),
    Chip("NVIDIA H100", 989e12, 79 * _GIB, 3.35e12, 450e9, 50e9),
    Chip("NVIDIA H200", 989e12, 141 * _GIB, 4.8e12, 450e9, 50e9),
    Chip("NVIDIA B200", 2250e12, 178 * _GIB, 7.7e12, 900e9, 50e9),
)


def chip(device_kind: str) -> Chip | None:
    """The chip with this `device_kind`; None if it is not listed."""
    return next((chip for chip in CHIPS if device_kind.startswith(chip.kind)), None)
