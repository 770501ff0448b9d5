"""The figure of the cost of training: memory by size, tokens/s and memory by length."""

import statistics
from collections.abc import Sequence
from typing import Any

from experiments.figures import OF_MODEL, WIDTH, lengths_on, save, start

REMAT = "products"  # whose memory is drawn
MODELS = ("retnet", "transformer")
MARKERS = {"retnet": "o", "transformer": "s"}
SLOT = 0.13  # width of a bar; sizes are 1 apart
GIB = 2**30


def draw(
    budget: str,
    compiled: Sequence[dict[str, Any]],
    measured: Sequence[dict[str, Any]],
    paper: dict[str, tuple[Sequence[float], Sequence[float]]],
) -> None:
    """Draws the figure from the records of the runs, and the paper's numbers beside them."""
    figure, axes = start().subplot_mosaic(
        "mm;tl", figsize=(WIDTH, 8.6), height_ratios=(1.15, 1), layout="constrained"
    )
    _memory_by_size(axes["m"], compiled, paper)
    _tokens_per_second(axes["t"], measured)
    _memory_by_length(axes["l"], measured)
    save(figure, "training_cost", budget)


def _memory_by_size(axis, compiled, paper) -> None:
    """Bars for each size: H200 and TPU v5p; beside them the paper's as black markers."""
    sizes = [x for x in paper if any(record["size"] == x for record in compiled)]
    series = [
        ("RetNet, H200", "retnet", "H200", None, ""),
        ("Transformer, H200, no flash attention", "transformer", "H200", None, ""),
        ("RetNet, TPU v5p", "retnet", "TPU v5p", True, "//"),
        ("Transformer, TPU v5p, splash attention", "transformer", "TPU v5p", True, "//"),
        ("Transformer, TPU v5p, no flash attention", "transformer", "TPU v5p", False, "xx"),
    ]
    for number, (label, architecture, device, flash, hatch) in enumerate(series):
        look = {"color": OF_MODEL[architecture], "hatch": hatch, "edgecolor": "white"}
        axis.bar(0, 0, SLOT, label=label, **look)
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
            height = record["peak_bytes"] / GIB
            alpha = 1.0 if record["fits"] else 0.4
            axis.bar(place + (number - 3) * SLOT, height, SLOT, alpha=alpha, **look)
    axis.bar(0, 0, SLOT, color="0.75", label="paler: more than the device has")
    marks = (("Transformer", "s"), ("Transformer, FlashAttention", "D"), ("RetNet", "o"))
    for column, (label, marker) in enumerate(marks):
        axis.plot(
            [place + (2.1 + 0.55 * column) * SLOT for place in range(len(sizes))],
            [paper[size][0][column] for size in sizes],
            marker,
            color="black",
            markersize=5,
            fillstyle="none",
            label=f"paper, 8 A100: {label}",
        )
    axis.set_xticks(range(len(sizes)), [f"{x}, {_devices(x)}" for x in sizes])
    axis.set(ylabel="GiB of each device (the paper's: its GB)")
    axis.set_title("memory of a step of 8,192 tokens a device, by the compilers")
    axis.set_ylim(0, axis.get_ylim()[1] * 1.35)  # room for the legend
    axis.legend(loc="upper left", ncols=2)
    axis.grid(alpha=0.3, axis="y")
    axis.set_axisbelow(True)


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
        lengths, look = [x["length"] for x in found], {"color": OF_MODEL[name]}
        axis.fill_between(lengths, low, high, alpha=0.25, linewidth=0, **look)
        axis.plot(lengths, middle, "-", marker=MARKERS[name], label=_label(name, found[0]), **look)
    axis.set(ylabel="tokens/s (shaded: slowest to fastest step)", yscale="log")
    ticks = (2500, 5000, 10_000)
    axis.set_yticks(ticks, [f"{x:,}" for x in ticks])
    axis.minorticks_off()
    axis.set_title(f"speed on {_cores(measured)} cores, steps of 16,384 tokens")
    lengths_on(axis, [x["length"] for x in measured], "length of a row, tokens")
    axis.legend(loc="lower left")


def _memory_by_length(axis, measured) -> None:
    for name in MODELS:
        for key, style, what in (
            ("peak_bytes", "-", "measured"),
            ("program_bytes", ":", "by the compiler"),
        ):
            found = [x for x in measured if key in x[name]]
            if found:
                axis.plot(
                    [x["length"] for x in found],
                    [x[name][key] / GIB for x in found],
                    style,
                    marker=MARKERS[name],
                    fillstyle="full" if style == "-" else "none",
                    color=OF_MODEL[name],
                    markersize=5,
                    label=f"{_name(name)}, {what}",
                )
    axis.set(ylabel="GiB", title="memory of the same steps")
    axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
    lengths_on(axis, [x["length"] for x in measured], "length of a row, tokens")
    axis.legend(loc="lower left")


def _label(name: str, record: dict[str, Any]) -> str:
    return f"{_name(name)}, {record[name]['parameters'] / 1e6:.2f}M parameters"


def _name(architecture: str) -> str:
    return {"retnet": "RetNet", "transformer": "Transformer"}[architecture]


def _cores(measured) -> int | str:
    return measured[0]["machine"]["cores"] if measured else "?"
