"""Shared by figures: colours of the models, panels, axes over lengths, and where files go."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.runs import WORKDIRS

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
COLOURS = {"retnet": "tab:blue", "hybrid": "tab:green", "transformer": "tab:orange"}


def new_figure(columns: int, rows: int = 1, height: float = 4.2) -> tuple[Any, Any]:
    """A figure, and its panels: a row of them, or rows if there are several."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = 5 * columns, height * rows
    return plt.subplots(rows, columns, figsize=size, layout="constrained")


def lengths_on(axis, lengths: Sequence[int], name: str = "length of a sequence, tokens") -> None:
    """Makes the x-axis a logarithmic one of lengths, and draws a grid."""
    axis.set(xlabel=name, xscale="log")
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def logarithmic(axis, room: float = 1.0) -> None:
    """Makes the y-axis a logarithmic one with several numbers, and leaves room for a legend.

    Args:
      axis: The panel, with all that it shows.
      room: Factor by which the y-axis is longer at its upper end.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * room)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def save(figure, name: str, budget: str) -> Path:
    """Writes a figure to docs/figures; that of a small budget to the runs' directory."""
    import matplotlib.pyplot as plt

    path = FIGURES / f"{name}.png"
    if budget == "small":
        path = WORKDIRS / f"{name}_small.png"
        path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white", pil_kwargs={"optimize": True})
    plt.close(figure)
    return path
