"""The article's figure: memory, throughput and latency of generation, measured and by bytes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.figures import (
    GREY,
    OF_MODEL,
    PURPLE,
    SMALL,
    in_thousands,
    lengths_on,
    logarithmic,
    new_figure,
    save,
)

BATCH = 16  # of memory, throughput and latency by length
OF_PAPER = 8192  # the length of the paper's ratios
LENGTHS = (512, 8192, 32_768)  # of a Transformer's latency by batch
STYLES = {"float32": "-", "bfloat16": "--", "int8": ":"}
NAMES = {"retnet": "RetNet", "hybrid": "hybrid", "transformer": "Transformer"}
# The RetNet's line is wide and pale, so that it is seen under the hybrid's.
LOOKS = {
    "retnet": {"marker": "o", "markersize": 7, "linewidth": 5, "alpha": 0.45},
    "hybrid": {"marker": "^", "markersize": 4, "linestyle": "--", "linewidth": 1.2},
    "transformer": {"marker": "s", "markersize": 4, "linewidth": 1.5},
}


def draw(
    budget: str,
    cells: Sequence[Any],
    on_h200: Sequence[dict[str, Any]],
    paper: Mapping[str, float],
) -> None:
    """Draws rows for what was measured here and for the largest size on the H200, and ratios.

    Args:
      budget: As in `figures.save`.
      cells: `inference_cost.Cell`s.
      on_h200: Records of decoding that was measured on an H200.
      paper: How many times better its RetNet is, by "memory", "throughput" and "latency".
    """
    places = [x for x in ("cores", "H200") if any(cell.place == x for cell in cells)]
    figure, axes = new_figure(3, rows=len(places) + 1, height=3.5)
    for row, place in zip(axes, places, strict=False):
        size = [cell.size for cell in cells if cell.place == place][-1]
        chosen = [cell for cell in cells if (cell.place, cell.size) == (place, size)]
        precision = next(x for x in STYLES if any(cell.precision == x for cell in chosen))
        chosen = [cell for cell in chosen if cell.precision == precision]
        batches = sorted({cell.batch for cell in chosen})
        batch = BATCH if BATCH in batches else batches[-1]
        of_batch = [cell for cell in chosen if cell.batch == batch]
        what = f"{size}, {precision}"
        what += ", two cores, measured" if place == "cores" else ", H200, by bytes"
        _memory_by_length(row[0], of_batch)
        row[0].set_title(f"memory, batch {batch}\n{what}", fontsize=SMALL)
        _throughput_by_length(row[1], [cell for cell in of_batch if cell.milliseconds])
        row[1].set_title(f"throughput, batch {batch}\n{what}", fontsize=SMALL)
        _latency_by_batch(row[2], [cell for cell in chosen if cell.milliseconds])
        row[2].set_title(f"latency\n{what}", fontsize=SMALL)
        if place == "H200":
            _add_measured(row, [x for x in on_h200 if x["size"] == size], batch)
        logarithmic(row[0])
        row[1].set_ylim(bottom=0)
        row[1].yaxis.set_major_formatter("{x:,.0f}")
        logarithmic(row[2])
        row[2].set_ylim(bottom=0.7 * row[2].get_ylim()[0])  # room for a label
    _legend_of_models(figure, axes[0][0])
    _ratios(axes[-1], cells, on_h200, paper)
    handles, labels = axes[-1][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    save(figure, "inference_cost", budget)


def _legend_of_models(figure, axis) -> None:
    """The legend of the rows above: models, and what their markers mean."""
    for architecture, name in NAMES.items():
        axis.plot([], [], color=OF_MODEL[architecture], label=name, **LOOKS[architecture])
    axis.plot(
        [], [], "o", color=GREY, ms=8, fillstyle="none", label="does not fit; two cores: not run"
    )
    crosses = "measured on an H200 (Transformer: after 8k, at batch 1 10k tokens)"
    axis.plot([], [], "kx", label=crosses)
    bars = "bars: least and most of three rounds"
    axis.plot([], [], color=GREY, marker="|", linestyle="none", ms=10, label=bars)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)


def _by_architecture(cells: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    for architecture in NAMES:
        found = [x for x in cells if x.architecture == architecture]
        if found:
            yield architecture, found


def _memory_by_length(axis, cells) -> None:
    for architecture, found in _by_architecture(cells):
        look = {"color": OF_MODEL[architecture]} | LOOKS[architecture]
        axis.plot([x.length for x in found], [x.gigabytes for x in found], **look)
        large = [x for x in found if not x.milliseconds]
        places, values = [x.length for x in large], [x.gigabytes for x in large]
        axis.plot(places, values, "o", ms=9, color=OF_MODEL[architecture], fillstyle="none")
    axis.set(ylabel="GB")
    lengths_on(axis, sorted({cell.length for cell in cells}), "tokens that a row has read")


def _throughput_by_length(axis, cells) -> None:
    for architecture, found in _by_architecture(cells):
        middle = np.array([x.throughput for x in found])
        each = [[1000 * x.batch / y for y in x.milliseconds] for x in found]
        spread = [middle - [min(x) for x in each], [max(x) for x in each] - middle]
        look = {"color": OF_MODEL[architecture], "elinewidth": 1} | LOOKS[architecture]
        axis.errorbar([x.length for x in found], middle, spread, **look)
    axis.set(ylabel="tokens/s")
    lengths_on(axis, sorted({cell.length for cell in cells}), "tokens that a row has read")


def _latency_by_batch(axis, cells) -> None:
    """Latency by batch; of a Transformer after several lengths, which stand beside its lines."""
    for architecture, of_model in _by_architecture(cells):
        lengths = sorted({x.length for x in of_model})
        chosen = [x for x in lengths if x in LENGTHS] or lengths
        if architecture != "transformer":
            chosen = lengths[-1:]
        for length in chosen:
            found = [x for x in of_model if x.length == length]
            middle = np.array([x.latency for x in found])
            spread = [
                middle - [min(x.milliseconds) for x in found],
                [max(x.milliseconds) for x in found] - middle,
            ]
            look = {"color": OF_MODEL[architecture], "elinewidth": 1} | LOOKS[architecture]
            axis.errorbar([x.batch for x in found], middle, spread, **look)
            if architecture == "transformer":
                last = found[-1].batch == max(x.batch for x in cells)
                axis.annotate(  # beside the line's end, or below it
                    f"after {in_thousands(length)}",
                    (found[-1].batch, middle[-1]),
                    xytext=(0, -54) if last else (5, 0),
                    textcoords="offset points",
                    ha="right" if last else "left",
                    color=OF_MODEL[architecture],
                    fontsize=SMALL,
                )
    batches = sorted({x.batch for x in cells})
    axis.set(xlabel="batch", ylabel="ms for a token of all rows", xscale="log")
    axis.set_xticks(batches, [str(x) for x in batches])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _add_measured(row, measured, batch: int) -> None:
    """Crosses for what was measured on an H200, of a RetNet after its shortest length."""
    for architecture in ("retnet", "transformer"):
        found = [x for x in measured if x["architecture"] == architecture and x["batch"] <= 64]
        if architecture == "transformer":
            found = [x for x in found if x["position"] >= OF_PAPER]
        firsts = {x["batch"]: x for x in reversed(found)}.values()
        style = {"color": OF_MODEL[architecture], "marker": "x", "linestyle": "none", "mew": 2}
        same = [x for x in firsts if x["batch"] == batch]
        places = [max(128, x["position"]) for x in same]
        row[0].plot(places, [x["peak_bytes"] / 1e9 for x in same], **style)
        row[1].plot(places, [x["tokens_per_second"] for x in same], **style)
        row[2].plot([x["batch"] for x in firsts], [x["ms"] for x in firsts], **style)


def _ratios(row, cells, on_h200, paper: Mapping[str, float]) -> None:
    """How many times better the RetNet is than the Transformer, by length."""
    of_size = dict.fromkeys((x.place, x.size, x.precision) for x in cells)
    for place, size, precision in of_size:
        chosen = [x for x in cells if (x.place, x.size, x.precision) == (place, size, precision)]
        lengths = sorted({x.length for x in chosen})
        where = "two cores, measured" if place == "cores" else "H200, by bytes"
        look = {
            "color": GREY if place == "cores" else PURPLE,
            "linestyle": STYLES[precision] if place == "cores" else ":" if size == "1.3B" else "-",
            "marker": "." if place == "cores" else "^",
            "label": f"{size}, {precision}, {where}",
        }
        for axis, name in zip(row, ("memory", "throughput", "latency"), strict=True):
            found = {x: ratio([y for y in chosen if y.length == x], name) for x in lengths}
            found = {length: x for length, x in found.items() if x is not None}
            axis.plot(list(found), list(found.values()), **look)
    for axis, (name, value) in zip(row, _measured_ratios(on_h200).items(), strict=True):
        label = "6.7B, bfloat16, H200, measured (throughput: up to 512 rows)"
        axis.plot([OF_PAPER], [value], "x", color=PURPLE, ms=8, mew=2, label=label)
        label = "the paper's 6.7B, A100 (batches not stated)"
        axis.plot([OF_PAPER], [paper[name]], "kD", ms=6, label=label)
    titles = ("less memory", "more throughput", "lower latency")
    hows = (f"batch {BATCH}", "the best batch of each", f"batch {BATCH}")
    for axis, title, how in zip(row, titles, hows, strict=True):
        axis.axhline(1, color="black", linewidth=1)
        lengths_on(axis, sorted({x.length for x in cells}), "tokens that a row has read")
        axis.set_title(f"how many times {title}\nthe RetNet has, {how}", fontsize=SMALL)
        logarithmic(axis)
    row[0].set_ylabel("times (above 1: RetNet is better)")


def ratio(cells: Sequence[Any], name: str) -> float | None:
    """How many times better the RetNet is at one length; None: one of the models does not fit.

    Args:
      cells: `inference_cost.Cell`s of one place, size, precision and length.
      name: "memory" or "latency", with BATCH rows, or "throughput", the best batch of each model.
    """
    one, other = (
        [x for x in cells if x.architecture == model] for model in ("transformer", "retnet")
    )
    if name == "throughput":
        best = [
            max((x.throughput for x in y if x.milliseconds), default=None) for y in (one, other)
        ]
        return None if None in best else best[1] / best[0]
    same = [next((x for x in y if x.batch == BATCH), None) for y in (one, other)]
    if None in same:
        return None
    if name == "memory":
        return same[0].gigabytes / same[1].gigabytes
    return same[0].latency / same[1].latency if all(x.milliseconds for x in same) else None


def _measured_ratios(on_h200: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The ratios of what was measured on an H200, whose RetNet does not depend on the length."""
    one = [x for x in on_h200 if x["architecture"] == "transformer" and x["position"] == OF_PAPER]
    other = [x for x in on_h200 if x["architecture"] == "retnet"]
    same = [next(x for x in y if x["batch"] == BATCH) for y in (one, other)]
    best = [max(x["tokens_per_second"] for x in y) for y in (one, other)]
    return {
        "memory": same[0]["peak_bytes"] / same[1]["peak_bytes"],
        "throughput": best[1] / best[0],
        "latency": same[0]["ms"] / same[1]["ms"],
    }
