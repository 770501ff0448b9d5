"""Where the figures of experiments are saved, and how their lines and markers look."""

from pathlib import Path
from typing import Any

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
OF_SMALL_RUNS = Path("runs/experiments/figures")
COLOURS = ("#1f5fa8", "#d9730d", "#3a8f4d", "#8a4fa3", "#b3243a", "#6b6b6b")
MARKERS = ("o", "s", "^", "v", "D", "P")


def start() -> Any:
    """Matplotlib's pyplot, which draws without a display; imported where it is used."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot


def save(figure: Any, name: str, budget: str) -> Path:
    """Saves a figure in docs/figures; those of small runs, which say nothing, elsewhere."""
    directory = OF_SMALL_RUNS if budget == "small" else FIGURES
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.png"
    figure.savefig(path, dpi=150, facecolor="white", pil_kwargs={"optimize": True})
    figure.clear()
    return path
