"""Time and memory of each form of retention, and of attention, over the sequence length.

    python -m benchmarks.retention [--rounds=5] [--longest=8192]

One row, four heads of 64/128 (key/value; attention 64/64, as in a Transformer of that width),
float32 on a CPU and bfloat16 elsewhere. "forward" computes only the output, "both" the gradients of
q, k and v. The forms take turns at each length.
Prints a table and writes benchmarks/results/retention_BACKEND.json and .png.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks.measure import (
    HEADS,
    KEY_WIDTH,
    RESULTS,
    interleaved_seconds,
    lengths,
    median_milliseconds,
    retention_inputs,
    write_results,
)
from retnet_jax.ops.retention import log_decay, retention

flags.DEFINE_integer("rounds", 5, "Number of timed calls of each function")
flags.DEFINE_integer("longest", 8192, "Longest sequence; lengths are powers of two from 512")

DECAY = log_decay("log_spaced", HEADS, (1 / 32, 1 / 512))


def outputs(form: str, q, k, v):
    if form == "attention":
        return jax.nn.dot_product_attention(q, k, v[..., :KEY_WIDTH], is_causal=True)
    return retention(q, k, v, DECAY, form=form)[0]


def gradients(form: str, q, k, v):
    def loss(q, k, v):
        return jnp.square(outputs(form, q, k, v).astype(jnp.float32)).sum()

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


def inputs(length: int):
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return [jnp.asarray(x, dtype) for x in retention_inputs(length)[:3]]


def measure(length: int, rounds: int) -> list[dict]:
    """A row of results for each form at one length."""
    arrays = inputs(length)
    forms = ["chunkwise", "recurrent", "parallel", "attention"]
    compiled, rows = {}, []
    for form in forms:
        for kind, function in (("forward", outputs), ("both", gradients)):
            compiled[form, kind] = jax.jit(partial(function, form)).lower(*arrays).compile()
    calls = {key: partial(executable, *arrays) for key, executable in compiled.items()}
    seconds = interleaved_seconds(calls, rounds)
    for form in forms:
        row = {"length": length, "form": form}
        for kind in ("forward", "both"):
            row[f"{kind}_ms"] = median_milliseconds(seconds[form, kind])
            analysis = compiled[form, kind].memory_analysis()
            row[f"{kind}_temporary_bytes"] = analysis.temp_size_in_bytes
        rows.append(row)
    return rows


def exponents(rows: list[dict], form: str) -> dict[str, float]:
    """Slopes of log time and of log memory over log length, from 512 to 4096."""
    chosen = [row for row in rows if row["form"] == form and row["length"] <= 4096]
    lengths = np.log([row["length"] for row in chosen])
    names = ("forward_ms", "both_ms", "forward_temporary_bytes", "both_temporary_bytes")
    return {
        name: float(np.polyfit(lengths, np.log([max(row[name], 1) for row in chosen]), 1)[0])
        for name in names
    }


def plot(rows: list[dict], path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for form in dict.fromkeys(row["form"] for row in rows):
        chosen = [row for row in rows if row["form"] == form]
        lengths = [row["length"] for row in chosen]
        label = form if form == "attention" else f"retention, {form}"
        (line,) = axes[0].plot(lengths, [row["both_ms"] for row in chosen], "o-", label=label)
        axes[0].plot(lengths, [row["forward_ms"] for row in chosen], "o:", color=line.get_color())
        memory = [row["both_temporary_bytes"] / 2**20 for row in chosen]
        axes[1].plot(lengths, memory, "o-", color=line.get_color())
    axes[0].set(ylabel="ms (solid: forward+backward, dotted: forward)", title="time")
    axes[1].set(ylabel="MiB", title="temporary memory, forward+backward")
    for axis in axes:
        axis.set(xlabel="length", xscale="log", yscale="log", xticks=lengths)
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main(_) -> None:
    longest, rows = flags.FLAGS.longest, []
    print(f"{'length':>6}  {'form':<10}{'forward ms':>12}{'both ms':>10}{'MiB, both':>11}")
    for length in lengths(longest):
        for row in measure(length, flags.FLAGS.rounds):
            rows.append(row)
            print(
                f"{length:>6}  {row['form']:<10}{row['forward_ms']:>12.2f}{row['both_ms']:>10.2f}"
                f"{row['both_temporary_bytes'] / 2**20:>11.1f}",
                flush=True,
            )
    slopes = {form: exponents(rows, form) for form in dict.fromkeys(row["form"] for row in rows)}
    for form, slope in slopes.items():
        print(
            f"{form}: time grows as length^{slope['forward_ms']:.2f} forward, "
            f"^{slope['both_ms']:.2f} forward+backward; temporary memory of both as "
            f"^{slope['both_temporary_bytes']:.2f} (512 to 4096)"
        )
    name = f"retention_{jax.default_backend()}"
    path = write_results(name, {"rows": rows, "exponents_512_to_4096": slopes})
    plot(rows, RESULTS / f"{name}.png")
    print(f"written to {path} and .png")


if __name__ == "__main__":
    app.run(main)
