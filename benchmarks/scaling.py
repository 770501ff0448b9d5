"""What it costs to compile a step and to save a state.

    python -m benchmarks.scaling --directory=SCRATCH [--topology=v5p:4x4x4]     needs 4 GB there

Lowering and compiling of a step of 12 and of 48 layers on eight simulated devices, in turn; the
paper's 6.7B for a topology, in a process of its own (needs libtpu); and a checkpoint of 1.1 GB: how
long the call blocks training, and how long the writing takes.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
from absl import flags

from benchmarks.measure import write_results
from retnet_jax.aot.compile_step import compile_step
from retnet_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from retnet_jax.programs import command_line
from retnet_jax.runs.checkpoint import Checkpoints

flags.DEFINE_string("directory", None, "where checkpoints are written", required=True)
flags.DEFINE_string("topology", "", "of the 6.7B; empty: it is left out")
flags.DEFINE_integer("rounds", 5, "measurements of each")

PROGRAM = """
import json, re, sys
from pathlib import Path
from retnet_jax.aot import topologies
topologies.prepare()
from retnet_jax.aot.compile_step import compile_step
from retnet_jax.aot.report import report
from retnet_jax.configs.retnet_6p7b import get_config
found = report(compile_step(get_config(), topologies.tpus(sys.argv[1])))
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print(json.dumps({"lower_seconds": found.lower_seconds, "compile_seconds": found.compile_seconds,
                  "peak_memory_gib": int(peak) / 2**20}))
"""


def main() -> None:
    found = {"compiling": compiling(flags.FLAGS.rounds)}
    found["saving"] = saving(Path(flags.FLAGS.directory), flags.FLAGS.rounds)
    if flags.FLAGS.topology:
        command = [sys.executable, "-c", PROGRAM, flags.FLAGS.topology]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found["6.7B"] = {"topology": flags.FLAGS.topology} | json.loads(done.stdout)
    print(json.dumps(found, indent=2))
    print(f"written to {write_results('scaling', found)}")


def compiling(rounds: int) -> dict:
    """Seconds for 12 and for 48 layers."""
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
    """Seconds that a save blocks, and that it takes."""
    # Random, because checkpoints are compressed.
    keys = jax.random.split(jax.random.key(0), 8)
    state = {f"layer{i}": jax.random.normal(key, (36, 2**20)) for i, key in enumerate(keys)}
    jax.block_until_ready(state)
    blocked, written = [], []
    with contextlib.closing(Checkpoints(directory / "checkpoints", keep=1)) as checkpoints:
        for step in range(rounds + 1):  # the first makes threads, and is not counted
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
