"""Searches for the arrangement of a config that trains fastest on given devices.

An arrangement is a mesh, a number of micro-batches and a choice of what the backward pass
recomputes. A rough model of memory and time orders all arrangements. The most promising ones are
compiled, and ranked by the compiler's numbers.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax

from retnet_jax.aot.compile_step import DoesNotFitError, compile_step
from retnet_jax.aot.report import Report, report
from retnet_jax.config import Config, MeshConfig
from retnet_jax.errors import ConfigError
from retnet_jax.parallel.chips import Chip, chip
from retnet_jax.parallel.mesh import Device, number_of_slices

# Values of `model.remat`, from most to least recomputation, with two rough numbers: the bfloat16
# numbers stored per token and layer, in units of d_model; the share of the layers' forward pass
# that is run twice. Masks of dropout are not counted: only "none" stores them, a byte for each
# number.
REMATS = (
    ("full", 1.0, 1.0),
    ("q,k,v,gate", 7.0, 0.5),
    ("q,k,v,gate,retention,out,up", 12.0, 0.05),
    ("dots", 13.0, 0.05),
    ("none", 60.0, 0.0),
)
_MOST_TENSOR = 8
_MOST_ROWS = 32
_USED_WITHOUT_ACTIVATIONS = 2**32  # bytes for the loss and for gathered parameters
_FULL = 0.95  # share of a device's memory that may be used


class Arrangement(NamedTuple):
    """A config with one way to run it, and rough estimates of its seconds and bytes."""

    config: Config
    seconds: float
    bytes: float


def fit(config: Config, devices: Sequence[Device] | None, most: int) -> list[Report]:
    """Compiles the most promising arrangements, with a progress bar.

    Meshes, micro-batches and `model.remat` vary. The batch size does not, so what is trained stays
    the same.

    Args:
      config: What to train.
      devices: As in `compile_step`.
      most: Number of arrangements to compile.

    Returns:
      Reports of the arrangements that fit into memory, fastest first.

    Raises:
      ConfigError: if no arrangement fits.
    """
    from tqdm import tqdm

    devices = jax.devices() if devices is None else devices
    candidates = promising(arrangements(config, devices))
    if not candidates:
        raise ConfigError(
            f"no arrangement of train.batch_size={config.train.batch_size} on {len(devices)} x "
            f"{devices[0].device_kind} is expected to fit: use more devices or fewer layers"
        )
    found, problems = [], []
    with tqdm(candidates[:most], unit="arrangement") as bar:
        for candidate in bar:
            mesh, train = candidate.config.mesh, candidate.config.train
            bar.set_postfix_str(
                f"data={mesh.data} fsdp={mesh.fsdp} tensor={mesh.tensor} "
                f"micro_batches={train.micro_batches} remat={candidate.config.model.remat}"
            )
            try:
                found.append(report(compile_step(candidate.config, devices)))
            except DoesNotFitError as error:
                problems.append(str(error))
    if not found:
        raise ConfigError(
            "\n".join(["none of the arrangements that were compiled fits:", *problems])
        )
    return sorted(found, key=lambda x: x.step_seconds)


def promising(candidates: Iterable[Arrangement]) -> list[Arrangement]:
    """The fastest arrangement of each kind, then the second fastest of each, and so on.

    Which kind (remat and mesh.tensor) is the fastest is left to the compiled programs.
    """
    ranked, seen = [], Counter()
    for arrangement in sorted(candidates, key=lambda x: x.seconds):
        kind = arrangement.config.model.remat, arrangement.config.mesh.tensor
        ranked.append((seen[kind], arrangement.seconds, arrangement))
        seen[kind] += 1
    return [arrangement for *_, arrangement in sorted(ranked, key=lambda x: x[:2])]


def ranking(reports: Sequence[Report]) -> str:
    """A table with one line for each report."""
    lines = [
        "data fsdp  seq tensor  rows  remat                      memory  compute messages    step"
        "    MFU    tokens/s",
        "                                                           GiB        s        s       s",
    ]
    for x in reports:
        axes = x.mesh
        assert x.step_seconds is not None  # `arrangements` refuses devices without a data sheet
        compute = x.estimated_seconds or x.compute_seconds
        lines.append(
            f"{axes['data']:4} {axes['fsdp']:4} {axes['seq']:4} {axes['tensor']:6} {x.rows:5}  "
            f"{x.remat:<24} {x.needed_bytes / 2**30:8.1f} {compute:8.3f} {x.message_seconds:8.3f} "
            f"{x.step_seconds:7.3f} {x.mfu:6.1%} {x.tokens / x.step_seconds:11,.0f}"
        )
    return "\n".join(lines)


def arrangements(config: Config, devices: Sequence[Device]) -> Iterator[Arrangement]:
    """All arrangements of a config that are expected to fit.

    Raises:
      ConfigError: for devices without a data sheet.
    """
    known = chip(devices[0].device_kind)
    if known is None:
        raise ConfigError(
            f"--fit needs the data sheet of the device, but there is none for "
            f"{devices[0].device_kind!r}: give --topology or --gpu"
        )
    slices = number_of_slices(devices)
    seq = max(config.mesh.seq, 1)
    for tensor, fsdp, (remat, kept, again) in itertools.product(
        _powers(_MOST_TENSOR), _powers(len(devices)), REMATS
    ):
        data, rest = divmod(len(devices), tensor * fsdp * seq)
        if rest or data % slices or config.model.n_heads % tensor:
            continue
        for rows in _powers(_MOST_ROWS):
            micro_batches, rest = divmod(config.train.batch_size, data * fsdp * rows)
            if rest or not micro_batches:
                continue
            one = dataclasses.replace(
                config,
                model=dataclasses.replace(config.model, remat=remat),
                mesh=MeshConfig(data=data, fsdp=fsdp, seq=seq, tensor=tensor),
                train=dataclasses.replace(config.train, micro_batches=micro_batches),
            )
            needed = _bytes(one, rows, kept)
            if needed < _FULL * known.memory:
                yield Arrangement(one, _seconds(one, known, len(devices), again), needed)


def _powers(most: int) -> list[int]:
    return [2**i for i in range(int(math.log2(most)) + 1)]


def _bytes(config: Config, rows: int, kept: float) -> float:
    model, mesh = config.model, config.mesh
    moments = 8 if config.optimizer.moment_dtype == "float32" else 4
    accumulated = 8 if config.train.micro_batches > 1 else 4  # gradients, summed up
    state = model.parameter_count() * (4 + moments + accumulated) / (mesh.fsdp * mesh.tensor)
    tokens = rows * config.data.sequence_length / mesh.seq
    activations = 2 * tokens * model.n_layers * model.d_model * (1 + (kept - 1) / mesh.tensor)
    one_layer = 60 * 2 * tokens * model.d_model / mesh.tensor
    return state + activations + one_layer + _USED_WITHOUT_ACTIVATIONS


def _seconds(config: Config, known: Chip, devices: int, again: float) -> float:
    model, mesh, train = config.model, config.mesh, config.train
    tokens = train.batch_size * config.data.sequence_length
    flops = tokens * model.training_flops_per_token(config.data.sequence_length)
    # Matrix products do not reach the peak; narrow ones are further from it.
    width = min(model.d_model, model.ffn_width) / mesh.tensor
    compute = flops * (1 + again / 3) / devices / known.flops * (1 + 256 / width) / 0.8
    parameters = 2 * model.parameter_count() / mesh.tensor
    # Parameters are gathered twice (forward, backward), and gradients scattered over `fsdp`; then
    # gradients are summed over `data`.
    sharded = 3 * train.micro_batches * parameters * (1 - 1 / mesh.fsdp)
    # Over more than two dimensions of a 3D torus XLA gathers by summing zero-padded parts.
    if known.kind in ("TPU v4", "TPU v5", "TPU7x") and mesh.fsdp > devices ** (2 / 3) + 1:
        sharded *= 2
    copied = 4 * parameters / mesh.fsdp * (1 - 1 / mesh.data) * train.micro_batches
    local = tokens / (mesh.data * mesh.fsdp * mesh.seq)
    split = 6 * 2 * 2 * local * model.d_model * model.n_layers * (1 - 1 / mesh.tensor)
    messages = (sharded + copied + split) / known.links_bandwidth
    return max(compute, messages) + 0.2 * min(compute, messages)
