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


def fullest_size(records: Records) -> str:
    """The size at which most models have runs, the largest of these."""
    sizes = sizes_of(records)
    return max(sizes, key=lambda size: (len(models_at(records, size)), sizes.index(size)))


def pairs_and_sizes(records: Records) -> Iterator[tuple[str, str, list[str]]]:
    """The pairs of models that are compared, with the sizes at which both have runs."""
    for one, other in (*PAIRS, *EXTRA_PAIRS):
        sizes = sizes_of(records, one, other)
        if sizes:
            yield one, other, sizes


def pair_label(one: str, other: str) -> str:
    """The name of a difference."""
    return f"{LABELS[one]} minus {LABELS[other]}"


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


def seed_differences(
    records: Records, one: str, other: str, size: str, protocol: str
) -> list[float]:
    """One model minus another, of each seed that both have."""
    bits = [
        {x["seed"]: x["held_out"][protocol]["bits_per_byte"] for x in of_runs(records, model, size)}
        for model in (one, other)
    ]
    return [bits[0][seed] - bits[1][seed] for seed in sorted(bits[0].keys() & bits[1].keys())]


def bits_of_class(records: Records, model: str, size: str, name: str) -> np.ndarray:
    """The bits of one class of tokens in windows: [seeds, documents]."""
    return np.array([x["classes"][name]["bits"] for x in of_runs(records, model, size)])


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
