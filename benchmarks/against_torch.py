"""Chunkwise retention on a CPU, compared with torchscale's forms and PyTorch's attention.

    pip install torch torchscale        # only for this benchmark, best in a separate environment
    python -m benchmarks.against_torch [--rounds=9] [--longest=8192]

One row, four heads of 64/128 (key/value; attention 64/64, as in a Transformer of that width),
float32, outputs and the gradients of q, k and v. Timed is the operation between the rotated q and k
and the head norm, with arrays in the axis order of each library. torchscale's forms are the code of
its package, with precomputed decays. PyTorch and XLA both use all cores. All calls of a length take
turns. Prints a table and writes benchmarks/results/against_torch_cpu.json.
"""

import os
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.measure import (
    HEADS,
    KEY_WIDTH,
    VALUE_WIDTH,
    interleaved_seconds,
    lengths,
    median_milliseconds,
    require_cpu,
    retention_inputs,
    write_results,
)
from retnet_jax.ops.retention import log_decay, retention

try:
    import torch
    from torchscale.architecture.retnet import RetNetRelPos
    from torchscale.component.multiscale_retention import MultiScaleRetention
except ImportError as error:
    raise SystemExit(f"{error}: this benchmark needs `pip install torch torchscale`") from error

ROUNDS = flags.DEFINE_integer("rounds", 9, "Number of timed calls of each function")
LONGEST = flags.DEFINE_integer(
    "longest", 8192, "Longest sequence; lengths are powers of two from 512"
)

DECAY = log_decay("powers_of_two", HEADS, (0.5, 0.5))  # torchscale's
CHUNKS = (64, 128, 256, 512)  # of torchscale's chunkwise form; the fastest counts
LONGEST_PARALLEL = 4096


def ours(length: int):
    @jax.jit
    def outputs_and_gradients(q, k, v, d_y):
        y, pull_back = jax.vjp(lambda q, k, v: retention(q, k, v, DECAY)[0], q, k, v)
        return y, pull_back(d_y)

    arrays = [jnp.asarray(x) for x in retention_inputs(length)]
    return partial(outputs_and_gradients.lower(*arrays).compile(), *arrays)


def differentiated(function, q, k, v, d_y):
    """A function that calls `function` and its gradient in PyTorch."""
    for x in (q, k, v):
        x.requires_grad_()

    def call():
        y = function(q, k, v)
        return y, torch.autograd.grad(y, (q, k, v), d_y.view(y.shape))

    return call


def torchscale(length: int, chunk: int | None):
    """The chunkwise form of torchscale, or its parallel form if `chunk` is None."""
    options = SimpleNamespace(
        decoder_embed_dim=HEADS * KEY_WIDTH,
        decoder_retention_heads=HEADS,
        recurrent_chunk_size=chunk,
    )
    _, decays = RetNetRelPos(options)(length, chunkwise_recurrent=chunk is not None)
    layer = SimpleNamespace(num_heads=HEADS, head_dim=VALUE_WIDTH, key_dim=KEY_WIDTH)
    parallel, chunkwise = (
        MultiScaleRetention.parallel_forward,
        MultiScaleRetention.chunk_recurrent_forward,
    )
    form = parallel if chunk is None else chunkwise
    q, k, v, d_y = map(torch.from_numpy, retention_inputs(length))
    q, k = (x.transpose(1, 2).contiguous() for x in (q, k))
    v = v.reshape(1, length, HEADS * VALUE_WIDTH)
    return differentiated(lambda q, k, v: form(layer, q, k, v, decays), q, k, v, d_y)


def attention(length: int):
    q, k, v, d_y = map(torch.from_numpy, retention_inputs(length))
    narrow = (q, k, v[..., :KEY_WIDTH], d_y[..., :KEY_WIDTH])
    arrays = [x.transpose(1, 2).contiguous() for x in narrow]
    attend = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    return differentiated(attend, *arrays)


def check(ours, theirs) -> None:
    """Exits unless both compute the same outputs, up to torchscale's factor at each position."""

    def directions(y):
        y = np.asarray(y, np.float64).reshape(-1, VALUE_WIDTH)
        return y / np.linalg.norm(y, axis=1, keepdims=True)

    difference = np.abs(directions(ours()[0]) - directions(theirs()[0].detach())).max()
    if difference > 1e-3:
        raise SystemExit(f"outputs differ by {difference:.1e}: not the same function")


def measure(length: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each function at one length."""
    calls = {"retnet-jax": ours(length)}
    calls |= {f"torchscale, chunk {c}": torchscale(length, c) for c in CHUNKS if c <= length}
    if length <= LONGEST_PARALLEL:
        calls["torchscale, parallel"] = torchscale(length, None)
    for name, call in calls.items():
        if name != "retnet-jax":
            check(calls["retnet-jax"], call)
    calls["torch attention"] = attention(length)
    seconds = interleaved_seconds(calls, rounds)
    return {name: median_milliseconds(kept) for name, kept in seconds.items()}


def row_of(length: int, milliseconds: dict[str, float]) -> dict:
    """The times at a length, and their ratios to that of retnet-jax."""
    own = milliseconds["retnet-jax"]
    chunkwise = [ms for name, ms in milliseconds.items() if ", chunk " in name]
    ratios = {
        "torchscale chunkwise, its best chunk": min(chunkwise) / own,
        "torch attention": milliseconds["torch attention"] / own,
    }
    if "torchscale, parallel" in milliseconds:
        ratios["torchscale parallel"] = milliseconds["torchscale, parallel"] / own
    return {"length": length, "milliseconds": milliseconds, "times_as_long": ratios}


def main(_) -> None:
    require_cpu()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = []
    for length in lengths(LONGEST.value):
        row = row_of(length, measure(length, ROUNDS.value))
        rows.append(row)
        own = row["milliseconds"]["retnet-jax"]
        for name, ms in row["milliseconds"].items():
            print(f"{length:>6}  {name:<22}{ms:>10.2f} ms{ms / own:>8.2f}", flush=True)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(f"written to {write_results('against_torch_cpu', versions | {'rows': rows})}")


if __name__ == "__main__":
    app.run(main)
