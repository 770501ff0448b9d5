"""The figure of the cost of training: memory by size, tokens/s and memory by length."""

import statistics
from collections.abc import Sequence
from typing import Any

from experiments.figures import OF_MODEL, lengths_on, logarithmic, new_figure, save

REMAT = "products"  # whose memory is drawn
MODELS = ("retnet", "transformer")


def draw(
    budget: str,
    compiled: Sequence[dict[str, Any]],
    measured: Sequence[dict[str, Any]],
    paper: dict[str, tuple[Sequence[float], Sequence[float]]],
) -> None:
    """Draws the figure from the records of the runs, and the paper's numbers beside them."""
    figure, axes = new_figure(3, height=4.6)
    _memory_by_size(axes[0], compiled, paper)
    _tokens_per_second(axes[1], measured)
    _memory_by_length(axes[2], measured)
    save(figure, "training_cost", budget)


def _memory_by_size(axis, compiled, paper) -> None:
    """Bars for each size: H200, TPU v5p, and the paper's as black lines across."""
    sizes = [x for x in paper if any(record["size"] == x for record in compiled)]
    series = [
        ("RetNet, H200", "retnet", "H200", None, ""),
        ("Transformer, H200, no flash attention", "transformer", "H200", None, ""),
        ("RetNet, TPU v5p", "retnet", "TPU v5p", True, "//"),
        ("Transformer, TPU v5p, splash attention", "transformer", "TPU v5p", True, "//"),
        ("Transformer, TPU v5p, no flash attention", "transformer", "TPU v5p", False, "xx"),
    ]
    width = 0.8 / len(series)
    for number, (label, architecture, device, flash, hatch) in enumerate(series):
        for place, size in enumerate(sizes):
            record = next(
                (
                    x
                    for x in compiled
                    if (x["size"], x["architecture"], x["device"], x["remat"])
                    == (size, architecture, device, REMAT)
                    and flash in (None, x["flash"])
                ),
                None,
            )
            if record is None or record["peak_bytes"] is None:
                continue
            at, height = place + (number - 2) * width, record["peak_bytes"] / 1e9
            axis.bar(
                at,
                height,
                width,
                color=OF_MODEL[architecture],
                hatch=hatch,
                edgecolor="white",
                alpha=1.0 if record["fits"] else 0.45,
                label=label if place == 0 else None,
            )
            if not record["fits"]:
                axis.text(at, height, "does not fit", rotation=90, fontsize=7, ha="center")
    marks = (("Transformer", "^"), ("Transformer, FlashAttention", "v"), ("RetNet", "o"))
    for column, (label, marker) in enumerate(marks):
        axis.plot(
            range(len(sizes)),
            [paper[size][0][column] for size in sizes],
            marker,
            color="black",
            markersize=5,
            fillstyle="none",
            label=f"paper, A100: {label}",
        )
    axis.set_xticks(range(len(sizes)), [f"{x}\n{_devices(x)}" for x in sizes])
    axis.set(ylabel="GB of each device", title="memory of a step, 8,192 tokens a device")
    axis.set_ylim(0, axis.get_ylim()[1] * 1.9)  # room for the legend
    axis.legend(fontsize=7, loc="upper left")
    axis.grid(alpha=0.3, axis="y")


def _devices(size: str) -> str:
    return "8 devices" if size == "13B" else "1 device"


def _tokens_per_second(axis, measured) -> None:
    for name in MODELS:
        found = [x for x in measured if "seconds" in x[name]]
        if not found:
            continue
        tokens = [x["rows"] * x["length"] for x in found]
        middle, low, high = (
            [t / pick(x[name]["seconds"]) for t, x in zip(tokens, found, strict=True)]
            for pick in (statistics.median, max, min)
        )
        lengths = [x["length"] for x in found]
        axis.fill_between(lengths, low, high, color=OF_MODEL[name], alpha=0.25, linewidth=0)
        axis.plot(lengths, middle, "o-", color=OF_MODEL[name], label=_label(name, found[0]))
    axis.set(ylabel="tokens/s (median; shaded: least to most)")
    logarithmic(axis)
    axis.set_title(f"training on {_cores(measured)} cores")
    lengths_on(axis, [x["length"] for x in measured])
    axis.legend(fontsize=8)


def _memory_by_length(axis, measured) -> None:
    for name in MODELS:
        for key, style, what in (
            ("peak_bytes", "o-", "measured"),
            ("program_bytes", "s:", "by the compiler"),
        ):
            found = [x for x in measured if key in x[name]]
            if found:
                axis.plot(
                    [x["length"] for x in found],
                    [x[name][key] / 1e9 for x in found],
                    style,
                    color=OF_MODEL[name],
                    markersize=4,
                    label=f"{_name(name)}, {what}",
                )
    axis.set(ylabel="GB", title="memory of the same steps, 16,384 tokens")
    logarithmic(axis)
    lengths_on(axis, [x["length"] for x in measured])
    axis.legend(fontsize=8)


def _label(name: str, record: dict[str, Any]) -> str:
    return f"{_name(name)}, {record[name]['parameters'] / 1e6:.2f}M parameters"


def _name(architecture: str) -> str:
    return {"retnet": "RetNet", "transformer": "Transformer"}[architecture]


def _cores(measured) -> int | str:
    return measured[0]["machine"]["cores"] if measured else "?"
