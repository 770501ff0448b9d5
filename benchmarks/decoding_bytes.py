"""Memory traffic of a decoded token, in programs compiled ahead of time for a GPU or TPU.

    python -m benchmarks.decoding_bytes [--gpu=h200 | --topology=v5e:2x2] [--batch_sizes=1,64]

The paper's sizes in bfloat16 on one device, which need not exist. "least" is the unavoidable
traffic: all weights except the embedding are read, and the state is read and written. Needs the
compilers named in `retnet_jax/aot`.
"""

import dataclasses
import importlib

from absl import app, flags

from benchmarks.measure import write_results
from benchmarks.programs import abstract_decoding, compiled_decoding
from retnet_jax.aot import topologies

flags.DEFINE_enum("gpu", "h200", topologies.GPUS, "Kind of GPU")
flags.DEFINE_string("topology", "", "TPU topology to use instead of a GPU, such as v5e:2x2")
flags.DEFINE_list("sizes", ["1p3b", "6p7b"], "Sizes of models: SIZE in configs/retnet_SIZE.py")
flags.DEFINE_list("batch_sizes", ["1", "64"], "Numbers of rows in a batch")

MIB = 2**20


def main(_) -> None:
    topologies.prepare()
    args, results = flags.FLAGS, {}
    name = args.topology or args.gpu
    device = (topologies.tpus(name) if args.topology else topologies.gpus(name))[0]
    for size in args.sizes:
        for batch_size in map(int, args.batch_sizes):
            for weights in (None, "int8"):
                for state_dtype in ("float32", "bfloat16"):
                    found = moved(device, size, batch_size, weights, state_dtype)
                    label = f"{size}, batch {batch_size}, {weights or 'bfloat16'} weights"
                    results[f"{label}, {state_dtype} state"] = found
                    print(label, state_dtype, found, flush=True)
    kind = name.partition(":")[0]
    print(f"written to {write_results(f'decoding_bytes_{kind}', results)}")


def moved(device, size: str, batch_size: int, weights: str | None, state_dtype: str) -> dict:
    """MiB of memory traffic per token."""
    config = importlib.import_module(f"retnet_jax.configs.retnet_{size}").get_config().model
    config = dataclasses.replace(config, dtype="bfloat16")
    arguments = abstract_decoding(
        device, config, batch_size, weights=weights, state_dtype=state_dtype
    )
    found = compiled_decoding(device, arguments)
    return {
        "moved": found.moved_bytes / MIB,
        "least": (arguments.weight_bytes + 2 * arguments.state_bytes) / MIB,
        "compile_seconds": found.compile_seconds,
    }


if __name__ == "__main__":
    app.run(main)
