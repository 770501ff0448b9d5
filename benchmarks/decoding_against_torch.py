"""Tokens per second of decoding on a CPU: both our models, torchscale's RetNet, one in PyTorch.

    pip install torch torchscale        # only for this benchmark, best in a separate environment
    python -m benchmarks.decoding_against_torch [--rounds=3] [--batches=1,8,64]
        [--positions=100,10000] [--most_gigabytes=6]

About 200M parameters: 16 layers of width 1024, a vocabulary of 16,384 shared by embedding and head,
four heads of retention (torchscale's RetNet, `interop.presets.torchscale`), sixteen of attention.
Each call decodes `--tokens` tokens greedily from a state of random numbers with the size that it
has at the position; models whose cache is larger than --most_gigabytes are left out. PyTorch runs
torchscale's recurrent form, and a Transformer with a cache that is allocated once and
`scaled_dot_product_attention`. "Of copy" is the share of the measured copy bandwidth with which the
weights and the state are read, and the state of a RetNet written; the bandwidth is measured before
each pair. Our model and PyTorch's take turns. Prints tables and writes
benchmarks/results/decoding_against_torch.json.
"""

import itertools
import os
from collections.abc import Callable
from typing import Any

from absl import app, flags

from benchmarks.measure import (
    copy_bandwidth,
    interleaved_seconds,
    median_milliseconds,
    require_cpu,
    write_results,
)
from benchmarks.programs import PRECISIONS, Decoding, decoding_model
from retnet_jax.config import ModelConfig
from retnet_jax.interop.presets import torchscale
from retnet_jax.programs.host_memory import keep_freed_memory

try:
    import torch

    from benchmarks.torch_models import (
        TorchTransformer,
        torchscale_decoder,
        torchscale_decoding,
        transformer_decoding,
    )
except ImportError as error:
    raise SystemExit(f"{error}: this benchmark needs `pip install torch torchscale`") from error

ROUNDS = flags.DEFINE_integer("rounds", 3, "Number of timed calls of each")
TOKENS = flags.DEFINE_integer("tokens", 8, "Tokens of each row in a call")
BATCHES = flags.DEFINE_list("batches", ["1", "8", "64"], "Numbers of rows")
POSITIONS = flags.DEFINE_list("positions", ["100", "10000"], "Positions of the first token")
MOST = flags.DEFINE_float("most_gigabytes", 6, "Largest state of a model")
LAYERS = flags.DEFINE_integer("n_layers", 16, "Number of layers")

WIDTH, VOCABULARY = 1024, 16_384


def config_of(architecture: str) -> ModelConfig:
    retnet = torchscale(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        n_layers=LAYERS.value,
        n_heads=4,
        value_dim=2 * WIDTH,
        ffn_dim=4 * WIDTH // 3,
        tie_embeddings=True,
    )
    return retnet.built_as(architecture, n_heads=WIDTH // 64)


def ours(architecture: str, precision: str, rows: int, position: int) -> Decoding:
    """One of our models at a position."""
    model = decoding_model(config_of(architecture), precision)
    return Decoding(model, rows, position + room(), TOKENS.value).start(position)


def moved_bytes(decoding: Decoding, architecture: str) -> int:
    """Bytes that a token reads, and writes of a RetNet's state."""
    times = 2 if architecture == "retnet" else 1
    return decoding.weight_bytes + times * decoding.state_bytes


def in_torch(architecture: str, dtype: str, rows: int, position: int) -> Callable[[], Any]:
    """The same of a model in PyTorch."""
    config = config_of(architecture)
    size = rows, position, room(), TOKENS.value
    if architecture == "retnet":
        decoder = torchscale_decoder(config).to(getattr(torch, dtype)).eval()
        return torchscale_decoding(decoder, config, *size)
    transformer = TorchTransformer(config).to(getattr(torch, dtype)).eval()
    return transformer_decoding(transformer, config, *size)


def room() -> int:
    """Tokens that are decoded in all calls together."""
    return TOKENS.value * (2 * ROUNDS.value + 2)


def state_gigabytes(architecture: str, rows: int, position: int) -> float:
    """Size of a float32 state."""
    of_layer = 2 * WIDTH * position if architecture != "retnet" else WIDTH * 2 * WIDTH // 4
    return 4 * rows * LAYERS.value * of_layer / 1e9


def measure(architecture: str, precision: str, rows: int, position: int) -> list[dict[str, Any]]:
    """A record of our model, and of PyTorch's if it has the precision."""
    if state_gigabytes(architecture, rows, position) > MOST.value:
        return []
    bandwidth = copy_bandwidth()
    calls: dict[str, Callable[[], Any]] = {"ours": ours(architecture, precision, rows, position)}
    if precision != "int8":
        calls["torch"] = in_torch(architecture, precision, rows, position)
    seconds = interleaved_seconds(calls, ROUNDS.value)
    found = []
    for name, call in calls.items():
        token = median_milliseconds(seconds[name]) / 1000 / TOKENS.value
        record = {
            "rows": rows,
            "position": position,
            "model": f"{name} {architecture} {precision}",
            "tokens/s": rows / token,
        }
        if isinstance(call, Decoding):
            record["of copy"] = moved_bytes(call, architecture) / token / bandwidth
            record["copy bandwidth"] = bandwidth
        found.append(record)
        print(
            f"{rows:>4}{position:>8}  {record['model']:<30}{record['tokens/s']:>10.1f} tokens/s"
            + (f"{record['of copy']:>7.2f}" if "of copy" in record else ""),
            flush=True,
        )
    return found


def main(_) -> None:
    require_cpu()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    groups = itertools.product(
        map(int, BATCHES.value),
        map(int, POSITIONS.value),
        ("retnet", "transformer"),
        PRECISIONS,
    )
    records = []
    for rows, position, architecture, precision in groups:
        records += measure(architecture, precision, rows, position)
        path = write_results(
            "decoding_against_torch", {"torch": torch.__version__, "records": records}
        )
    print(f"written to {path}")


if __name__ == "__main__":
    keep_freed_memory()
    app.run(main)
