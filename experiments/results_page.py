"""Fills the tables of docs/results.md and docs/results_tables.md from the records.

    python -m experiments.results_page

A table stands between two comments, of which the first names its experiment and budget, and, for a
single one, how its title begins:

    <!-- tables prose gpu -->                           all tables
    <!-- tables prose gpu: bits per byte of prose -->   one of them
    <!-- end of tables -->

`<!-- tables of commands -->` are the commands of all experiments. The tests hold that the pages are
those of the records.
"""

import importlib
import re
from collections.abc import Iterable
from pathlib import Path

from experiments.runs import RESULTS, read_records
from retnet_jax.evaluation.tables import Table, as_markdown
from retnet_jax.files import atomic

PAGES = ("docs/results.md", "docs/results_tables.md")
ROOT = Path(__file__).parent.parent
_TIMES = ("training_seconds", "measuring_seconds", "seconds")
_TABLES = re.compile(
    r"(<!-- tables (?:of commands|(\w+) (\w+)(?:: (.+?))?) -->\n)(?:(?!<!-- tables).)*?"
    r"(<!-- end of tables -->)",
    re.S,
)


def filled(page: str) -> str:
    """The text of a page with its tables made again.

    Raises:
      ValueError: if a comment is not as above, or one without the other.
    """
    comments = {page.count(x) for x in ("<!-- tables", "<!-- end of tables -->")}
    if comments != {len(_TABLES.findall(page))}:
        raise ValueError(
            f"the page has {page.count('<!-- tables')} tables that do not begin or end"
        )
    return _TABLES.sub(lambda found: f"{found[1]}{_text(*found.groups()[1:4])}\n{found[5]}", page)


def _text(experiment: str | None, budget: str, title: str | None) -> str:
    if experiment is None:
        return as_markdown([_commands()])
    module = importlib.import_module(f"experiments.{experiment}")
    tables = module.tables(budget, read_records(experiment, budget))
    if title is None:
        return as_markdown(tables)
    return as_markdown([_titled(title, tables)])


def _commands() -> Table:
    """What makes the records of each experiment, and what they took."""
    table = Table(
        "",
        ("command", "runs", "hours"),
        note="Hours of training, and of measuring where that is recorded, added up over the runs; "
        "several ran at a time on two cores or one GPU, and some were paused for tests.",
    )
    for path in sorted(RESULTS.glob("*.json")):
        name, _, budget = path.stem.rpartition("_")
        if budget != "small":
            records = read_records(name, budget).values()
            seconds = sum(x.get(y, 0) for x in records for y in _TIMES)
            command = f"`python -m experiments.{name} --budget={budget}`"
            table.add(command, str(len(records)), f"{seconds / 3600:.1f}")
    return table


def _titled(title: str, tables: Iterable[Table]) -> Table:
    """The table whose title begins so."""
    found = [table for table in tables if table.title.startswith(title)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} tables have a title that begins with {title!r}")
    return found[0]


def main() -> None:
    """Fills the pages."""
    for name in PAGES:
        page = ROOT / name
        atomic.write_text(page, filled(page.read_text()))


if __name__ == "__main__":
    main()
