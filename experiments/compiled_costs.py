"""Memory and traffic of programs that are compiled for devices, which need not exist.

The functions run in processes of their own (`processes.in_own_process`): the settings of XLA's
compilers for GPUs and TPUs can only be made before jax starts.
"""

import dataclasses
import importlib
import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.programs import abstract_decoding, compiled_decoding
from experiments.cost_models import decoding_config, state_dtype
from retnet_jax.aot import topologies
from retnet_jax.aot.compile_step import DoesNotFitError, compile_step, device_bytes
from retnet_jax.aot.hlo import memory_of, peak_bytes
from retnet_jax.config import Config, MeshConfig, ModelConfig, TrainConfig
from retnet_jax.configs.paper_settings import paper_config, paper_model
from retnet_jax.ops import flash_attention
from retnet_jax.parallel.chips import chip
from retnet_jax.parallel.mesh import Device

# Calls of kernels for retention and attention in a program's text.
_KERNEL = re.compile(r'custom_call_target="(?:mosaic_gpu\w*|tpu_custom_call)"')
DEVICES = ("H200", "TPU v5p", "cpu")


def devices_of(kind: str, count: int) -> Sequence[Device]:
    """Devices of one of the `DEVICES`: GPUs of a node, or the first chips of a TPU slice."""
    if kind == "cpu":
        return jax.devices()[:count]
    topologies.prepare()
    if kind == "H200":
        return topologies.gpus("h200", count)
    return topologies.tpus("v5p:2x2x1" if count <= 4 else "v5p:2x2x2")[:count]


def training_config(size: str, architecture: str) -> Config:
    """The config of one of the paper's sizes; "tiny" is for trials."""
    if size == "13B":
        # As the paper's other sizes, which have no config of it: Table 4 has its costs.
        model = paper_model(n_layers=40, d_model=5120)
        return paper_config(model, architecture, learning_rate=3e-4, train=TrainConfig())
    if size == "tiny":
        model = ModelConfig(vocab_size=512, d_model=64, n_layers=2, n_heads=2, dtype="bfloat16")
        return Config(model=model.built_as(architecture))
    name = size.lower().replace(".", "p")
    return importlib.import_module(f"retnet_jax.configs.retnet_{name}").get_config(architecture)


def training_memory(
    size: str,
    architecture: str,
    remat: str,
    length: int,
    rows: int,
    device: str,
    count: int,
    flash: bool,
) -> dict[str, Any]:
    """Memory of one device in a training step, as the compiler reports it.

    Args:
      size: One of the paper's sizes, such as "1.3B".
      architecture: "retnet" or "transformer".
      remat: As in the model's config.
      length: Tokens of a row, which is one document.
      rows: Rows of a step on each device.
      device: One of `DEVICES`.
      count: Number of devices; parameters and optimiser are split over them (mesh.fsdp).
      flash: Whether attention may use flash attention.

    Returns:
      The bytes, and whether they are within the device's memory. If they are not, the GiB that the
      compiler says are needed.
    """
    config = training_config(size, architecture)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat=remat),
        data=dataclasses.replace(config.data, sequence_length=length),
        train=dataclasses.replace(config.train, batch_size=rows * count, micro_batches=1),
        mesh=MeshConfig(data=1, fsdp=count),
    )
    devices = devices_of(device, count)
    if not flash:
        flash_attention.KERNELS.clear()  # attention then runs in XLA, in this process
    known = chip(devices[0].device_kind)
    found: dict[str, Any] = {
        "parameters": config.model.parameter_count(),
        "memory_bytes": None if known is None else known.memory,
    }
    try:
        step = compile_step(config, devices, one_document=True)
    except DoesNotFitError as error:
        return found | {"fits": False, **needed(str(error))}
    memory = memory_of(step.compiled)
    return found | {
        "fits": True,
        "peak_bytes": peak_bytes(memory),
        "temporary_bytes": memory.temp_size_in_bytes,
        "state_bytes": device_bytes(step.state),
        "kernels": len(_KERNEL.findall(step.compiled.as_text() or "")),
        "compile_seconds": step.compile_seconds,
    }


def needed(message: str) -> dict[str, Any]:
    """The bytes that a step needs, from the message that it does not fit."""
    number = re.search(r"it needs ([\d.]+) GiB", message)
    return {"peak_bytes": float(number[1]) * 2**30 if number else None, "message": message}


def decoding_bytes(
    size: str, architecture: str, rows: int, lengths: Sequence[int], device: str
) -> list[dict[str, Any]]:
    """Bytes of memory and of traffic of a decoded token after each of some lengths.

    Weights, activations and states are in bfloat16. A program that cannot fit, because weights and
    states are larger than the device's memory, is not compiled.

    Args:
      size: One of `cost_models.SIZES`.
      architecture: One of `cost_models.ARCHITECTURES`.
      rows: Number of rows.
      lengths: Numbers of tokens that a row has read.
      device: One of `DEVICES`.
    """
    config = dataclasses.replace(decoding_config(size, architecture), dtype="bfloat16")
    place = devices_of(device, 1)[0]
    known = chip(place.device_kind)
    memory = math.inf if known is None else known.memory
    found: list[dict[str, Any]] = []
    for length in lengths:
        if found and config.mixer == "retention":  # the program is the same
            found.append(found[0] | {"length": length})
            continue
        arguments = abstract_decoding(
            place, config, rows, length, state_dtype=state_dtype(config, "bfloat16")
        )
        record: dict[str, Any] = {
            "length": length,
            "weight_bytes": arguments.weight_bytes,
            "state_bytes": arguments.state_bytes,
            "peak_bytes": arguments.weight_bytes + arguments.state_bytes,
        }
        if record["peak_bytes"] < memory:
            record |= compiled_decoding(place, arguments)._asdict()
        found.append(record | {"fits": record["peak_bytes"] < memory})
    return found
