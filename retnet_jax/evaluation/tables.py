"""Results as tables, for the terminal and in Markdown."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from retnet_jax.evaluation.plan import Plan
from retnet_jax.evaluation.results import LAST_TOKENS, Differences, Results


def result_tables(
    names: Sequence[str],
    results: Sequence[Results],
    differences: Differences | None,
    plan: Plan,
    compressed: dict[str, float],
    compressed_apart: dict[str, float],
) -> list["Table"]:
    """The tables of all results.

    Args:
      names: Names of the models.
      results: Results of one model, or of two on the same texts and tasks.
      differences: Differences of two models; None for one model.
      plan: Options of the evaluation.
      compressed: Bits per byte by compressor.
      compressed_apart: The same for the documents that are reported apart.
    """
    first = results[0]
    found = []
    if first.nll:
        found.append(_perplexity(names, results, plan))
    for name, of_model in zip(names, results, strict=True):
        # One table for each model, because their tokens may differ.
        of_name = f", {name}" if len(names) > 1 else ""
        if "stateful" in of_model.nll:
            found.append(_positions(of_name, of_model))
        if of_model.contexts:
            found.append(_contexts(of_name, of_model))
    if first.nll and differences is not None:
        found.append(_differences(differences, plan))
    if compressed:
        found.append(_compressors(compressed, compressed_apart))
    if first.tasks:
        found.append(_tasks(names, results, differences, plan))
    if first.recall:
        found.append(_recall(names, results))
    return found


@dataclass
class Table:
    """A title and rows of cells; the first cell of a row is its name."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    note: str = ""  # text below the table

    def add(self, name: str, *cells: str) -> None:
        """Appends a row; missing cells are empty."""
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
        """The table in Markdown."""

        def line(cells):
            return "| " + " | ".join(cell.strip().replace("|", "\\|") for cell in cells) + " |"

        ruler = "|" + "---|" + "---:|" * (len(self.columns) - 1)
        parts = [f"**{self.title}**\n"] if self.title else []
        parts += [line(self.columns), ruler, *map(line, self.rows)]
        return "\n".join([*parts, *([f"\n{self.note}"] if self.note else [])])


def as_markdown(tables: Iterable[Table]) -> str:
    """The tables that have rows, in Markdown."""
    return "\n\n".join(table.markdown for table in tables if table.rows)


def _perplexity(names: Sequence[str], results: Sequence[Results], plan: Plan) -> Table:
    table = Table(
        "",
        [
            *("", "bits/byte", "std. error", "mean of documents", "std. error"),
            *("token ppl", "word ppl", "byte ppl", "documents", "tokens", "bytes"),
        ],
    )
    for protocol in results[0].perplexity:
        for name, found in zip(names, results, strict=True):
            label = plan.label(protocol) + (f", {name}" if len(names) > 1 else "")
            reports = {
                f"  {source}" if source else label: report
                for source, report in found.perplexity[protocol].items()
            }
            if found.apart:
                reports["  apart"] = found.apart.perplexity[protocol][""]
            for row, report in reports.items():
                table.add(
                    row,
                    f"{report.bits_per_byte:.4f}",
                    plus_minus(report.standard_error),
                    f"{report.mean_bits_per_byte:.4f}",
                    plus_minus(report.mean_standard_error),
                    f"{report.token_perplexity:,.6g}",
                    f"{report.word_perplexity:,.6g}",
                    f"{report.byte_perplexity:,.6g}",
                    f"{report.documents:,}",
                    f"{report.tokens:,}",
                    f"{report.bytes:,}",
                )
    return table


def _differences(differences: Differences, plan: Plan) -> Table:
    table = Table("the first minus the second", ("", "bits/byte", "std. error", "z"))
    for protocol, found in differences.bits_per_byte.items():
        cells = f"{found.mean:+.4f}", plus_minus(found.standard_error), in_errors(found.z)
        table.add(plan.label(protocol), *cells)
    return table


def _compressors(compressed: dict[str, float], apart: dict[str, float]) -> Table:
    table = Table("", ("", "bits/byte", *(["apart"] if apart else [])))
    for name, bits in compressed.items():
        table.add(name, f"{bits:.4f}", *([f"{apart[name]:.4f}"] if apart else []))
    return table


def _positions(of_name: str, results: Results) -> Table:
    table = Table(
        f"stateful, by position{of_name}",
        [
            *("position in the document", "nats/token", "std. error"),
            *("perplexity", "documents", "tokens"),
        ],
    )
    for bucket in results.positions:
        table.add(
            f"{bucket.first:,} to {bucket.last:,}",
            f"{bucket.nll_per_token:.4f}",
            plus_minus(bucket.standard_error),
            f"{bucket.perplexity:,.6g}",
            f"{bucket.documents:,}",
            f"{bucket.tokens:,}",
        )
    return table


def _contexts(of_name: str, results: Results) -> Table:
    table = Table(
        f"the same last {LAST_TOKENS} tokens of {results.contexts[0].documents} documents{of_name}",
        ("tokens of context", "nats/token", "std. error", "perplexity"),
    )
    for found in results.contexts:
        table.add(
            f"{found.context:,}",
            f"{found.nll_per_token:.4f}",
            plus_minus(found.standard_error),
            f"{math.exp(found.nll_per_token):,.6g}",
        )
    return table


def _tasks(
    names: Sequence[str], results: Sequence[Results], differences: Differences | None, plan: Plan
) -> Table:
    columns = ["task", "shots", "metric"]
    for name in names:
        columns += [name if len(names) > 1 else "accuracy, %", "std. error"]
    if differences is not None:
        columns += ["difference", "std. error", "z"]
    table = Table(
        f"prompts: {plan.variant}" + (f", shots: {plan.shot_mode}" if any(plan.shots) else ""),
        [*columns, "random", "majority", "rows"],
    )
    notes = []
    for name, found in zip(names, results, strict=True):
        read = found.total_read
        note = f"{read.tokens:,} tokens read, {read.without_sharing:,} without shared prefixes"
        if plan.max_length is not None:
            note += f"; {read.truncated:,} requests cut to {plan.max_length:,} tokens"
        notes.append(f"{name}: {note}" if len(names) > 1 else note)
    table.note = "\n".join(notes)
    for task, shots in results[0].tasks:
        each = [found.tasks[task, shots] for found in results]
        for metric in each[0].correct:
            cells = []
            for found in each:
                error = 100 * found.standard_error(metric)
                cells += [percent(found.accuracy(metric)), plus_minus(error, 2)]
            if differences is not None:
                difference = differences.tasks[task, shots][metric]
                cells += [f"{100 * difference.mean:+.2f}"]
                cells += [plus_minus(100 * difference.standard_error, 2)]
                cells += [in_errors(difference.z)]
            random, majority = percent(each[0].random), percent(each[0].majority)
            table.add(task, str(shots), metric, *cells, random, majority, f"{each[0].rows:,}")
    for shots in plan.shots:
        accuracies = (
            [x.accuracy() for (_, n), x in found.tasks.items() if n == shots] for found in results
        )
        means = [percent(float(np.mean(each))) for each in accuracies]
        table.add("average", str(shots), "acc", *(cell for mean in means for cell in (mean, "")))
    return table


def _recall(names: Sequence[str], results: Sequence[Results]) -> Table:
    columns = ["probe", "distance"]
    for name in names:
        columns += [name if len(names) > 1 else "accuracy, %", "std. error", "nats/token"]
    table = Table("recall", [*columns, "random", "trials"])
    for each in zip(*(found.recall for found in results), strict=True):
        cells = []
        for found in each:
            error = plus_minus(100 * found.standard_error, 2)
            cells += [percent(found.accuracy), error, f"{found.nll_per_token:.3f}"]
        one = each[0]
        random, trials = percent(one.random), f"{len(one.correct):,}"
        table.add(one.probe, f"{one.distance:,}", *cells, random, trials)
    return table


def plus_minus(error: float, digits: int = 4) -> str:
    """A standard error as text; a dash for NaN."""
    return "-" if math.isnan(error) else f"± {error:.{digits}f}"


def in_errors(z: float) -> str:
    """A difference in standard errors as text; a dash for NaN."""
    return "-" if math.isnan(z) else f"{z:.1f}"


def percent(share: float) -> str:
    """A fraction in percent, as text."""
    return f"{100 * share:.2f}"
