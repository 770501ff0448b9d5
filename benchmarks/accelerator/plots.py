"""A figure of kernels, training, decoding by position, and decoding by batch size."""

from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.accelerator.report import NOT_MEASURED, Report, written_out


def plot(report: Report, path: Path) -> None:
    """Plots the measurements of a report to `path`; panels without any say so."""
    figure, axes = plt.subplots(2, 2, figsize=(13, 9), layout="constrained")
    _kernels(report, axes[0, 0])
    _training(report, axes[0, 1])
    _over_position(report, axes[1, 0])
    _over_batch(report, axes[1, 1])
    figure.suptitle(f"{report.title}, {report.data.get('date', '')}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _kernels(report: Report, axis) -> None:
    """Time per token of forward+backward by length, for the widest heads and for attention."""
    records = report.measured("kernels", kind="both")
    widest = max((x["key_width"] for x in records), default=0)
    lines = defaultdict(list)
    for x in records:
        if x["key_width"] == widest or "attention" in x["implementation"]:
            name = f"{x['implementation']} {x['key_width']}/{x['value_width']}"
            lines[name].append((x["length"], 1e6 * x["ms"] / x["tokens"]))
    _draw(axis, lines, "length", "ns per token, forward+backward", "kernels")


def _training(report: Report, axis) -> None:
    lines = defaultdict(list)
    for x in report.measured("training"):
        if written_out(x):
            continue  # one length only
        lines[f"{x['size']} {x['architecture']}"].append((x["length"], x["tokens_per_second"]))
    _draw(axis, lines, "length", "tokens/s", "training")


def _over_position(report: Report, axis) -> None:
    """Time per token by position, with one row of each model."""
    lines = defaultdict(list)
    for x in report.measured("decoding", batch=1):
        if "position" in x and "tried" not in x:
            lines[f"{x['size']} {x['architecture']}"].append((x["position"], x["ms"]))
    _draw(axis, lines, "position", "ms per token", "decoding, batch 1")


def _over_batch(report: Report, axis) -> None:
    """Tokens/s of the largest model by batch size, with all sizes tried for the best one."""
    records = [x for x in report.measured("decoding") if "position" in x]
    size = records[0]["size"] if records else ""
    lines = defaultdict(list)
    for x in records:
        if x["size"] != size:
            continue
        points = lines[f"{x['architecture']} at {x['position']:,}"]
        speeds = x.get("tried", {str(x["batch"]): x["tokens_per_second"]})
        points += [(int(b), speed) for b, speed in speeds.items() if not isinstance(speed, str)]
    # Positions with a single batch size are in the other panel.
    lines = {name: points for name, points in lines.items() if len({b for b, _ in points}) > 1}
    _draw(axis, lines, "batch", "tokens/s", f"decoding, {size}", y_scale="log")


def _draw(axis, lines: dict[str, list], x_label, y_label, title, y_scale="linear") -> None:
    axis.set(title=title, xlabel=x_label, ylabel=y_label)
    if not lines:
        axis.text(0.5, 0.5, NOT_MEASURED, ha="center", transform=axis.transAxes)
        return
    for name, points in lines.items():
        style = "o--" if "transformer" in name or "attention" in name else "o-"
        axis.plot(*zip(*sorted(points), strict=True), style, label=name)
    axis.set(xscale="log", yscale=y_scale)
    if y_scale == "linear":
        axis.set_ylim(bottom=0)
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axis.set_xticks(ticks, [f"{x:,}" for x in ticks])
    axis.xaxis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
