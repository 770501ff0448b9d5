"""How good are the quickstart's RetNet and its Transformer, and how sure is the difference?

Each is trained with three seeds, as `make quickstart` trains it, and evaluated on the quickstart's
held-out documents, generated files apart. Both read the same tokens in the same order.

    python -m experiments.quickstart                  six runs of four minutes on two cores
    python -m experiments.quickstart --budget=small   two runs of a few steps, to see that it works
"""

import sys
from typing import Any

import numpy as np

from experiments.held_out import chosen_documents, document_bits, does_not_match
from experiments.runs import Records, Run, main
from retnet_jax.config import Config
from retnet_jax.configs.quickstart import get_config
from retnet_jax.data import open_store
from retnet_jax.evaluation.compressors import compressed_bits_per_byte
from retnet_jax.evaluation.statistics import ratio_standard_error
from retnet_jax.evaluation.tables import Table, as_markdown, plus_minus
from retnet_jax.training.loop import TrainResult

BUDGETS = ("small", "2cores")
ARCHITECTURES = ("retnet", "transformer")


def runs(budget: str, records: Records) -> list[Run]:
    """Three runs of each model, by seed; one of each for the small budget."""
    found = []
    for seed in range(1 if budget == "small" else 3):
        for architecture in ARCHITECTURES:
            config = get_config(architecture)
            config.train.seed = seed
            if budget == "small":
                config.train.steps = 2 * config.optimizer.warmup_steps
            about = {"architecture": architecture, "seed": seed}
            found.append(Run(f"{architecture}_{seed}", config, about, _measure(config, budget)))
    return found


def _measure(config: Config, budget: str):
    """Measures a trained model on the held-out documents."""

    def measure(result: TrainResult) -> dict[str, Any]:
        store, length = open_store(config.data.store), config.data.sequence_length
        others = does_not_match(config.data.apart)
        parts = {
            "held_out": chosen_documents(store, others, budget),
            "apart": chosen_documents(store, lambda name: not others(name), budget),
        }
        found: dict[str, Any] = {}
        for name, chosen in parts.items():
            texts = [store.tokenizer.decode(store.held_out.document(i).tolist()) for i in chosen]
            found[name] = {
                "documents": len(chosen),
                "bytes": store.held_out.byte_counts[chosen].tolist(),
                "compressors": compressed_bits_per_byte("".join(texts).encode()),
                **document_bits(result.model, store, chosen, length),
            }
        return found

    return measure


def report(budget: str, records: Records) -> str:
    """The tables as Markdown; there is no figure."""
    return as_markdown(tables(budget, records))


def tables(budget: str, records: Records) -> list[Table]:
    """Bits per byte of each run, and the differences of the two models."""
    found = Table(
        "bits per byte",
        ("run", "window", "stateful", "std. error", "xz -9", "of xz", "window, apart", "skipped"),
    )
    for record in sorted(records.values(), key=lambda x: (x["seed"], x["name"])):
        part = record["held_out"]
        best = part[_better_protocol(part)]
        xz = part["compressors"]["xz -9"]
        found.add(
            record["name"],
            f"{part['window']['bits_per_byte']:.4f}",
            f"{part['stateful']['bits_per_byte']:.4f}" if "stateful" in part else "",
            plus_minus(best["standard_error"]),
            f"{xz:.4f}",
            f"{best['bits_per_byte'] / xz:.3f}",
            f"{record['apart']['window']['bits_per_byte']:.4f}",
            str(record["skipped_steps"]),
        )
    return [found, _differences(records)]


def _differences(records: Records) -> Table:
    """RetNet minus Transformer on the same documents, with the error over documents.

    In windows of their training lengths, and each in the better of its protocols.
    """
    table = Table(
        "RetNet minus Transformer, bits per byte",
        ("seed", "windows", "std. error", "better protocol", "std. error"),
    )
    for seed in sorted({record["seed"] for record in records.values()}):
        pair = [records.get(f"{architecture}_{seed}") for architecture in ARCHITECTURES]
        if None in pair:
            continue
        parts = [record["held_out"] for record in pair]
        byte_counts = np.array(parts[0]["bytes"])
        cells = []
        for protocols in (["window"] * 2, [_better_protocol(part) for part in parts]):
            one, other = (
                np.array(part[protocol]["bits"])
                for part, protocol in zip(parts, protocols, strict=True)
            )
            mean = (one - other).sum() / byte_counts.sum()
            error = ratio_standard_error(one - other, byte_counts)
            cells += [f"{mean:+.4f}", plus_minus(error)]
        table.add(str(seed), *cells)
    return table


def _better_protocol(part: dict[str, Any]) -> str:
    found = [name for name in ("window", "stateful") if name in part]
    return min(found, key=lambda name: part[name]["bits_per_byte"])


if __name__ == "__main__":
    main(sys.modules[__name__])
