"""What does each part of a RetNet contribute? The paper's Table 6, at one million parameters.

A part is taken out of the quickstart's RetNet, and of the paper's RetNet at the same width, depth
and number of heads. Each is trained with three seeds on 450 steps of 2,048 tokens of the standard
library. All runs of a seed read the same tokens in the same order, and all are evaluated on the
first 1,024 tokens of the same 178 held-out documents, so differences are paired. The paper's are of
perplexity on its own text, at 200M parameters and 5B tokens; a difference of the logarithm of a
perplexity is one of nats per token.

    python -m experiments.ablations                  63 runs of 2 to 4 minutes on one core
    python -m experiments.ablations --budget=small   two runs of a few steps, to see that it works

Two processes with one core each, `taskset -c 0` and `taskset -c 1` before the command, share the
runs. What this compares, and what not:

- The rates are the quickstart's. They were chosen for its RetNet; a variation might do better with
  others. So the paper's five are also made once with half of all rates. The paper's RetNet has the
  best of three rates of the embedding, by a seed and by validation documents of their own.
- The paper's row normaliser depends only on the position, and the norm of the heads that follows
  divides by whatever it multiplies with: without it almost nothing can change, unless the norm is
  taken out as well, so both are tried. The paper's other normaliser, of the scores, needs all
  scores of a row. Only the parallel form could have it, so it is not here.
- Fewer parameters are not made up for elsewhere. The table has their number.
"""

import math
import re
import sys
from typing import Any

import numpy as np

from experiments import figures
from experiments.held_out import beginnings, best_bits_per_byte, chosen_documents, document_bits
from experiments.paired import Estimate, estimate
from experiments.recipe import HELD_OUT, QUICKSTART_HELD_OUT, with_options
from experiments.runs import Records, Run, main
from retnet_jax.config import Config
from retnet_jax.configs.quickstart import GENERATED, get_config
from retnet_jax.data import open_store
from retnet_jax.data.split import hash_of_name
from retnet_jax.evaluation.tables import Table, as_markdown
from retnet_jax.training.loop import TrainResult

BUDGETS = ("small", "2cores")
SEEDS = (0, 1, 2)
STEPS = {"small": 10, "2cores": 450}
LONGEST = 1024  # tokens that are read of each document
PROTOCOLS = {
    "window": "windows of 128 tokens, as in training",
    "stateful": "the first 1,024 tokens of documents, state carried",
}

# What is changed, by the name of the variation, and how tables and figures call it.
VARIATIONS: dict[str, dict[str, Any]] = {
    "base": {},
    "no_gate": {"model.output_gate": False},
    "no_head_norm": {"model.head_norm": False, "model.head_norm_epsilon": None},
    "gamma_1": {"model.decay": "none"},
    "one_gamma": {"model.decay_range": (1 / 128, 1 / 128)},
    "narrow_heads": {"model.n_heads": 16},
    "no_row_normalizer": {"model.row_normalizer": False},
    "no_normalizers": {
        "model.head_norm": False,
        "model.head_norm_epsilon": None,
        "model.row_normalizer": False,
    },
    "no_conv": {"model.short_conv": None},
    "paper_decays": {"model.decay_range": (1 / 32, 1 / 512)},
    "rope": {"model.rotation": "rope"},
    "no_relu": {"model.feature_map": None},
}
LABELS = {
    "base": "base",
    "no_gate": "no swish gate",
    "no_head_norm": "no norm of the heads",
    "gamma_1": "gamma = 1",
    "one_gamma": "gamma = 127/128 in all heads",
    "narrow_heads": "heads of a quarter of the width",
    "no_row_normalizer": "no row normaliser",
    "no_normalizers": "neither norm nor row normaliser",
    "no_conv": "no short convolutions",
    "paper_decays": "1 - gamma of 1/32 to 1/512",
    "rope": "rotation (RoPE)",
    "no_relu": "no relu of queries and keys",
}
# In-domain perplexities of arXiv 2307.08621, Table 6; 200M parameters.
PAPER = {
    "base": 26.05,
    "no_gate": 27.84,
    "no_head_norm": 27.54,
    "gamma_1": 27.86,
    "one_gamma": 27.02,
    "narrow_heads": 27.68,
}
OF_PAPERS_RETNET = tuple(PAPER)
PAPER_RETNET: dict[str, Any] = {
    "model.key_dim": None,
    "model.short_conv": None,
    "model.feature_map": None,
    "model.rotation": "rope",
    "model.head_norm_epsilon": None,
    "model.decay_range": (1 / 32, 1 / 512),
}
# Rates of the embedding that are tried for the paper's RetNet, with a seed of their own.
RATES, SEED_OF_RATES = (0.01, 0.02, 0.04), 100
BASES = {
    "quickstart": "the quickstart's RetNet",
    "paper": "the paper's RetNet, trained here",
    "half": "the quickstart's RetNet, half of all rates (one seed, errors over documents)",
}


def base(budget: str) -> Config:
    """The quickstart's RetNet, trained on all but its held-out and the validation documents."""
    config = get_config("retnet")
    config.data.store, config.data.held_out = "data/stdlib_bpe4096_search", HELD_OUT
    config.train.steps = STEPS[budget]
    config.train.eval_every, config.train.eval_batches = 10_000, 1  # `_measure` evaluates
    if budget == "small":
        config.optimizer.warmup_steps = 2
    return config


def runs(budget: str, records: Records) -> list[Run]:
    """The runs of all variations; those of the paper's RetNet once its rate is chosen."""
    if budget == "small":
        return [_run("quickstart", {}, name, 0, budget) for name in ("base", "no_gate")]
    found = [_rate_run(rate, budget) for rate in RATES]
    of_rates = [records.get(run.name) for run in found]
    for seed in SEEDS:
        found += [_run("quickstart", {}, name, seed, budget) for name in VARIATIONS]
    if None not in of_rates:
        scores = [best_bits_per_byte(record["validation"]) for record in of_rates if record]
        options = PAPER_RETNET | {"optimizer.learning_rate": RATES[int(np.argmin(scores))]}
        for seed in SEEDS:
            found += [_run("paper", options, name, seed, budget) for name in OF_PAPERS_RETNET]
    rates = base(budget).optimizer
    half = {
        "optimizer.learning_rate": rates.learning_rate / 2,
        "optimizer.muon_learning_rate": rates.muon_learning_rate / 2,
    }
    return found + [_run("half", half, name, 0, budget) for name in OF_PAPERS_RETNET]


def _run(of_base: str, options: dict[str, Any], variation: str, seed: int, budget: str) -> Run:
    config = with_options(base(budget), options | VARIATIONS[variation] | {"train.seed": seed})
    about = {"base": of_base, "variation": variation, "seed": seed}
    return Run(f"{of_base}_{variation}_{seed}", config, about, _measure(config, budget))


def _rate_run(rate: float, budget: str) -> Run:
    options = PAPER_RETNET | {"optimizer.learning_rate": rate, "train.seed": SEED_OF_RATES}
    config = with_options(base(budget), options)
    about = {"base": "paper", "variation": "rate", "rate": rate, "seed": SEED_OF_RATES}
    return Run(f"paper_rate_{rate}", config, about, _measure(config, budget, validation=True))


def _measure(config: Config, budget: str, validation: bool = False):
    """Measures a trained model on held-out documents, or on validation documents."""

    def use(name: str) -> bool:
        is_validation = hash_of_name(name) >= QUICKSTART_HELD_OUT
        return is_validation == validation and not re.search(GENERATED, name)

    def measure(result: TrainResult) -> dict[str, Any]:
        store, length = open_store(config.data.store), config.data.sequence_length
        chosen = chosen_documents(store, use, budget)
        documents, byte_counts = beginnings(store, chosen, LONGEST)
        found = document_bits(result.model, store, chosen, length, LONGEST)
        if validation:
            for of_protocol in found.values():
                del of_protocol["bits"]
            return {"validation": found}
        tokens = [len(document) - 1 for document in documents]
        return {"held_out": {"bytes": byte_counts.tolist(), "tokens": tokens, **found}}

    return measure


def difference(records: Records, of_base: str, variation: str, protocol: str) -> Estimate | None:
    """A variation minus its base in nats per token, over the seeds that both have; None: none."""
    pairs = [
        (one["held_out"], other["held_out"])
        for seed in SEEDS
        if (one := records.get(f"{of_base}_{variation}_{seed}"))
        and (other := records.get(f"{of_base}_base_{seed}"))
    ]
    if not pairs:
        return None
    bits = [np.subtract(x[protocol]["bits"], y[protocol]["bits"]) for x, y in pairs]
    return estimate(np.array(bits) * math.log(2), pairs[0][0]["tokens"])


def of_paper(variation: str) -> float | None:
    """The paper's difference in nats per token."""
    return math.log(PAPER[variation] / PAPER["base"]) if variation in PAPER else None


def report(budget: str, records: Records) -> str:
    """Draws the figure; returns the tables as Markdown."""
    draw(budget, records)
    return as_markdown(tables(budget, records))


def tables(budget: str, records: Records) -> list[Table]:
    """The differences of each variation, seed by seed and with their errors, and the bases."""
    differences = [_differences(of_base, records) for of_base in BASES]
    return [_seed_by_seed(records), *differences, _bases(records)]


def _seed_by_seed(records: Records) -> Table:
    """The differences of all bases side by side, with that of each seed."""
    table = Table(
        "nats a token minus the base, in windows, and of each seed",
        [
            *("change", "the quickstart's RetNet", "the paper's, trained here"),
            *("the quickstart's, half of all rates, one seed", "paper, 200M"),
        ],
    )
    for variation in VARIATIONS:
        found = [difference(records, of_base, variation, "window") for of_base in BASES]
        if variation != "base" and any(found):
            paper = of_paper(variation)
            cells = [_with_seeds(x) if x else "" for x in found]
            table.add(LABELS[variation], *cells, f"{paper:+.3f}" if paper is not None else "")
    return table


def _with_seeds(found: Estimate) -> str:
    if len(found.each) == 1:
        return f"{found.mean:+.3f}"
    return f"{found.mean:+.3f} ({', '.join(f'{x:+.2f}' for x in found.each)})"


def _bases(records: Records) -> Table:
    table = Table("bases", ("run", "nats/token", "bits/byte", "state carried", "rate", "skipped"))
    for record in records.values():
        if record["variation"] not in ("base", "rate"):
            continue
        found = record["held_out" if "held_out" in record else "validation"]
        rate = record["options"]["optimizer.learning_rate"]
        table.add(
            record["name"] + ("" if "held_out" in record else ", on validation documents"),
            f"{found['window']['nll_per_token']:.4f}",
            f"{found['window']['bits_per_byte']:.4f}",
            f"{found['stateful']['bits_per_byte']:.4f}",
            f"{rate:g}",
            str(record["skipped_steps"]),
        )
    return table


def _differences(of_base: str, records: Records) -> Table:
    """Differences in nats per token by both protocols; those in bits per byte are of windows."""
    columns = [
        "minus the base",
        "parameters",
        "skipped",
        "bits/byte",
        "nats/token",
        "state carried",
    ]
    title = f"{BASES[of_base]}: differences, \u00b1 over documents, \u00b1 over seeds"
    table = Table(title, [*columns, "paper, nats/token"])
    for variation in VARIATIONS:
        made = [records.get(f"{of_base}_{variation}_{seed}") for seed in SEEDS]
        made = [record for record in made if record]
        estimates = [difference(records, of_base, variation, x) for x in PROTOCOLS]
        window, stateful = estimates
        if variation == "base" or window is None or stateful is None:
            continue
        held_out, paper = made[0]["held_out"], of_paper(variation)
        per_byte = sum(held_out["tokens"]) / sum(held_out["bytes"]) / math.log(2)
        table.add(
            LABELS[variation],
            f"{made[0]['parameters']:,}",
            str(sum(record["skipped_steps"] for record in made)),
            f"{window.mean * per_byte:+.4f}",
            window.text("+.4f"),
            stateful.text("+.4f"),
            f"{paper:+.4f}" if paper is not None else "",
        )
    return table


_APART = 0.24  # rows between the markers of one variation
_ABOVE = 0.1  # rows between a bar and the dots of its seeds
STYLES = {  # colour, marker, and whether it is filled
    "quickstart": (figures.BLUE, "o", "full"),
    "paper": (figures.SKY, "s", "full"),
    "half": (figures.BLUE, "^", "none"),
}
BEYOND = 0.35  # nats per token; larger differences are written beside an arrow


def draw(budget: str, records: Records) -> None:
    """A forest plot: one row for each variation, with the paper's difference beside ours."""
    pyplot = figures.start()
    shown = [name for name in VARIATIONS if name != "base"]
    size = (figures.WIDTH, 8.4)
    figure, axes = pyplot.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for axis, (protocol, title) in zip(axes, PROTOCOLS.items(), strict=True):
        for number, of_base in enumerate(BASES):
            found = {row: difference(records, of_base, x, protocol) for row, x in enumerate(shown)}
            _series(axis, found, number, of_base)
        if protocol == "window":
            paper = {row: x for row, name in enumerate(shown) if (x := of_paper(name)) is not None}
            label = "the paper, 200M parameters (no errors given)"
            above = [row - _APART for row in paper]
            axis.plot(list(paper.values()), above, "kD", ms=5, label=label)
        axis.axvline(0, color="black", linewidth=0.8)
        for row in range(1, len(shown)):
            axis.axhline(row - 0.4, color="0.9", linewidth=0.8)
        axis.set_xlim(-BEYOND, BEYOND)
        axis.set_title(title.replace(", ", ",\n"))
        axis.set_xlabel("loss minus that of the base,\nnats per token (right: worse)")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(shown)), [LABELS[name] for name in shown])
    axes[0].set_ylim(len(shown) - 0.35, -0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1)
    some = next(iter(records.values()))
    seeds = len({record["seed"] for record in records.values() if "held_out" in record})
    figure.suptitle(
        f"What a part of a RetNet contributes: 0.9 to 1.1 million parameters, "
        f"{some['tokens'] / 1e6:.1f} million tokens\n"
        f"bars: two standard errors over documents and seeds; dots above them: each of {seeds} "
        "seeds; arrows: beyond the axis",
        fontsize=figures.SMALL + 0.5,
    )
    figures.save(figure, "ablations", budget)
    pyplot.close(figure)


def _series(axis, found: dict[int, Estimate | None], number: int, of_base: str) -> None:
    """The differences of one base by row, a little below those of the base before."""
    place = _APART * number
    colour, marker, fill = STYLES[of_base]
    look = {"color": colour, "marker": marker, "fillstyle": fill, "markersize": 6}
    axis.errorbar([], [], xerr=[], linestyle="none", capsize=2.5, label=BASES[of_base], **look)
    for row, value in found.items():
        if value is None:
            continue
        if abs(value.mean) > BEYOND:
            right = value.mean > 0
            text = f"{value.mean:+.2f} \u2192" if right else f"\u2190 {value.mean:+.2f}"
            edge, side = (BEYOND, "right") if right else (-BEYOND, "left")
            axis.text(edge, row + place, text, color=colour, ha=side, va="center", weight="bold")
            continue
        error = 2 * value.shown_error
        axis.errorbar(value.mean, row + place, xerr=error, capsize=2.5, **look)
        if len(value.each) > 1:
            above = [row + place - _ABOVE] * len(value.each)
            axis.plot(value.each, above, ".", color=colour, ms=5, markeredgewidth=0)


if __name__ == "__main__":
    main(sys.modules[__name__])
