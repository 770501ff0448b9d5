"""The results of one model, or of two beside each other, as tables and for JSON."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from retnet_jax.evaluation.held_out_texts import Text
from retnet_jax.evaluation.run import Plan, Results
from retnet_jax.evaluation.statistics import (
    Difference,
    PerplexityReport,
    paired_difference,
    perplexity_report,
    position_buckets,
    ratio_standard_error,
    standard_error,
    sums,
)
from retnet_jax.evaluation.tables import Table, in_errors, percent, plus_minus

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
        found.append(_perplexity(names, results, text, plan))
    for name, of_model in zip(names, results, strict=True):
        # A table for each: their tokens may differ.
        of_name = f", {name}" if len(names) > 1 else ""
        if "stateful" in of_model.nll:
            found.append(_positions(of_name, of_model.nll["stateful"]))
        if of_model.last_nll:
            found.append(_contexts(of_name, of_model.last_nll))
    if first.nll and len(results) == 2:
        found.append(_differences(results, text, plan))
    if compressed:
        found.append(_compressors(compressed))
    if first.tasks:
        found.append(_tasks(names, results, plan))
    if first.recall:
        found.append(_recall(names, results))
    return found


def _perplexity(names, results, text, plan) -> Table:
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
    return table


def _differences(results, text, plan) -> Table:
    table = Table("the first less the second", ("", "bits/byte", "std. error", "z"))
    for protocol in results[0].nll:
        found = bits_difference(*(x.nll[protocol] for x in results), text)
        cells = f"{found.mean:+.4f}", plus_minus(found.standard_error), in_errors(found.z)
        table.add(plan.label(protocol), *cells)
    return table


def _compressors(compressed) -> Table:
    table = Table("", ("", "bits/byte"))
    for name, bits in compressed.items():
        table.add(name, f"{bits:.4f}")
    return table


def _positions(of_name, nll) -> Table:
    table = Table(
        f"stateful, by position{of_name}",
        [
            *("position in the document", "nats/token", "std. error"),
            *("perplexity", "documents", "tokens"),
        ],
    )
    for bucket in position_buckets(nll):
        table.add(
            f"{bucket.first:,} to {bucket.last:,}",
            f"{bucket.nll_per_token:.4f}",
            plus_minus(bucket.standard_error),
            f"{bucket.perplexity:,.6g}",
            f"{bucket.documents:,}",
            f"{bucket.tokens:,}",
        )
    return table


def _contexts(of_name, last_nll) -> Table:
    documents = len(next(iter(last_nll.values())))
    table = Table(
        f"the same last {_LAST_TOKENS} tokens of {documents} documents{of_name}",
        ("tokens of context", "nats/token", "std. error", "perplexity"),
    )
    for length, nll in last_nll.items():
        each = nll / _LAST_TOKENS
        error = plus_minus(standard_error(each))
        table.add(f"{length:,}", f"{each.mean():.4f}", error, f"{math.exp(each.mean()):,.6g}")
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
    notes = []
    for name, found, (tokens, alone) in zip(names, results, read, strict=True):
        note = f"{tokens:,} tokens read, {alone:,} without shared prefixes"
        if plan.max_length is not None:
            note += f"; {found.truncated:,} requests cut to {plan.max_length:,} tokens"
        notes.append(f"{name}: {note}" if len(names) > 1 else note)
    table.note = "\n".join(notes)
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
                cells += [in_errors(difference.z)]
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
) -> Difference:
    """How many bits per byte more `one` needs than `other` for the same documents."""
    bits = (sums(one) - sums(other)) / math.log(2)
    mean = float(bits.sum() / text.byte_counts.sum())
    return Difference(mean, ratio_standard_error(bits, text.byte_counts))


def differences_as_json(results: Sequence[Results], text: Text | None) -> dict[str, Any]:
    """What the first model's results are more than the second's, by protocol and by task."""
    one, other = results
    record: dict[str, Any] = {
        protocol: _of_difference(bits_difference(one.nll[protocol], other.nll[protocol], text))
        for protocol in one.nll
    }
    for (task, shots), found in one.tasks.items():
        against = other.tasks[task, shots].correct
        record[f"{task}, {shots} shots"] = {
            metric: _of_difference(paired_difference(correct, against[metric]))
            for metric, correct in found.correct.items()
        }
    return record


def _of_difference(found: Difference) -> dict[str, float | None]:
    return _finite(found) | {"z": _number(found.z)}


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
                "nll_per_token": _number(float(nll.mean()) / _LAST_TOKENS),
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
                "nll_per_token": _number(found.nll_per_token),
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
