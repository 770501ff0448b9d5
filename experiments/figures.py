"""What the figures of experiments share: colours, panels, axes, and where they are saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
OF_SMALL_RUNS = Path("runs/experiments/figures")
WIDTH = 10  # inches; pages show figures at about 8.6, so that a font of 9.5 points is one of 8
SMALL = 9.5  # the smallest font, in points

# The colours of Okabe and Ito, which readers with any colour vision can tell apart.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, ORANGE, GREY = "#56B4E9", "#E69F00", "#7A7A7A"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE)
# One colour for one model in all figures. SKY and ORANGE: the RetNet and the Transformer without
# short convolutions. Black is the paper's.
OF_MODEL = {"retnet": BLUE, "hybrid": GREEN, "transformer": VERMILLION}


def start() -> Any:
    """Matplotlib's pyplot, which draws without a display; imported where it is used."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    names = ("legend.fontsize", "xtick.labelsize", "ytick.labelsize")
    pyplot.rcParams.update(dict.fromkeys(names, SMALL) | {"axes.titlesize": 10.5})
    return pyplot


def new_figure(columns: int, rows: int = 1, height: float = 4.2) -> tuple[Any, Any]:
    """A figure, and its panels: a row of them, or rows if there are several."""
    size = WIDTH, height * rows
    return start().subplots(rows, columns, figsize=size, layout="constrained")


def lengths_on(axis: Any, lengths: Sequence[int], name: str = "length, tokens") -> None:
    """Makes the x-axis a logarithmic one of lengths, and draws a grid."""
    axis.set(xlabel=name, xscale="log")
    axis.set_xticks(lengths, [in_thousands(length) for length in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def in_thousands(tokens: int) -> str:
    """A number of tokens as short as axes need it: 512, 2k for 2,048."""
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)


def logarithmic(axis: Any, room: float = 1.0) -> None:
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


def save(figure: Any, name: str, budget: str) -> Path:
    """Saves a figure in docs/figures; those of small runs, which say nothing, elsewhere."""
    directory = OF_SMALL_RUNS if budget == "small" else FIGURES
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.png"
    figure.savefig(path, dpi=150, facecolor="white", pil_kwargs={"optimize": True})
    figure.clear()
    return path
