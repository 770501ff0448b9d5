"""A whole training step on a CPU, compared with torchscale's RetNet and PyTorch's attention.

    pip install torch torchscale        # only for this benchmark, best in a separate environment
    python -m benchmarks.step_against_torch [--rounds=7] [--widths=256,512] [--shapes=4x512,1x2048]

Four layers, a vocabulary of 4096 shared by embedding and head, float32, AdamW, gradients clipped to
a norm of 1; forward, backward and update. Our RetNet is torchscale's (`interop.presets.torchscale`)
with four heads, keys of width d, values and feed-forward layer of width 2 d; both begin with the
same weights, and the losses of their first steps have to be the same. torchscale runs its chunkwise
form with the chunk that is fastest of CHUNKS, and its parallel form up to 2048 tokens. The
Transformers are the twin of this RetNet (heads of 64) and one in PyTorch of the same sizes that
uses `scaled_dot_product_attention`. PyTorch runs as it is installed, without `torch.compile`, with
its fused AdamW. All steps of a shape take turns on all cores, and the rate of a matrix product is
measured among them. Prints tables and writes benchmarks/results/step_against_torch.json.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.measure import interleaved_seconds, median_milliseconds, require_cpu, write_results
from benchmarks.programs import TrainingStep, random_model
from benchmarks.step_parts import time_of_parts
from retnet_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from retnet_jax.interop.presets import torchscale
from retnet_jax.model import LanguageModel
from retnet_jax.programs.host_memory import keep_freed_memory

try:
    import torch

    from benchmarks.torch_models import TorchTransformer, torch_step, torchscale_retnet
except ImportError as error:
    raise SystemExit(f"{error}: this benchmark needs `pip install torch torchscale`") from error

ROUNDS = flags.DEFINE_integer("rounds", 7, "Number of timed steps of each")
WIDTHS = flags.DEFINE_list("widths", ["256", "512"], "Widths d of the models")
SHAPES = flags.DEFINE_list("shapes", ["4x512", "1x2048", "1x8192"], "Rows x tokens of a step")

CHUNKS = (64, 128, 256, 512)
LONGEST_PARALLEL = 2048
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, clip_norm=1.0, schedule="constant", warmup_steps=0)
MATRIX = 1024  # rows and columns of the product whose rate is measured beside the steps
OURS, OUR_TWIN = "retnet-jax", "retnet-jax Transformer"
TORCH_TWIN, PRODUCT = "torch Transformer", "matrix product"


def own_step(model: LanguageModel, tokens: np.ndarray) -> TrainingStep:
    """Our step, from given parameters."""
    rows, length = tokens.shape
    config = Config(
        model=model.config,
        data=DataConfig(sequence_length=length),
        optimizer=OPTIMIZER,
        train=TrainConfig(steps=1000, batch_size=rows),
    )
    return TrainingStep(config, tokens, model)


def model_config(width: int) -> ModelConfig:
    return torchscale(
        vocab_size=4096,
        d_model=width,
        n_layers=4,
        n_heads=4,
        value_dim=2 * width,
        ffn_dim=2 * width,
        tie_embeddings=True,
    )


def all_steps(width: int, rows: int, length: int) -> dict[str, Callable[[], Any]]:
    """The steps to compare; those of torchscale begin with our weights."""
    config = model_config(width)
    twin = config.transformer_twin(n_heads=width // 64)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length), np.int32)
    model = random_model(config)
    update = partial(torch_step, tokens=tokens, optimizer=OPTIMIZER)
    steps: dict[str, Callable[[], Any]] = {
        f"torchscale, chunk {chunk}": update(torchscale_retnet(model, chunk))
        for chunk in CHUNKS
        if chunk <= length
    }
    if length <= LONGEST_PARALLEL:
        steps["torchscale, parallel"] = update(torchscale_retnet(model, None))
    steps[OURS] = own_step(model, tokens)
    steps[OUR_TWIN] = own_step(random_model(twin), tokens)
    steps[TORCH_TWIN] = update(TorchTransformer(twin))
    steps[PRODUCT] = matrix_product()
    return steps


def matrix_product() -> Callable[[], jax.Array]:
    """A product of two matrices, as fast as XLA computes it."""
    a, b = np.random.default_rng(0).normal(size=(2, MATRIX, MATRIX)).astype(np.float32)
    arrays = jnp.asarray(a), jnp.asarray(b)
    return partial(jax.jit(jnp.matmul).lower(*arrays).compile(), *arrays)


def check(steps: dict[str, Callable[[], Any]]) -> None:
    """Exits unless three steps of each RetNet have the losses of ours."""
    losses = {
        name: [float(step()) for _ in range(3)]
        for name, step in steps.items()
        if name == OURS or name.startswith("torchscale")
    }
    for name, found in losses.items():
        if not np.allclose(found, losses[OURS], rtol=1e-3):
            raise SystemExit(f"losses differ, not the same model: {losses[OURS]}, {name} {found}")


def measure(width: int, rows: int, length: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of each step at one shape, and what follows from them."""
    steps = all_steps(width, rows, length)
    check(steps)
    seconds = interleaved_seconds(steps, rounds)
    milliseconds = {name: median_milliseconds(kept) for name, kept in seconds.items()}
    chunkwise = [ms for name, ms in milliseconds.items() if ", chunk " in name]
    config, own = model_config(width), milliseconds[OURS]
    flops = rows * length * config.training_flops_per_token(length)
    ours = steps[OURS]
    assert isinstance(ours, TrainingStep)
    return {
        "width": width,
        "rows": rows,
        "length": length,
        "parameters": config.parameter_count(),
        "milliseconds": milliseconds,
        "chunkwise_over_ours": min(chunkwise) / own,
        "torch_transformer_over_ours": milliseconds[TORCH_TWIN] / milliseconds[OUR_TWIN],
        "gflops_per_second": flops / own / 1e6,
        "share_of_matrix_rate": flops / own / (2 * MATRIX**3 / milliseconds[PRODUCT]),
        "parts": time_of_parts(ours.compiled, ours, steps=3),
    }


def main(_) -> None:
    require_cpu()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = []
    for width in map(int, WIDTHS.value):
        for shape in SHAPES.value:
            row = measure(width, *map(int, shape.split("x")), ROUNDS.value)
            rows.append(row)
            print_row(row, shape)
            versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
            path = write_results("step_against_torch", versions | {"rows": rows})
    print(f"written to {path}")


def print_row(row: dict[str, Any], shape: str) -> None:
    print(f"\nd {row['width']}, {shape}, {row['parameters']:,} parameters")
    for name, ms in row["milliseconds"].items():
        print(f"  {name:<24}{ms:>10.1f} ms")
    for name in ("chunkwise_over_ours", "torch_transformer_over_ours", "share_of_matrix_rate"):
        print(f"  {name:<28}{row[name]:>6.2f}")
    for part, ms in row["parts"].items():
        print(f"    {part:<22}{ms:>10.1f} ms", flush=True)


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
