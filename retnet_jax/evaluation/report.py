"""The results of one model, or of two beside each other, as tables and for JSON."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from retnet_jax.evaluation.statistics import (
    PerplexityReport,
    paired_difference,
    perplexity_report,
    position_buckets,
    ratio_standard_error,
    standard_error,
    sums,
)
from retnet_jax.evaluation.suite import Plan, Results
from retnet_jax.evaluation.tables import Table, percent, plus_minus
from retnet_jax.evaluation.texts import Text

_LAST_TOKENS = 128


def tables(
    names: Sequence[str],
    results: Sequence[Results],
    text: Text | None,
    plan: Plan,
    compressed: dict[str, float],
) -> list[Table]:
    """All tables that the results fill.

    Args:
      names: of the models.
      results: of each model: of one, or of two on the same texts and tasks.
      text: what perplexity was computed on.
      plan: how.
      compressed: bits per byte by compressor.
    """
    first = results[0]
    found = []
    if first.nll:
        found.append(_perplexity(names, results, text, plan, compressed))
    if "stateful" in first.nll:
        found.append(_positions(names, results))
    if first.last_nll:
        found.append(_contexts(names, results))
    if first.tasks:
        found.append(_tasks(names, results, plan))
    if first.recall:
        found.append(_recall(names, results))
    return found


def _perplexity(names, results, text, plan, compressed) -> Table:
    table = Table(
        "",
        [
            *("", "bits/byte", "std. error", "mean of documents", "std. error"),
            *("token ppl", "word ppl", "byte ppl", "documents", "tokens", "bytes"),
        ],
    )
    for protocol in results[0].nll:
        for name, found in zip(names, results, strict=True):
            label = plan.label(protocol) + (f", {name}" if len(names) > 1 else "")
            for source, report in reports(found.nll[protocol], text).items():
                table.add(
                    f"  {source}" if source else label,
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
        if len(results) == 2:
            mean, error = bits_difference(*(found.nll[protocol] for found in results), text)
            table.add("  difference", f"{mean:+.4f}", plus_minus(error), _z(mean, error))
    for name, bits in compressed.items():
        table.add(name, f"{bits:.4f}")
    return table


def _positions(names, results) -> Table:
    columns = ["position in the document"]
    for name in names:
        columns += [name, "std. error"] if len(names) > 1 else ["nats/token", "std. error"]
    table = Table("stateful, by position", [*columns, "documents", "tokens"])
    for buckets in zip(*(position_buckets(x.nll["stateful"]) for x in results), strict=True):
        cells = []
        for bucket in buckets:
            cells += [f"{bucket.nll_per_token:.4f}", plus_minus(bucket.standard_error)]
        last = buckets[0]
        table.add(
            f"{last.first:,} to {last.last:,}", *cells, f"{last.documents:,}", f"{last.tokens:,}"
        )
    return table


def _contexts(names, results) -> Table:
    documents = len(next(iter(results[0].last_nll.values())))
    table = Table(
        f"perplexity of the same last {_LAST_TOKENS} tokens of {documents} documents",
        ("tokens of context", *(names if len(names) > 1 else ["perplexity"])),
    )
    for length in results[0].last_nll:
        nll = [found.last_nll[length].mean() / _LAST_TOKENS for found in results]
        table.add(f"{length:,}", *(f"{math.exp(x):,.6g}" for x in nll))
    return table


def _tasks(names, results, plan) -> Table:
    columns = ["task", "shots", "metric"]
    for name in names:
        columns += [name if len(names) > 1 else "accuracy, %", "std. error"]
    if len(names) == 2:
        columns += ["difference", "std. error", "z"]
    table = Table(
        f"prompts: {plan.variant}" + (f", shots: {plan.shot_mode}" if any(plan.shots) else ""),
        [*columns, "random", "majority", "rows"],
    )
    read = [np.sum(list(found.read.values()), axis=0) for found in results]
    table.note = "; ".join(
        f"{f'{name}: ' if len(names) > 1 else ''}{tokens:,} tokens read, {alone:,} without shared "
        f"prefixes; {found.truncated:,} requests cut to {plan.max_length or 'no'} tokens"
        for name, found, (tokens, alone) in zip(names, results, read, strict=True)
    )
    for task, shots in results[0].tasks:
        each = [found.tasks[task, shots] for found in results]
        for metric in each[0].correct:
            cells = []
            for found in each:
                error = 100 * found.standard_error(metric)
                cells += [percent(found.accuracy(metric)), plus_minus(error, 2)]
            if len(each) == 2:
                difference = paired_difference(*(found.correct[metric] for found in each))
                cells += [f"{100 * difference.mean:+.2f}"]
                cells += [plus_minus(100 * difference.standard_error, 2)]
                cells += [f"{difference.z:.1f}"]
            random, majority = percent(each[0].random), percent(each[0].majority)
            table.add(task, str(shots), metric, *cells, random, majority, f"{each[0].rows:,}")
    for shots in plan.shots:
        means = [
            percent(np.mean([x.accuracy() for (_, n), x in found.tasks.items() if n == shots]))
            for found in results
        ]
        table.add("average", str(shots), "acc", *(cell for mean in means for cell in (mean, "")))
    return table


def _recall(names, results) -> Table:
    columns = ["probe", "distance"]
    for name in names:
        columns += [name if len(names) > 1 else "right, %", "std. error", "nats/token"]
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


def reports(nll: Sequence[np.ndarray], text: Text) -> dict[str, PerplexityReport]:
    """The report of all documents under "", and those of each source, if there are several."""
    found = {"": perplexity_report(nll, text.texts, text.byte_counts)}
    sources = list(dict.fromkeys(text.sources))
    for source in sources if len(sources) > 1 else []:
        of_source = np.flatnonzero(np.array(text.sources) == source)
        found[source] = perplexity_report(
            [nll[i] for i in of_source],
            [text.texts[i] for i in of_source],
            text.byte_counts[of_source],
        )
    return found


def bits_difference(
    one: Sequence[np.ndarray], other: Sequence[np.ndarray], text: Text
) -> tuple[float, float]:
    """How many bits per byte more `one` needs than `other` for the same documents; its error."""
    bits = (sums(one) - sums(other)) / math.log(2)
    return float(bits.sum() / text.byte_counts.sum()), ratio_standard_error(bits, text.byte_counts)


def _z(mean: float, error: float) -> str:
    return f"z {mean / error:.1f}" if error > 0 else ""


def as_json(results: Results, text: Text | None) -> dict[str, Any]:
    """The results of a model; None stands for what is no number: JSON has neither NaN nor inf."""
    record: dict[str, Any] = {}
    if results.nll:
        record["protocols"] = {
            protocol: _finite(found[""])
            | {"sources": {name: _finite(x) for name, x in found.items() if name}}
            for protocol, nll in results.nll.items()
            for found in (reports(nll, text),)
        }
    if "stateful" in results.nll:
        record["positions"] = [_finite(x) for x in position_buckets(results.nll["stateful"])]
    if results.last_nll:
        record["last_tokens"] = [
            {
                "context": length,
                "documents": len(nll),
                "nll_per_token": float(nll.mean()) / _LAST_TOKENS,
                "standard_error": _number(standard_error(nll / _LAST_TOKENS)),
            }
            for length, nll in results.last_nll.items()
        ]
    if results.tasks:
        record["tasks"] = [
            {
                "task": name,
                "shots": shots,
                "rows": found.rows,
                "random": found.random,
                "majority": found.majority,
                "tokens_read": results.read[name, shots][0],
                "tokens_without_sharing": results.read[name, shots][1],
            }
            | {
                metric: {
                    "mean": found.accuracy(metric),
                    "standard_error": _number(found.standard_error(metric)),
                    "correct": correct.astype(int).tolist(),
                }
                for metric, correct in found.correct.items()
            }
            for (name, shots), found in results.tasks.items()
        ]
        record["truncated_requests"] = results.truncated
    if results.recall:
        record["recall"] = [
            {
                "probe": found.probe,
                "distance": found.distance,
                "accuracy": found.accuracy,
                "standard_error": _number(found.standard_error),
                "nll_per_token": found.nll_per_token,
                "random": found.random,
                "trials": len(found.correct),
            }
            for found in results.recall
        ]
    return record


def _finite(found) -> dict[str, Any]:
    return {name: _number(value) for name, value in dataclasses.asdict(found).items()}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
