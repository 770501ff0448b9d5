"""What keeping freed memory saves in a training step of the quickstart on a CPU.

    python -m benchmarks.host_memory [--rounds=3] [--steps=30]

Steps run in processes of their own, in turn with and without `keep_freed_memory`. Reported are
medians over the rounds.
"""

import json
import statistics

from absl import app, flags

from benchmarks.measure import output_of_process, write_results
from retnet_jax.config.model import ARCHITECTURES

flags.DEFINE_integer("rounds", 3, "Number of processes of each kind")
flags.DEFINE_integer("steps", 30, "Number of steps in a process")


def main(_) -> None:
    args, results = flags.FLAGS, {}
    for architecture in ARCHITECTURES:
        rounds = {"default": [], "kept": []}
        for _ in range(args.rounds):
            for name, found in rounds.items():
                arguments = architecture, str(int(name == "kept")), str(args.steps)
                found.append(json.loads(output_of_process(_STEPS, *arguments)))
        results[architecture] = {
            name: {key: statistics.median(x[key] for x in found) for key in found[0]}
            for name, found in rounds.items()
        }
        print(architecture, json.dumps(results[architecture], indent=1))
    print(f"written to {write_results('host_memory', results)}")


_STEPS = """
import json, resource, sys, time
architecture, kept, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if kept:
    from retnet_jax.programs.host_memory import keep_freed_memory
    assert keep_freed_memory()
import jax
import numpy as np
from retnet_jax.configs.quickstart import get_config
from retnet_jax.data import Batch
from retnet_jax.parallel.mesh import make_mesh
from retnet_jax.training.step import abstract_state, initial_state, make_step

config = get_config(architecture)
mesh = make_mesh(config.mesh)
step = make_step(config, abstract_state(config, mesh))
shape = config.train.batch_size, config.data.sequence_length
tokens, targets = np.random.default_rng(0).integers(0, 4096, (2, *shape), np.int32)
ones = np.ones(shape, np.int32)
batch = Batch(tokens, targets, ones, ones.astype(np.float32), np.zeros(shape[0], bool))
batch = jax.device_put(batch)

def usage():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return np.array([time.perf_counter(), used.ru_utime, used.ru_stime, used.ru_minflt])

with jax.set_mesh(mesh):
    state = jax.jit(lambda: initial_state(config))()
    for i in range(steps + 4):
        if i == 4:
            before = usage()
        state, metrics = jax.block_until_ready(step(state, batch))
wall, user, system, faults = ((usage() - before) / steps).tolist()
peak = memory("VmHWM")
print(json.dumps({
    "milliseconds": 1000 * wall, "user_milliseconds": 1000 * user,
    "system_milliseconds": 1000 * system, "page_faults": faults, "peak_bytes": peak,
}))
"""


if __name__ == "__main__":
    app.run(main)
