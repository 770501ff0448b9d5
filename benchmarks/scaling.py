"""Time to compile a training step and to save a checkpoint.

    python -m benchmarks.scaling --directory=SCRATCH [--topology=v5p:4x4x4]     needs 4 GB there

Measures the lowering and compilation of steps of 12 and of 48 layers on eight simulated devices, in
turn; that of the paper's 6.7B model for a topology, in its own process (needs libtpu); and for a
checkpoint of 1.1 GB, how long saving blocks training, and how long writing takes.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
from absl import flags

from benchmarks.measure import output_of_process, write_results
from retnet_jax.aot.compile_step import compile_step
from retnet_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from retnet_jax.programs import command_line
from retnet_jax.runs.checkpoint import Checkpoints

flags.DEFINE_string("directory", None, "Directory for checkpoints, for 4 GB", required=True)
flags.DEFINE_string("topology", "", "TPU topology of the 6.7B model; empty: skip this model")
flags.DEFINE_integer("rounds", 5, "Number of measurements of each kind")

PROGRAM = """
import json, sys
from retnet_jax.aot import topologies
topologies.prepare()
from retnet_jax.aot.compile_step import compile_step
from retnet_jax.aot.report import report
from retnet_jax.configs.retnet_6p7b import get_config
found = report(compile_step(get_config(), topologies.tpus(sys.argv[1])))
print(json.dumps({"lower_seconds": found.lower_seconds, "compile_seconds": found.compile_seconds,
                  "peak_memory_gib": memory("VmHWM") / 2**30}))
"""


def main() -> None:
    found = {"compiling": compiling(flags.FLAGS.rounds)}
    found["saving"] = saving(Path(flags.FLAGS.directory), flags.FLAGS.rounds)
    if flags.FLAGS.topology:
        compiled = json.loads(output_of_process(PROGRAM, flags.FLAGS.topology))
        found["6.7B"] = {"topology": flags.FLAGS.topology} | compiled
    print(json.dumps(found, indent=2))
    print(f"written to {write_results('scaling', found)}")


def compiling(rounds: int) -> dict:
    """Seconds to lower and to compile steps of 12 and of 48 layers."""
    config = Config(
        model=ModelConfig(d_model=512, n_heads=4, remat="full"),
        data=DataConfig(sequence_length=512),
        train=TrainConfig(batch_size=8, micro_batches=2),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
    )
    seconds = {12: [], 48: []}
    for _ in range(rounds):
        for layers, kept in seconds.items():
            jax.clear_caches()
            model = dataclasses.replace(config.model, n_layers=layers)
            step = compile_step(dataclasses.replace(config, model=model))
            kept.append((step.lower_seconds, step.compile_seconds))
    ratios = [b[1] / a[1] for a, b in zip(seconds[12], seconds[48], strict=True)]
    return {
        "lower_and_compile_seconds": seconds,
        "compile_ratio_48_to_12": statistics.median(ratios),
    }


def saving(directory: Path, rounds: int) -> dict:
    """Seconds that saving a checkpoint blocks, and that it takes."""
    # Random, because checkpoints are compressed.
    keys = jax.random.split(jax.random.key(0), 8)
    state = {f"layer{i}": jax.random.normal(key, (36, 2**20)) for i, key in enumerate(keys)}
    jax.block_until_ready(state)
    blocked, written = [], []
    with contextlib.closing(Checkpoints(directory / "checkpoints", keep=1)) as checkpoints:
        for step in range(rounds + 1):  # the first one starts threads, and is not counted
            begin = time.perf_counter()
            checkpoints.save(step, {"model": state}, {"next_batch": step})
            blocked.append(time.perf_counter() - begin)
            checkpoints.wait()
            written.append(time.perf_counter() - begin)
    ratios = [a / b for a, b in zip(blocked[1:], written[1:], strict=True)]
    return {
        "bytes": sum(x.nbytes for x in state.values()),
        "blocked_seconds": blocked[1:],
        "written_seconds": written[1:],
        "share": statistics.median(ratios),
    }


if __name__ == "__main__":
    command_line.run(main)
