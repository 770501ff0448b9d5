"""Compiles the training step for devices that this machine does not have, and says what it costs.

    python tools/compile_ahead.py --config=configs/retnet_6p7b.py --topology=v5p:4x4x4
    python tools/compile_ahead.py --config=configs/retnet_6p7b.py --topology=v5p:4x4x4 --slices=2
    python tools/compile_ahead.py --config=configs/retnet_1p3b.py --gpu=h200
    python tools/compile_ahead.py --config=configs/retnet_6p7b.py --topology=v6e:16x16 --fit=8

Without --topology and --gpu it compiles for the devices of this machine. The step is the one that
train.py runs: memory is the compiler's, and with --save=FILE train.py --compiled=FILE starts with
the program itself. The evaluation on held-out windows, beside the state that training keeps, is
compiled for its memory too. TPUs need libtpu, GPUs the packages that the error message names.

Times are lower bounds from data sheets: FLOPs over the peak, received bytes over the links. On TPUs
the compiler has an estimate of its own of all but the messages. The best MFU takes the larger of
computation and messages, as if all messages were hidden behind it.

--fit=N compiles the N most promising ways to run the config: meshes, micro-batches and what the
backward pass computes again. It ranks those of which a step and the evaluation fit by tokens per
second; `memory` is the larger of the two.
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
flags.DEFINE_integer("slices", 1, "TPU slices of that shape", 1)
flags.DEFINE_string("gpu", None, f"kind of GPU: {', '.join(topologies.GPUS)}")
flags.DEFINE_integer("gpus", 1, "GPUs of one node", 1)
flags.DEFINE_integer("fit", 0, "arrangements to compile and rank; 0: only the config's own", 0)
flags.DEFINE_string("save", None, "file for the compiled program")
flags.DEFINE_string("output", None, "file for what was found, as JSON")


def main() -> None:
    """Compiles as the flags say."""
    given = flags.FLAGS
    if given.topology and given.gpu:
        raise ConfigError(f"--topology={given.topology} and --gpu={given.gpu}: give one of them")
    if given.fit and given.save:
        raise ConfigError(f"--fit={given.fit} has no one program to --save={given.save}")
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
            print(f"written to {given.save}")
    if given.output:
        Path(given.output).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    command_line.define_config()
    command_line.run(main)
