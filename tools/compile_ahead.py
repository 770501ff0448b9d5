"""Compiles the training step for devices that this machine may not have, and reports its costs.

    python tools/compile_ahead.py --config=configs/retnet_6p7b.py --topology=v5p:4x4x4
    python tools/compile_ahead.py --config=configs/retnet_6p7b.py --topology=v5p:4x4x4 --slices=2
    python tools/compile_ahead.py --config=configs/retnet_1p3b.py --gpu=h200
    python tools/compile_ahead.py --config=configs/retnet_6p7b.py --topology=v6e:16x16 --fit=8

Without --topology and --gpu it compiles for the devices of this machine. The step is the one that
train.py runs. Memory is reported by the compiler, for a step and for the evaluation on held-out
windows. --save=FILE saves the compiled step, with which train.py --compiled=FILE starts. TPUs need
libtpu; for GPUs an error message names the packages.

Times are lower bounds from data sheets: FLOPs divided by the peak, and received bytes divided by
the speed of the links. For TPUs there is also the compiler's estimate, which leaves out messages
and is no bound: in the one comparison with a measurement it was 1.14 times as long
(docs/many_devices.md). The MFU assumes that computation and messages overlap fully.

--fit=N compiles the N most promising ways to run the config, which differ in mesh, micro-batches
and recomputation in the backward pass. Those that fit into memory are ranked by tokens per second;
the column `memory` is the peak of a step or an evaluation.
"""

import json
from pathlib import Path

from absl import flags

from retnet_jax.aot import topologies
from retnet_jax.aot.compile_step import compile_step, save
from retnet_jax.aot.fit import fit, ranking
from retnet_jax.aot.report import report
from retnet_jax.errors import ConfigError
from retnet_jax.programs import command_line

flags.DEFINE_string("topology", None, "TPU generation and shape, such as v5p:4x4x4")
flags.DEFINE_integer("slices", 1, "number of TPU slices of that shape", 1)
flags.DEFINE_string("gpu", None, f"kind of GPU: {', '.join(topologies.GPUS)}")
flags.DEFINE_integer("gpus", 1, "number of GPUs, all in one node", 1)
flags.DEFINE_integer(
    "fit", 0, "number of arrangements to compile and rank; 0: compile the config as it is", 0
)
flags.DEFINE_string("save", None, "file to save the compiled step to")
flags.DEFINE_string("output", None, "file to write the report to, as JSON")


def main() -> None:
    """Compiles as the flags say."""
    given = flags.FLAGS
    if given.topology and given.gpu:
        raise ConfigError(
            f"--topology={given.topology} and --gpu={given.gpu}: give only one of them"
        )
    if given.fit and given.save:
        raise ConfigError(
            f"--fit={given.fit} compiles several steps, but --save={given.save} saves one: give "
            "only one of them"
        )
    if given.topology or given.gpu:
        topologies.prepare()
    config = command_line.given_config()
    if given.topology:
        devices = topologies.tpus(given.topology, given.slices)
    else:
        devices = topologies.gpus(given.gpu, given.gpus) if given.gpu else None
    if given.fit:
        reports = fit(config, devices, given.fit)
        print(ranking(reports))
        results = [each.as_dict() for each in reports]
    else:
        step = compile_step(config, devices)
        found = report(step)
        print(found.text())
        results = found.as_dict()
        if given.save:
            save(step, Path(given.save))
            print(f"saved the compiled step to {given.save}")
    if given.output:
        Path(given.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    command_line.define_config()
    command_line.run(main)
