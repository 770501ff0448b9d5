"""The article's figure: memory, throughput and latency of generation, measured and by bytes."""

from collections.abc import Sequence
from typing import Any

from experiments.figures import OF_MODEL, lengths_on, logarithmic, new_figure, save

BATCH = 16  # of memory and throughput by length
LENGTHS = (512, 8192, 32_768)  # of a Transformer's latency by batch
STYLES = {"float32": "-", "bfloat16": "--", "int8": ":"}
NAMES = {"retnet": "RetNet", "hybrid": "hybrid", "transformer": "Transformer"}


def draw(budget: str, cells: Sequence[Any], on_h200: Sequence[dict[str, Any]]) -> None:
    """Draws a row of panels for what was measured here, and one for the largest size on the H200.

    Args:
      budget: As in `figures.save`.
      cells: `inference_cost.Cell`s.
      on_h200: Records of decoding that was measured on an H200.
    """
    places = [x for x in ("cores", "H200") if any(cell.place == x for cell in cells)]
    figure, axes = new_figure(3, rows=len(places), height=4.4)
    for row, place in zip(axes if len(places) > 1 else [axes], places, strict=True):
        size = [cell.size for cell in cells if cell.place == place][-1]
        chosen = [cell for cell in cells if (cell.place, cell.size) == (place, size)]
        batches = sorted({cell.batch for cell in chosen})
        batch = BATCH if BATCH in batches else batches[-1]
        of_batch = [cell for cell in chosen if cell.batch == batch]
        where = "on two cores, measured" if place == "cores" else "on one H200, by bytes"
        _by_length(row[0], of_batch, lambda cell: cell.gigabytes, "GB")
        row[0].set_title(f"memory, {size}, batch {batch}\n{where}")
        fits = [cell for cell in of_batch if cell.milliseconds]
        _by_length(row[1], fits, lambda cell: cell.throughput, "tokens/s")
        row[1].set_title(f"throughput, {size}, batch {batch}\n{where}")
        _by_batch(row[2], [cell for cell in chosen if cell.milliseconds])
        row[2].set_title(f"latency, {size}\n{where}")
        if place == "H200":
            measured = [x for x in on_h200 if x["size"] == size]
            _add_measured(row, measured, batch)
        for axis, room in zip(row, (8, 1, 8), strict=True):
            logarithmic(axis, room)
        row[0].legend(
            handlelength=4.5, fontsize=7, loc="upper left", ncols=2, title="hollow: does not fit"
        )
        row[2].legend(handlelength=4.5, fontsize=7, loc="upper left")
    save(figure, "inference_cost", budget)


def _by_length(axis, cells, value, unit: str) -> None:
    for architecture, precision in dict.fromkeys((x.architecture, x.precision) for x in cells):
        found = [x for x in cells if (x.architecture, x.precision) == (architecture, precision)]
        axis.plot(
            [x.length for x in found],
            [value(x) for x in found],
            STYLES[precision],
            marker="o",
            markersize=3.5,
            color=OF_MODEL[architecture],
            label=f"{NAMES[architecture]}, {precision}",
        )
        too_large = [x for x in found if not x.milliseconds]
        places, values = [x.length for x in too_large], [value(x) for x in too_large]
        axis.plot(places, values, "o", markersize=7, color=OF_MODEL[architecture], fillstyle="none")
    axis.set(ylabel=unit)
    lengths_on(axis, sorted({cell.length for cell in cells}), "tokens that a row has read")


def _by_batch(axis, cells) -> None:
    """Latency in the first precision; of a Transformer at several lengths."""
    precision = next((x.precision for x in cells), "")
    cells = [x for x in cells if x.precision == precision]
    batches = sorted({x.batch for x in cells})
    longest = max((x.length for x in cells if x.architecture != "transformer"), default=0)
    for architecture in NAMES:
        lengths = sorted({x.length for x in cells if x.architecture == architecture})
        if architecture == "transformer":
            chosen = [x for x in lengths if x in LENGTHS] or lengths
        else:
            chosen = [longest]
        for number, length in enumerate(chosen):
            found = [x for x in cells if (x.architecture, x.length) == (architecture, length)]
            axis.plot(
                [x.batch for x in found],
                [x.latency for x in found],
                "-o",
                markersize=3.5,
                color=OF_MODEL[architecture],
                alpha=1 - 0.25 * (len(chosen) - 1 - number),
                linewidth=1 + 0.6 * number,
                label=f"{NAMES[architecture]}, {length:,} tokens, {precision}",
            )
    axis.set(xlabel="batch", ylabel="ms for a token of all rows", xscale="log")
    axis.set_xticks(batches, [str(x) for x in batches])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _add_measured(row, measured, batch: int) -> None:
    """Crosses for what was measured on an H200."""
    for architecture in ("retnet", "transformer"):
        found = [x for x in measured if x["architecture"] == architecture]
        style = {"color": OF_MODEL[architecture], "marker": "x", "linestyle": "none"}
        label = f"{NAMES[architecture]}, measured on an H200"
        same = [x for x in found if x["batch"] == batch and x["position"] <= 40_000]
        places = [x["position"] for x in same]
        row[0].plot(places, [x["peak_bytes"] / 1e9 for x in same], **style)
        row[1].plot(places, [x["tokens_per_second"] for x in same], **style)
        few = [x for x in found if x["batch"] <= 64 and x["position"] <= 40_000]
        row[2].plot([x["batch"] for x in few], [x["ms"] for x in few], **style, label=label)
