"""Is the difference between RetNet and Transformer on prose the one on source code?

The four models of `perplexity_by_size.py` at its two smallest sizes, with its learning rates, which
were chosen on source code, and its number of steps: 2M tokens in windows of 256. Two seeds each,
on the documentation of Python packages (`prose_texts.py`, 41 MB), with a tokenizer of its own.
Nothing was chosen on these texts, so all held-out documents are reported on: the first 4,096 tokens
of each, in windows of the training length, and by a RetNet also from the beginning. The differences
on source code are those of `perplexity_by_size.py`.

    python -m experiments.prose                  16 runs of 4 to 7 minutes on one core
    python -m experiments.prose --budget=small   two runs of a few steps, on this project's docs

Two processes with one core each, `taskset -c 0` and `taskset -c 1` before the command, share the
runs. The texts are downloaded first (110 MB), and the rates of `perplexity_by_size` must be known.
"""

import dataclasses
import sys
from typing import Any

import numpy as np

from experiments import prose_texts
from experiments.held_out import beginnings, chosen_documents, document_bits
from experiments.paired import Estimate, estimate
from experiments.perplexity_by_size import (
    LENGTH,
    MODELS,
    RATES,
    config_of,
    learning_rate,
    non_embedding,
)
from experiments.runs import Records, Run, main, read_records
from experiments.size_tables import BETWEEN, LABELS, pair_label
from retnet_jax.config import Config, DataConfig
from retnet_jax.data import open_store
from retnet_jax.evaluation.tables import Table
from retnet_jax.training.loop import TrainResult

BUDGETS = ("small", "2cores")
USED = ("0.1M", "0.3M")
SEEDS = (0, 1)
HELD_OUT = 0.1
LONGEST = 4096  # tokens that are read of each held-out document
OWN_DOCS = "docs/*.md"
# The better way of reading of each: windows for a Transformer, and a RetNet from the beginning.
PROTOCOLS = {"window": "windows of 256 tokens", "better": "each in its better way"}


def runs(budget: str, records: Records) -> list[Run]:
    """The runs whose learning rates are known."""
    if budget == "small":
        return [make_run(name, "0.1M", 0, RATES[1], budget) for name in MODELS[::2]]
    swept = read_records("perplexity_by_size", budget)
    rates = {(name, size): learning_rate(name, size, swept) for size in USED for name in MODELS}
    return [
        make_run(name, size, seed, rate, budget)
        for (name, size), rate in rates.items()
        if rate is not None
        for seed in SEEDS
    ]


def make_run(name: str, size: str, seed: int, rate: float, budget: str) -> Run:
    """One run of a model."""
    config = config_of(name, size, seed, rate)
    path, store = prose_texts.TEXTS, "data/prose_bpe4096"
    if budget == "small":
        path, store = OWN_DOCS, "data/own_docs_bpe4096"
        config.train.steps = 30
    config.data = DataConfig(
        source="text", path=path, store=store, held_out=HELD_OUT, sequence_length=LENGTH
    )
    config.train = dataclasses.replace(config.train, eval_every=config.train.steps)
    about = {
        "model": name,
        "size": size,
        "seed": seed,
        "rate": rate,
        "non_embedding": non_embedding(config.model),
    }
    prepare = prose_texts.prepare if budget != "small" else None
    return Run(f"{name}_{size}_{seed}", config, about, _measure(config, budget), prepare=prepare)


def _measure(config: Config, budget: str):
    def measure(result: TrainResult) -> dict[str, Any]:
        store = open_store(config.data.store)
        chosen = chosen_documents(store, lambda name: True, budget)
        _, byte_counts = beginnings(store, chosen, LONGEST)
        found = document_bits(result.model, store, chosen, LENGTH, LONGEST)
        return {"held_out": {"bytes": byte_counts.tolist(), **found}}

    return measure


def difference(records: Records, pair: tuple[str, str], size: str, way: str) -> Estimate | None:
    """One model minus the other in bits per byte, over the seeds that both have; None: none."""
    pairs = [
        (one["held_out"], other["held_out"])
        for seed in SEEDS
        if (one := records.get(f"{pair[0]}_{size}_{seed}"))
        and (other := records.get(f"{pair[1]}_{size}_{seed}"))
    ]
    if not pairs:
        return None
    bits = [np.subtract(_bits(one, way), _bits(other, way)) for one, other in pairs]
    return estimate(np.array(bits), pairs[0][0]["bytes"])


def _bits(held_out: dict[str, Any], way: str) -> list[float]:
    found = [held_out[x] for x in ("window", "stateful") if x in held_out]
    if way == "window":
        return held_out["window"]["bits"]
    return min(found, key=lambda x: x["bits_per_byte"])["bits"]


def report(budget: str, records: Records) -> str:
    """The tables; there is no figure."""
    return tables(records)


def tables(records: Records) -> str:
    """The losses of all runs and the differences, as Markdown."""
    found = [_differences(records), _losses(records)]
    return "\n\n".join(table.markdown for table in found if table.rows)


def _differences(records: Records) -> Table:
    title = "bits per byte of prose, \u00b1 over documents, \u00b1 over seeds"
    table = Table(title, ("difference", "size", *PROTOCOLS.values()))
    for pair in BETWEEN:
        for size in USED:
            estimates = [difference(records, pair, size, way) for way in PROTOCOLS]
            made = [x.text("+.4f") for x in estimates if x is not None]
            if made:
                table.add(pair_label(*pair), size, *made)
    return table


def _losses(records: Records) -> Table:
    table = Table(
        "held-out bits per byte of prose",
        ("model", "size", "seed", "rate", "in windows", "state carried", "skipped"),
    )
    for record in records.values():
        found = record["held_out"]
        carried = found.get("stateful")
        table.add(
            LABELS[record["model"]],
            record["size"],
            str(record["seed"]),
            f"{record['rate']:g}",
            f"{found['window']['bits_per_byte']:.4f}",
            f"{carried['bits_per_byte']:.4f}" if carried else "",
            str(record["skipped_steps"]),
        )
    return table


if __name__ == "__main__":
    main(sys.modules[__name__])
