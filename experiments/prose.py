r"""Is the difference between RetNet and Transformer on prose the one on source code?

The four models of `perplexity_by_size.py` on the documentation of Python packages
(`prose_texts.py`, 41 MB), with a tokenizer of its own. Reported are the first 4,096 tokens of
held-out documents, read in windows of the training length, and by a RetNet from the beginning too;
a Transformer is not read in windows that overlap, which would gain it something. The differences on
source code are those of `perplexity_by_size.py`.

On two cores: its two smallest sizes and 2M tokens in windows of 256, with two seeds. The learning
rates are those of `perplexity_by_size`, on source code: chosen at 0.1M, interpolated at 0.3M. On a
GPU: 16M and 48M parameters without the embedding, 20M tokens in windows of 1,024, bfloat16. The
best of three rates of each model and size, and of more while the best one is clearly at an end
(`rate_sweeps.py`), is chosen by validation documents and gets a second seed.

    python -m experiments.prose                  16 runs of 2 to 7 minutes on one core
    python -m experiments.prose --budget=small   two runs of a few steps, on this project's docs
    python -m experiments.prose --budget=gpu     32 runs or more on one GPU of 80 GB

Two processes with one core each, `taskset -c 0` and `taskset -c 1` before the command, share the
runs; so do processes on one GPU with XLA_PYTHON_CLIENT_MEM_FRACTION=0.23: four processes made four
runs of 16M in 4.5 minutes on an H200, and twelve in eight. The texts are downloaded first (110 MB).
Where that cannot be, the store is enough, made elsewhere; this is the GPU's, and two cores need
data/prose_bpe4096 with a vocabulary of 4096:

    python -m experiments.prose_texts
    python tools/prepare_data.py --config=quickstart --config.data.source=text \
        --config.data.path='data/prose/*/*.txt' --config.data.held_out=0.1 \
        --config.data.store=data/prose_bpe8192 --config.model.vocab_size=8192
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import perplexity_by_size, prose_texts, rate_sweeps
from experiments.held_out import beginnings, best_bits_per_byte, chosen_documents, document_bits
from experiments.paired import Estimate, estimate
from experiments.perplexity_by_size import (
    MODELS,
    SIZES,
    Size,
    described,
    loss_of_rate,
    model_of,
    run_name,
)
from experiments.runs import Records, Run, main, read_records
from experiments.size_records import BETWEEN, LABELS, pair_label
from retnet_jax.config import Config, DataConfig
from retnet_jax.data import open_store
from retnet_jax.data.split import hash_of_name
from retnet_jax.evaluation.tables import Table, as_markdown
from retnet_jax.training.loop import TrainResult

BUDGETS = ("small", "gpu", "2cores")
SIZES_OF = {
    "small": {"0.1M": SIZES["0.1M"]},
    "2cores": {name: SIZES[name] for name in ("0.1M", "0.3M")},
    "gpu": {"16M": Size(384, 6, 3), "48M": Size(576, 8, 6)},
}
SEEDS = (0, 1)
GPU_RATES = (0.01, 0.02, 0.04)
# Share of the documents that are held out; few documents need a larger one.
HELD_OUT = {"small": 0.5, "2cores": 0.1, "gpu": 0.1}
REPORTED = 0.8  # share of the held-out documents that are reported on; the others choose rates
LONGEST = 4096  # tokens that are read of each held-out document
OWN_DOCS = "docs/*.md"
WAYS = {
    "window": "both in windows of the training length",
    "carried": "the RetNet's state carried, the Transformer in windows",
}


def runs(budget: str, records: Records) -> list[Run]:
    """The runs whose learning rates are known."""
    if budget == "small":
        return [make_run(name, "0.1M", 0, 0.04, budget) for name in MODELS[::2]]
    found = []
    for size in SIZES_OF[budget]:
        for name in MODELS:
            rate = rate_of(name, size, budget, records)
            if budget == "gpu":
                swept = rate_sweeps.rates_to_try(GPU_RATES, loss_of_rate(name, size, records))
                found += [make_run(name, size, 0, x, budget) for x in swept]
            if rate is not None:
                found += [make_run(name, size, seed, rate, budget) for seed in SEEDS]
    return list({run.name: run for run in found}.values())


def rate_of(name: str, size: str, budget: str, records: Records) -> float | None:
    """The learning rate of a model at a size; None: it is not known yet."""
    if budget == "small":
        return 0.04
    if budget == "2cores":
        swept = read_records("perplexity_by_size", budget)
        return perplexity_by_size.learning_rate(name, size, swept)
    return rate_sweeps.best_rate(GPU_RATES, loss_of_rate(name, size, records))


def make_run(name: str, size: str, seed: int, rate: float, budget: str) -> Run:
    """One run of a model."""
    config = config_of(name, size, seed, rate, budget)
    about = described(name, size, seed, rate, config)
    downloads = config.data.path == prose_texts.TEXTS and not Path(config.data.store).exists()
    return Run(
        run_name(name, size, seed, rate),
        config,
        about,
        _measure(config, budget),
        prepare=prose_texts.prepare if downloads else None,
    )


def config_of(name: str, size: str, seed: int, rate: float, budget: str) -> Config:
    """The config of a run."""
    config = perplexity_by_size.config_of(name, "0.1M", seed, rate)
    config.model = model_of(name, SIZES_OF[budget][size])
    path, store, length = prose_texts.TEXTS, "data/prose_bpe4096", config.data.sequence_length
    if budget == "small":
        path, store = OWN_DOCS, "data/own_docs_bpe4096"
        config.train.steps = 30
    if budget == "gpu":
        store, length = "data/prose_bpe8192", 1024
        config.model = dataclasses.replace(config.model, vocab_size=8192, dtype="bfloat16")
        config.train = dataclasses.replace(config.train, steps=625, batch_size=32)
    config.data = DataConfig(
        source="text",
        path=path,
        store=store,
        held_out=HELD_OUT[budget],
        sequence_length=length,
    )
    config.train = dataclasses.replace(config.train, eval_every=config.train.steps)
    config.check()
    return config


def _measure(config: Config, budget: str) -> Callable[[TrainResult], dict[str, Any]]:
    def measure(result: TrainResult) -> dict[str, Any]:
        store, length = open_store(config.data.store), config.data.sequence_length
        border = REPORTED * config.data.held_out
        reported = chosen_documents(store, lambda x: hash_of_name(x) < border, budget)
        rest = chosen_documents(store, lambda x: hash_of_name(x) >= border, budget)
        _, byte_counts = beginnings(store, reported, LONGEST)
        found = document_bits(result.model, store, reported, length, LONGEST)
        validation = None
        if rest:
            of_rest = document_bits(result.model, store, rest, length, LONGEST)
            validation = best_bits_per_byte(of_rest)
        return {"validation": validation, "held_out": {"bytes": byte_counts.tolist(), **found}}

    return measure


def chosen(budget: str, records: Records) -> Records:
    """The records of the best rates; of a sweep that is to go on, of the best one so far."""

    def rate(name: str, size: str) -> float | None:
        if budget == "gpu":
            return rate_sweeps.best_so_far(GPU_RATES, loss_of_rate(name, size, records))
        return rate_of(name, size, budget, records)

    return {name: x for name, x in records.items() if x["rate"] == rate(x["model"], x["size"])}


def difference(final: Records, pair: tuple[str, str], size: str, way: str) -> Estimate | None:
    """One model minus the other in bits per byte, over the seeds that both have; None: none.

    Args:
      final: The records of the chosen learning rates.
      pair: The two models.
      size: Name of their size.
      way: How documents are read, from `WAYS`.
    """
    of_pair = [
        {
            x["seed"]: x["held_out"]
            for x in final.values()
            if (x["model"], x["size"]) == (name, size)
        }
        for name in pair
    ]
    both = sorted(of_pair[0].keys() & of_pair[1].keys())
    if not both:
        return None
    bits = [np.subtract(*(_bits(found[seed], way) for found in of_pair)) for seed in both]
    return estimate(np.array(bits), of_pair[0][both[0]]["bytes"])


def _bits(held_out: dict[str, Any], way: str) -> list[float]:
    carried = way == "carried" and "stateful" in held_out
    return held_out["stateful" if carried else "window"]["bits"]


def report(budget: str, records: Records) -> str:
    """The tables; there is no figure."""
    return as_markdown(tables(budget, records))


def tables(budget: str, records: Records) -> list[Table]:
    """The differences, and the losses of all runs."""
    return [_differences(budget, chosen(budget, records)), _losses(records)]


def _differences(budget: str, final: Records) -> Table:
    title = "bits per byte of prose, \u00b1 over documents, \u00b1 over seeds"
    table = Table(title, ("difference", "size", *WAYS.values()))
    for pair in BETWEEN:
        for size in SIZES_OF[budget]:
            estimates = [difference(final, pair, size, way) for way in WAYS]
            made = [x.text("+.4f") for x in estimates if x is not None]
            if made:
                table.add(pair_label(*pair), size, *made)
    return table


def _losses(records: Records) -> Table:
    table = Table(
        "held-out bits per byte of prose",
        ("model", "size", "seed", "rate", "in windows", "state carried", "validation", "skipped"),
    )
    sorted_records = sorted(
        records.values(),
        key=lambda x: (list(LABELS).index(x["model"]), x["non_embedding"], x["rate"], x["seed"]),
    )
    for record in sorted_records:
        found, validation = record["held_out"], record["validation"]
        carried = found["stateful"]["bits_per_byte"] if "stateful" in found else math.nan
        table.add(
            LABELS[record["model"]],
            record["size"],
            str(record["seed"]),
            f"{record['rate']:g}",
            f"{found['window']['bits_per_byte']:.4f}",
            "" if math.isnan(carried) else f"{carried:.4f}",
            "" if validation is None else f"{validation:.4f}",
            str(record["skipped_steps"]),
        )
    return table


if __name__ == "__main__":
    main(sys.modules[__name__])
