"""Reads the records of `experiments/perplexity_by_size.py`, for its tables and figures.

A record is that of one run; these functions bring together the runs of a model, its sizes and its
seeds, and compare models.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from experiments.runs import Records
from experiments.size_fits import Losses, seed_deviation
from retnet_jax.evaluation.statistics import ratio_standard_error, standard_error

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
ENOUGH_SEEDS = 3  # for a standard deviation of their own


def of_runs(records: Records, model: str, size: str) -> list[dict[str, Any]]:
    """The records of one model at one size, by seed."""
    found = [x for x in records.values() if (x["model"], x["size"]) == (model, size)]
    return sorted(found, key=lambda x: x["seed"])


def sizes_of(records: Records, model: str | None = None) -> list[str]:
    """The sizes at which a model, or with None any model, has runs; the smallest first."""
    sizes = {x["size"]: x["non_embedding"] for x in records.values() if model in (None, x["model"])}
    return sorted(sizes, key=sizes.__getitem__)


def sizes_of_pair(records: Records, one: str, other: str) -> list[str]:
    """The sizes at which two models have runs of the same seed, the smallest first."""
    sizes = sizes_of(records, one)
    return [size for size in sizes if paired_runs(records, one, other, size)[0]]


def models_at(records: Records, size: str) -> list[str]:
    """The models that have runs at one size."""
    return [model for model in LABELS if of_runs(records, model, size)]


def fullest_size(records: Records) -> str:
    """The size at which most models have runs, the largest of these."""
    sizes = sizes_of(records)
    return max(sizes, key=lambda size: (len(models_at(records, size)), sizes.index(size)))


def pairs_and_sizes(records: Records) -> Iterator[tuple[str, str, list[str]]]:
    """The pairs of models that are compared, with the sizes at which both have a seed."""
    for one, other in (*PAIRS, *EXTRA_PAIRS):
        sizes = sizes_of_pair(records, one, other)
        if sizes:
            yield one, other, sizes


def pair_label(one: str, other: str) -> str:
    """The name of a difference."""
    return f"{LABELS[one]} minus {LABELS[other]}"


def paired_runs(
    records: Records, one: str, other: str, size: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of two models at one size, of the seeds that both have."""
    each = [{x["seed"]: x for x in of_runs(records, model, size)} for model in (one, other)]
    seeds = sorted(each[0].keys() & each[1].keys())
    return [each[0][seed] for seed in seeds], [each[1][seed] for seed in seeds]


def losses_of(
    records: Records,
    model: str,
    sizes: Sequence[str],
    protocol: str,
    paired_with: str | None = None,
) -> Losses:
    """The losses of one model at some sizes.

    Args:
      records: The records of the chosen learning rates.
      model: Name of the model.
      sizes: Names of the sizes.
      protocol: One of PROTOCOLS.
      paired_with: Another model: only the seeds that both have. None: all seeds.
    """
    bits, parameters, byte_counts = [], [], np.zeros(0)
    for size in sizes:
        each, _ = paired_runs(records, model, paired_with or model, size)
        bits.append(np.array([x["held_out"][protocol]["bits"] for x in each]))
        parameters.append(each[0]["non_embedding"])
        byte_counts = np.array(each[0]["held_out"]["bytes"])
    deviations = [_seed_deviation(records, model, size, protocol) for size in sizes]
    return Losses(np.array(parameters), bits, byte_counts, np.array(deviations))


def paired_losses(
    records: Records, one: str, other: str, sizes: Sequence[str], protocol: str
) -> tuple[Losses, Losses]:
    """The losses of two models at some sizes, of the seeds that both have."""
    return (
        losses_of(records, one, sizes, protocol, paired_with=other),
        losses_of(records, other, sizes, protocol, paired_with=one),
    )


def _seed_deviation(records: Records, model: str, size: str, protocol: str) -> float:
    """That of a model's seeds at one size; of fewer than three, pooled over the models there."""
    enough = len(of_runs(records, model, size)) >= ENOUGH_SEEDS
    return seed_deviation(
        [
            [x["held_out"][protocol]["bits_per_byte"] for x in of_runs(records, name, size)]
            for name in ([model] if enough else models_at(records, size))
        ]
    )


def seed_differences(
    records: Records, one: str, other: str, size: str, protocol: str
) -> list[float]:
    """One model minus another, of each seed that both have."""
    runs = zip(*paired_runs(records, one, other, size), strict=True)
    bits = [[x["held_out"][protocol]["bits_per_byte"] for x in both] for both in runs]
    return [of_one - of_other for of_one, of_other in bits]


def bits_of_class(records: Records, model: str, size: str, name: str) -> np.ndarray:
    """The bits of one class of tokens in windows: [seeds, documents]."""
    return np.array([x["classes"][name]["bits"] for x in of_runs(records, model, size)])


def gap_part(
    records: Records, one: str, other: str, size: str, classes: Iterable[str]
) -> tuple[float, float]:
    """The part of some classes in a difference, in bits per byte of all tokens, and its error.

    It is the mean over the seeds that both models have. The error is over documents and, where
    there are several, over seeds.
    """
    byte_counts = np.array(of_runs(records, one, size)[0]["held_out"]["bytes"])
    names = list(classes)
    bits = [
        np.array([np.sum([x["classes"][name]["bits"] for name in names], 0) for x in runs])
        for runs in paired_runs(records, one, other, size)
    ]
    mean = bits[0].mean(0) - bits[1].mean(0)
    over_seeds = [standard_error(x.sum(1) / byte_counts.sum()) for x in bits]
    error = math.hypot(ratio_standard_error(mean, byte_counts), *np.nan_to_num(over_seeds))
    return float(mean.sum() / byte_counts.sum()), error


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
