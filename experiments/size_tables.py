"""The tables of `experiments/perplexity_by_size.py`."""

import math
from collections.abc import Iterator

import numpy as np

from experiments.runs import Records
from experiments.size_fits import crossings, difference, line_of, line_of_difference
from experiments.size_records import (
    BETWEEN,
    LABELS,
    PROTOCOLS,
    bits_of_class,
    bucket_means,
    fullest_size,
    gap_part,
    losses_of,
    models_at,
    of_runs,
    pair_label,
    paired_losses,
    pairs_and_sizes,
    recall_means,
    seed_differences,
    sizes_of,
)
from experiments.token_classes import CLASSES
from retnet_jax.evaluation.tables import Table, plus_minus


def tables(final: Records, records: Records) -> list[Table]:
    """All tables.

    Args:
      final: The records of the chosen learning rates.
      records: All records, with those of the sweeps.
    """
    return [
        _summary(final),
        _differences(final),
        _sizes(final),
        _lines(final),
        _sweeps(records),
        _class_gaps(final),
        _classes(final),
        *(_buckets(final) if final else ()),
        *_recall(final),
        _time(records),
    ]


def _summary(final: Records) -> Table:
    """RetNet minus Transformer, with a column for each size and the difference of each seed."""
    sizes = sizes_of(final)
    table = Table(
        "RetNet minus Transformer by size, bits per byte, and of each seed",
        ("positive: the first is worse", "read in", *sizes),
        note="Both models of a seed read the same tokens in the same order. In repeated pairs: the "
        "part of the difference in windows that is in tokens whose pair with the token before them "
        "occurs in the window.",
    )
    for one, other, common in pairs_and_sizes(final):
        if not other.startswith("transformer") or one.startswith("transformer"):
            continue
        rows: dict[str, dict[str, str]] = {"windows": {}, _REPEATED: {}, "longer contexts": {}}
        for size in common:
            for protocol, label in zip(PROTOCOLS, ("windows", "longer contexts"), strict=True):
                each = seed_differences(final, one, other, size, protocol)
                seeds = ", ".join(f"{x:+.2f}" for x in each)
                rows[label][size] = f"{np.mean(each):+.3f} ({seeds})"
            part, error = gap_part(final, one, other, size, ("common pair", "rare pair"))
            rows[_REPEATED][size] = f"{part:+.3f} {plus_minus(error, 3)}"
        for label in rows if (one, other) in BETWEEN else ["longer contexts"]:
            cells = (rows[label].get(size, "") for size in sizes)
            table.add(pair_label(one, other), label, *cells)
    return table


_REPEATED = "windows, in repeated pairs"


def _differences(final: Records) -> Table:
    table = Table(
        "Differences, bits per byte (positive: the first is worse)",
        (
            *("", "size", "windows", "documents", "seeds"),
            *("longer contexts", "documents", "seeds", "in errors"),
        ),
        note="Of the seeds that both models have. Errors over the held-out documents, which both "
        "read, and over seeds: the standard deviation over seeds is that of a model at a size, or "
        "of fewer than three seeds the pooled one of all models of the size. With three seeds "
        "the 95 % interval of a mean is 4.3 of its errors over seeds to either side.",
    )
    for one, other, sizes in pairs_and_sizes(final):
        found = [
            difference(*paired_losses(final, one, other, sizes, protocol)) for protocol in PROTOCOLS
        ]
        for i, size in enumerate(sizes):
            cells = [size]
            for x in found:
                cells += [f"{x.mean[i]:+.4f}", plus_minus(x.document_errors[i])]
                cells += [plus_minus(x.seed_errors[i])]
            in_errors = found[1].mean[i] / found[1].errors[i]
            cells.append("-" if math.isnan(in_errors) else f"{in_errors:+.1f}")
            table.add(pair_label(one, other), *cells)
    return table


def _sizes(final: Records) -> Table:
    table = Table(
        "Held-out bits per byte",
        (
            *("", "size", "parameters", "rate", "seeds", "windows", "longer contexts"),
            *("seeds", "documents", "skipped"),
        ),
        note="Parameters without the embedding. Longer contexts: models whose state has a fixed "
        "size read whole documents; models with attention to all tokens read windows that overlap "
        "by half.",
    )
    for model in LABELS:
        sizes = sizes_of(final, model)
        if not sizes:
            continue
        window, longer = (losses_of(final, model, sizes, x) for x in PROTOCOLS)
        for i, size in enumerate(sizes):
            each = of_runs(final, model, size)
            table.add(
                LABELS[model],
                size,
                f"{each[0]['non_embedding']:,}",
                f"{each[0]['rate']:g}",
                str(len(each)),
                f"{window.mean[i]:.4f}",
                f"{longer.mean[i]:.4f}",
                plus_minus(longer.seed_errors[i]),
                plus_minus(longer.document_errors[i]),
                str(sum(x["skipped_steps"] for x in each)),
            )
    return table


def _lines(final: Records) -> Table:
    table = Table(
        "Lines over log10 of the parameters, bits per byte, longer contexts",
        (
            *("", "at 1M", "std. error", "for ten times as many", "std. error"),
            *("largest residual", "0 at", "95% from", "to"),
        ),
        note="For RetNet minus Transformer: the parameters at which the line is 0, above the "
        "smallest size, and the interval of draws; ∞: nowhere; -: a value lies farther from the "
        "line than twice its error, or there is one seed. What lies outside the sizes that were "
        "run is an extrapolation of a straight line.",
    )
    rng = np.random.default_rng(0)
    for model in LABELS:
        sizes = sizes_of(final, model)
        if len(sizes) > 2:
            found = line_of(losses_of(final, model, sizes, "longer"), rng)
            table.add(LABELS[model], *_line_cells(found))
    for one, other, sizes in pairs_and_sizes(final):
        if len(sizes) > 2:
            each = paired_losses(final, one, other, sizes, "longer")
            found = line_of_difference(*each, rng)
            where = []
            if (one, other) in BETWEEN:
                # Also not if an error is NaN.
                fits = bool((found.residuals <= 2 * difference(*each).errors).all())
                places = crossings(found, min(each[0].parameters)) if fits else [math.nan] * 3
                where = [_millions(x) for x in places]
            table.add(pair_label(one, other), *_line_cells(found), *where)
    return table


def _line_cells(found) -> list[str]:
    return [
        f"{found.level:+.4f}",
        plus_minus(found.level_error),
        f"{found.slope:+.4f}",
        plus_minus(found.slope_error),
        f"{found.residuals.max():.4f}",
    ]


def _millions(parameters: float) -> str:
    if math.isnan(parameters):
        return "-"
    if parameters > 1e12:
        return "∞" if math.isinf(parameters) else "> 10^12"
    millions = parameters / 1e6
    if millions >= 1:
        return f"{float(f'{millions:.2g}'):,.0f}M"
    return f"{millions:.2g}M"


def _sweeps(records: Records) -> Table:
    swept = {}
    for model in LABELS:
        for size in sizes_of(records, model):
            of_first_seed = [x for x in of_runs(records, model, size) if x["seed"] == 0]
            if len(of_first_seed) > 1:
                swept[model, size] = {x["rate"]: x["validation"] for x in of_first_seed}
    rates = sorted({rate for bits in swept.values() for rate in bits})
    table = Table(
        "Validation bits per byte by learning rate, in windows, one seed",
        ("", "size", *(f"{rate:g}" for rate in rates)),
        note="The best rates of 0.1M and 2M give those between them. Hybrids have their own sweep.",
    )
    for (model, size), bits in swept.items():
        cells = [f"{bits[rate]:.4f}" if rate in bits else "" for rate in rates]
        table.add(LABELS[model], size, *cells)
    return table


def _class_gaps(final: Records) -> Table:
    table = Table(
        "Where the difference lies: its parts by class of token, bits per byte, in windows",
        ("", "size", *CLASSES, "all"),
        note="The parts of a row add up to its last number. Errors over documents and, where both "
        "models have several, seeds.",
    )
    for one, other, sizes in pairs_and_sizes(final):
        for size in sizes:
            parts = [gap_part(final, one, other, size, [name]) for name in CLASSES]
            cells = [f"{part:+.4f} {plus_minus(error)}" for part, error in parts]
            total, _ = gap_part(final, one, other, size, CLASSES)
            table.add(pair_label(one, other), size, *cells, f"{total:+.4f}")
    return table


def _classes(final: Records) -> Table:
    table = Table(
        "Loss by class of token in windows, bits per token, mean over seeds",
        ("", "size", *CLASSES),
    )
    for model in LABELS:
        for size in sizes_of(final, model):
            of_class = of_runs(final, model, size)[0]["classes"]
            losses = [
                bits_of_class(final, model, size, name).sum(1).mean() / of_class[name]["tokens"]
                for name in CLASSES
                if of_class[name]["tokens"]
            ]
            table.add(LABELS[model], size, *(f"{x:.3f}" for x in losses))
    some = next(iter(final.values()), None)
    if some is not None:
        counts = [some["classes"][name]["tokens"] for name in CLASSES]
        table.add("share of the tokens", "", *(f"{100 * x / sum(counts):.1f}%" for x in counts))
    return table


def _buckets(final: Records) -> Iterator[Table]:
    """Tables of loss by distance and by position at the size with most models."""
    size = fullest_size(final)
    titles = {
        "distances": "Loss on rare pairs by distance to their last occurrence in the document",
        "positions": "Loss by position in the document",
    }
    for part, title in titles.items():
        models = models_at(final, size)
        table = Table(
            f"{title}, bits per token, {size}, longer contexts",
            ("tokens" if part == "distances" else "positions", *(LABELS[x] for x in models)),
            note="Mean over seeds, and the error over documents of one seed.",
        )
        each = {model: bucket_means(final, model, size, part) for model in models}
        for first, last in sorted({bucket for found in each.values() for bucket in found}):
            cells = []
            for model in models:
                mean, error = each[model].get((first, last), (math.nan, math.nan))
                cells.append(f"{mean:.2f} {plus_minus(error, 2)}" if not math.isnan(mean) else "")
            table.add(f"{first:,} to {last:,}", *cells)
        yield table


def _recall(final: Records) -> Iterator[Table]:
    distances = sorted({x["distance"] for record in final.values() for x in record["recall"]})
    for probe, chance in (("associative", "1 in 8 by chance"), ("copying", "8 tokens, all right")):
        table = Table(
            f"Synthetic probe: {probe}, % correct by distance in tokens ({chance})",
            ("", "size", *map(str, distances)),
            note="64 trials of each seed. Models without a row: 0 in all, so below 5 % (95 %)."
            if probe == "copying"
            else "64 trials of each seed.",
        )
        for model in LABELS:
            for size in sizes_of(final, model):
                found = recall_means(final, model, size, probe)
                if not any(accuracy for accuracy, _ in found.values()):
                    continue
                cells = [
                    f"{100 * a:.0f} {plus_minus(100 * e, 0)}" if a else "0"
                    for a, e in found.values()
                ]
                table.add(LABELS[model], size, *cells)
        yield table


def _time(records: Records) -> Table:
    table = Table(
        "Time on one core",
        ("size", "runs", "training, s a run", "measuring, s a run", "all runs, hours"),
        note="All runs, with those of the sweeps. The machine's other core had runs too.",
    )
    for size in sizes_of(records):
        runs = [x for x in records.values() if x["size"] == size]
        training = [x["training_seconds"] for x in runs]
        measuring = [x["measuring_seconds"] for x in runs]
        table.add(
            size,
            str(len(runs)),
            f"{np.mean(training):.0f}",
            f"{np.mean(measuring):.0f}",
            f"{(sum(training) + sum(measuring)) / 3600:.2f}",
        )
    return table
