"""Descriptions of devices that this machine does not have, to compile for.

TPUs need the package `libtpu` of the version for the installed jax (`pip install 'jax[tpu]'`), GPUs
need jax-cuda12-plugin, jax-cuda12-pjrt and nvidia-cuda-nvcc-cu12. Nothing can be run on them.
"""

import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from retnet_jax.errors import ConfigError, brief
from retnet_jax.parallel.mesh import Device

GPUS = ("h100", "h200")

# XLA's description of a GPU: `GpuTargetConfigProto` in its device_description.proto.
_GPU_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: {bandwidth}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
_GPU_NUMBERS = {
    "h100": {"name": "NVIDIA H100", "bandwidth": 3352320000000, "memory": 84942979072},
    "h200": {"name": "NVIDIA H200", "bandwidth": 4800000000000, "memory": 151397597184},
}


# Read by libtpu. Without them it asks the cloud's metadata server which machine it runs on, and
# refuses to load while another process uses it.
_WITHOUT_TPUS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Read by XLA, which for GPUs would choose kernels by running them on the device.
_WITHOUT_GPUS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def prepare() -> None:
    """Prepares this process for compiling without devices. Call it before jax is used.

    The compilers read these settings only from the environment, once when they start. jax itself is
    set to the CPU, so nothing runs on a device of this machine.
    """
    jax.config.update("jax_platforms", "cpu")
    for name, value in _WITHOUT_TPUS.items():
        os.environ.setdefault(name, value)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_WITHOUT_GPUS}".strip()


def tpus(topology: str, slices: int = 1) -> Sequence[Device]:
    """The devices of TPU slices.

    Args:
      topology: Generation and shape of a slice, such as "v5p:4x4x4" or "v5e:16x16".
      slices: Number of slices.

    Raises:
      ConfigError: if there is no such topology or no libtpu.
    """
    try:
        # Without it jax would say that the platform is unknown.
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports] (optional)
    except ImportError:
        raise ConfigError(
            f"--topology={topology} needs the package libtpu: pip install 'jax[tpu]'"
        ) from None
    several: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):
        several["chip_config_name"] = "megacore"  # a chip is one device, as on real hardware
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **several
        ).devices
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"--topology={topology} is not known to libtpu ({brief(error)}); give v4, v5p or tpu7x "
            "with three sizes, such as v5p:4x4x4, or v5e or v6e with two, such as v6e:16x16"
        ) from error


def gpus(name: str, count: int = 1) -> Sequence[Device]:
    """GPUs of one node.

    Raises:
      ConfigError: for a GPU that is not described here, or if its compiler is missing.
    """
    if name not in _GPU_NUMBERS:
        raise ConfigError(f"--gpu={name} is not one of {', '.join(GPUS)}")
    try:
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=name,
            topology=f"1x1x{count}",
            target_config=_GPU_DESCRIPTION.format(**_GPU_NUMBERS[name]),
        ).devices
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"--gpu={name} needs XLA's compiler for it ({brief(error)}): pip install "
            f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__} "
            "nvidia-cuda-nvcc-cu12"
        ) from error
