"""Memory traffic of a decoded token, in programs compiled ahead of time for a GPU or TPU.

    python -m benchmarks.decoding_bytes [--gpu=h200 | --topology=v5e:2x2] [--batch_sizes=1,64]

The paper's sizes in bfloat16 on one device, which need not exist. "least" is the unavoidable
traffic: all weights except the embedding are read, and the state is read and written. Needs the
compilers named in `retnet_jax/aot`.
"""

import dataclasses
import importlib
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from benchmarks.measure import write_results
from retnet_jax.aot import topologies
from retnet_jax.aot.traffic import memory_traffic
from retnet_jax.generation.decode import Progress, decode, row_keys
from retnet_jax.model import build_model, for_decoding

flags.DEFINE_enum("gpu", "h200", topologies.GPUS, "Kind of GPU")
flags.DEFINE_string("topology", "", "TPU topology to use instead of a GPU, such as v5e:2x2")
flags.DEFINE_list("sizes", ["1p3b", "6p7b"], "Sizes of models: SIZE in configs/retnet_SIZE.py")
flags.DEFINE_list("batch_sizes", ["1", "64"], "Numbers of rows in a batch")

TOKENS = 16  # decoded in a compiled loop
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
    model, progress, keys = abstract_arguments(size, batch_size, weights, state_dtype)
    place = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (model, progress, keys)
    )
    begin = time.perf_counter()
    program = decode.lower(*arguments, length=TOKENS).compile()
    seconds = time.perf_counter() - begin
    read = sum(traffic.bytes for traffic in memory_traffic(program.as_text())) / TOKENS / MIB
    least = bytes_of(model) - bytes_of(model.embedding) + 2 * bytes_of(progress.state.layers)
    return {"moved": read, "least": least / MIB, "compile_seconds": seconds}


def abstract_arguments(size: str, batch_size: int, weights: str | None, state_dtype: str):
    """Shapes and dtypes of a model, its progress and the random keys of the rows."""
    config = importlib.import_module(f"retnet_jax.configs.retnet_{size}").get_config().model
    config = dataclasses.replace(config, dtype="bfloat16", remat="none")

    def build():
        model = for_decoding(build_model(config, rngs=nnx.Rngs(0)), weights, state_dtype)
        logits = jnp.zeros((batch_size, config.vocab_size))
        state = model.init_state(batch_size, capacity=1)
        progress = Progress(logits, state, jnp.zeros(batch_size, bool))
        return model, progress, row_keys(0, batch_size)

    return jax.eval_shape(build)


def bytes_of(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


if __name__ == "__main__":
    app.run(main)
