"""The tables of `experiments/perplexity_by_size.py`, as Markdown."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from experiments.runs import Records
from experiments.size_fits import (
    Losses,
    crossings,
    difference,
    line_of,
    line_of_difference,
    seed_deviation,
)
from experiments.token_classes import CLASSES
from retnet_jax.evaluation.statistics import ratio_standard_error, standard_error
from retnet_jax.evaluation.tables import Table, plus_minus

LABELS = {
    "retnet": "RetNet",
    "retnet_conv": "RetNet, conv.",
    "transformer": "Transformer",
    "transformer_conv": "Transformer, conv.",
    "hybrid_full": "hybrid, full attention",
    "hybrid_window": "hybrid, window of 64",
    "retnet_conv_windows": "RetNet, conv., own windows",
    "transformer_conv_windows": "Transformer, conv., own windows",
}
BETWEEN = (("retnet", "transformer"), ("retnet_conv", "transformer_conv"))
# One minus the other, at all sizes.
PAIRS = (*BETWEEN, ("retnet_conv", "retnet"), ("transformer_conv", "transformer"))
EXTRA_PAIRS = (
    ("hybrid_full", "transformer_conv"),
    ("hybrid_window", "transformer_conv"),
    ("hybrid_full", "retnet_conv"),
    ("hybrid_window", "retnet_conv"),
    ("retnet_conv_windows", "transformer_conv_windows"),
    ("retnet_conv_windows", "retnet_conv"),
    ("transformer_conv_windows", "transformer_conv"),
)
LONGEST = 32_768  # positions and distances; few documents are longer
# As in `use_of_context.nll_by_protocol`.
PROTOCOLS = ("window", "longer")


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


def of_runs(records: Records, model: str, size: str) -> list[dict[str, Any]]:
    """The records of one model at one size, by seed."""
    found = [x for x in records.values() if (x["model"], x["size"]) == (model, size)]
    return sorted(found, key=lambda x: x["seed"])


def sizes_of(records: Records, *models: str) -> list[str]:
    """The sizes at which all of some models have runs, the smallest first."""
    sizes = {x["size"]: x["non_embedding"] for x in records.values()}
    found = sorted(sizes, key=sizes.__getitem__)
    return [size for size in found if all(of_runs(records, x, size) for x in models)]


def models_at(records: Records, size: str) -> list[str]:
    """The models that have runs at one size."""
    return [model for model in LABELS if of_runs(records, model, size)]


def losses_of(records: Records, model: str, sizes: Sequence[str], protocol: str) -> Losses:
    """The losses of one model at some sizes, by one of PROTOCOLS."""
    bits, parameters, byte_counts = [], [], np.zeros(0)
    for size in sizes:
        each = of_runs(records, model, size)
        bits.append(np.array([x["held_out"][protocol]["bits"] for x in each]))
        parameters.append(each[0]["non_embedding"])
        byte_counts = np.array(each[0]["held_out"]["bytes"])
    deviation = _seed_deviation(records, model, protocol)
    return Losses(np.array(parameters), bits, byte_counts, deviation)


def _seed_deviation(records: Records, model: str, protocol: str) -> float:
    """Pooled over the sizes of a model, or over all models for one of fewer than three sizes."""
    models = [model] if len(sizes_of(records, model)) > 2 else list(LABELS)
    return seed_deviation(
        [
            [x["held_out"][protocol]["bits_per_byte"] for x in of_runs(records, name, size)]
            for name in models
            for size in sizes_of(records, name)
        ]
    )


def pair_label(one: str, other: str) -> str:
    """The name of a difference."""
    return f"{LABELS[one]} minus {LABELS[other]}"


def pairs_and_sizes(records: Records) -> Iterator[tuple[str, str, list[str]]]:
    """The pairs of models that are compared, with the sizes at which both have runs."""
    for one, other in (*PAIRS, *EXTRA_PAIRS):
        sizes = sizes_of(records, one, other)
        if sizes:
            yield one, other, sizes


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


def seed_differences(
    records: Records, one: str, other: str, size: str, protocol: str
) -> list[float]:
    """One model minus another, of each seed that both have."""
    bits = [
        {x["seed"]: x["held_out"][protocol]["bits_per_byte"] for x in of_runs(records, model, size)}
        for model in (one, other)
    ]
    return [bits[0][seed] - bits[1][seed] for seed in sorted(bits[0].keys() & bits[1].keys())]


def _differences(final: Records) -> Table:
    table = Table(
        "Differences, bits per byte (positive: the first is worse)",
        (
            *("", "size", "windows", "documents", "seeds"),
            *("longer contexts", "documents", "seeds", "in errors"),
        ),
        note="Errors over the held-out documents, which both read, and over seeds. The standard "
        "deviation over seeds is pooled over the sizes of a model; models of one size have that of "
        "all models. A Transformer without convolutions varies much more at 1M and 2M, where some "
        "seeds learn to recall earlier, than at 0.1M and 0.3M: there its error is too large.",
    )
    for one, other, sizes in pairs_and_sizes(final):
        found = [
            difference(
                losses_of(final, one, sizes, protocol), losses_of(final, other, sizes, protocol)
            )
            for protocol in PROTOCOLS
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
            each = [losses_of(final, x, sizes, "longer") for x in (one, other)]
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


def bits_of_class(records: Records, model: str, size: str, name: str) -> np.ndarray:
    """The bits of one class of tokens in windows: [seeds, documents]."""
    return np.array([x["classes"][name]["bits"] for x in of_runs(records, model, size)])


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


def gap_part(
    records: Records, one: str, other: str, size: str, classes: Iterable[str]
) -> tuple[float, float]:
    """The part of some classes in a difference, in bits per byte of all tokens, and its error.

    The error is over documents and, where both models have several, over seeds.
    """
    byte_counts = np.array(of_runs(records, one, size)[0]["held_out"]["bytes"])
    bits = [sum(bits_of_class(records, model, size, x) for x in classes) for model in (one, other)]
    mean = bits[0].mean(0) - bits[1].mean(0)
    over_seeds = [standard_error(x.sum(1) / byte_counts.sum()) for x in bits]
    error = math.hypot(ratio_standard_error(mean, byte_counts), *np.nan_to_num(over_seeds))
    return float(mean.sum() / byte_counts.sum()), error


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


def bucket_means(
    records: Records, model: str, size: str, part: str
) -> dict[tuple[int, int], tuple[float, float]]:
    """Bits per token of each bucket: the mean over seeds, and the error over documents of one.

    Buckets beyond LONGEST are left out: three documents have an error, but not a known one.
    """
    runs = of_runs(records, model, size)
    found = {}
    for number, bucket in enumerate(runs[0][part]):
        if bucket["last"] > LONGEST:
            continue
        mean = float(np.mean([x[part][number]["bits_per_token"] for x in runs]))
        found[bucket["first"], bucket["last"]] = mean, bucket["standard_error"]
    return found


def fullest_size(records: Records) -> str:
    """The size at which most models have runs, the largest of these."""
    sizes = sizes_of(records)
    return max(sizes, key=lambda size: (len(models_at(records, size)), sizes.index(size)))


def recall_means(
    records: Records, model: str, size: str, probe: str
) -> dict[int, tuple[float, float]]:
    """The accuracy by distance, over all trials of all seeds, and its standard error."""
    each: dict[int, list[float]] = {}
    trials: dict[int, list[float]] = {}
    for record in of_runs(records, model, size):
        for x in record["recall"]:
            if x["probe"] == probe:
                each.setdefault(x["distance"], []).append(x["accuracy"])
                trials.setdefault(x["distance"], []).append(x["standard_error"])
    return {
        distance: (float(np.mean(found)), math.hypot(*trials[distance]) / len(found))
        for distance, found in each.items()
    }


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
