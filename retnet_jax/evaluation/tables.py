"""Results as tables: for the terminal, and in Markdown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Table:
    """A heading, and rows of cells; the first cell of a row is its name."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    note: str = ""  # below

    def add(self, name: str, *cells: str) -> None:
        """Appends a row; cells that are not given are empty."""
        self.rows.append((name, *cells, *[""] * (len(self.columns) - 1 - len(cells))))

    def __str__(self) -> str:
        rows = [self.columns, *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [self.title] if self.title else []
        for name, *cells in rows:
            padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
        return "\n".join([*lines, *([self.note] if self.note else [])])

    @property
    def markdown(self) -> str:
        """The same for a Markdown file."""

        def line(cells):
            return "| " + " | ".join(cell.strip().replace("|", "\\|") for cell in cells) + " |"

        ruler = "|" + "---|" + "---:|" * (len(self.columns) - 1)
        parts = [f"**{self.title}**\n"] if self.title else []
        parts += [line(self.columns), ruler, *map(line, self.rows)]
        return "\n".join([*parts, *([f"\n{self.note}"] if self.note else [])])


def plus_minus(error: float, digits: int = 4) -> str:
    """A standard error; a dash where there is none."""
    return "-" if math.isnan(error) else f"± {error:.{digits}f}"


def in_errors(z: float) -> str:
    """A difference in standard errors; a dash where there is no error."""
    return "-" if math.isnan(z) else f"{z:.1f}"


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.2f}"
