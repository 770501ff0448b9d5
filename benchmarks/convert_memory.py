"""Memory of converting a random checkpoint of the size of fla-hub/retnet-2.7B-100B.

    python -m benchmarks.convert_memory --directory=SCRATCH      needs 30 GB there temporarily

Each conversion runs in its own process. The result is the peak of its resident memory minus that of
converting a tiny model.
"""

import shutil
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import app, flags

from benchmarks.measure import output_of_process, write_results
from retnet_jax import interop
from retnet_jax.config import ModelConfig
from retnet_jax.interop import presets
from retnet_jax.interop.parameter_source import Description
from retnet_jax.interop.tensor_files import TensorInfo
from retnet_jax.model.parameters import parameter_shape

SIZES = {
    "tiny": presets.fla(vocab_size=64, d_model=32, n_layers=2, n_heads=2),
    "2.7B": presets.fla(vocab_size=32_000, d_model=2560, n_layers=32, n_heads=10, ffn_dim=3584),
}
CONVERSIONS = (("fla", "own"), ("own", "fla"), ("fla", "fla_unfused"))
PROGRAM = """
import sys
from retnet_jax import interop
interop.convert(*sys.argv[1:])
print(memory("VmHWM"))
"""


class RandomParameters:
    """A source of random bfloat16 parameters."""

    def __init__(self, config: ModelConfig):
        self.description = Description(config)
        self._random = np.random.default_rng(0)

    def info(self, own: str, layer: int | None) -> TensorInfo:
        shape = parameter_shape(self.description.model, own, layer)
        return TensorInfo(shape, np.dtype(ml_dtypes.bfloat16))

    def read(self, own: str, layer: int | None) -> np.ndarray:
        values = self._random.random(self.info(own, layer).shape, np.float32)
        return values.astype(ml_dtypes.bfloat16)


def convert(source: Path, target: Path, layout: str) -> tuple[int, float]:
    """Peak resident bytes and seconds of a process that converts a checkpoint."""
    shutil.rmtree(target, ignore_errors=True)
    start = time.perf_counter()
    peak = int(output_of_process(PROGRAM, str(source), str(target), layout))
    return peak, time.perf_counter() - start


def main(_) -> None:
    scratch = Path(flags.FLAGS.directory)
    results = {}
    for size, config in SIZES.items():
        made = {"fla": scratch / f"{size}_fla"}
        shutil.rmtree(made["fla"], ignore_errors=True)
        interop.fla.LAYOUT.write(RandomParameters(config), made["fla"])
        for source, layout in CONVERSIONS:
            made[layout] = scratch / f"{size}_{layout}"
            peak, seconds = convert(made[source], made[layout], layout)
            results[f"{size}, {source} to {layout}"] = {"peak_bytes": peak, "seconds": seconds}
        for directory in made.values():
            shutil.rmtree(directory, ignore_errors=True)
    largest = 2 * SIZES["2.7B"].vocab_size * SIZES["2.7B"].d_model
    rows = []
    for source, layout in CONVERSIONS:
        whole, tiny = (results[f"{size}, {source} to {layout}"] for size in ("2.7B", "tiny"))
        rows.append(
            {
                "conversion": f"{source} to {layout}",
                "bytes_beyond_tiny": whole["peak_bytes"] - tiny["peak_bytes"],
                "peak_bytes": whole["peak_bytes"],
                "seconds": round(whole["seconds"], 1),
            }
        )
    record = {
        "parameters": SIZES["2.7B"].parameter_count(),
        "largest_tensor_bytes": largest,
        "allowed_bytes": 2 * largest + 2**30,
        "conversions": rows,
    }
    print(*rows, sep="\n")
    print(write_results("convert_memory", record))


if __name__ == "__main__":
    flags.DEFINE_string("directory", None, "Scratch directory, for 30 GB", required=True)
    app.run(main)
