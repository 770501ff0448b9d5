"""Estimates, tables and figures of the records of `long_context.py`."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import figures
from experiments.paired import Estimate, by_document, estimate
from experiments.runs import Records
from retnet_jax.evaluation.results import LAST_TOKENS
from retnet_jax.evaluation.tables import Table

SEEDS = (0, 1)
CONTEXTS = {"small": (128, 256, 512), "2cores": (128, 256, 512, 1024, 2048, 4096, 8192)}
FIRST_POSITIONS = (0, *(2**n for n in range(7, 16)))  # of each range of positions

LABELS = {  # of the models, by name
    "retnet_256": "RetNet, windows of 256",
    "retnet_1024": "RetNet, windows of 1,024",
    "retnet_256_in_order": "RetNet, windows of 256 in order",
    "retnet_256_carried": "RetNet, windows of 256, trained with carried state",
    "transformer_256": "Transformer, windows of 256",
    "transformer_1024": "Transformer, windows of 1,024",
}
# Perplexity of the last 128 tokens by context, arXiv 2307.08621, Table 8; 200M parameters.
PAPER = {
    "RetNet": {512: 13.09, 1024: 12.14, 2048: 11.98},
    "Transformer": {512: 13.55, 1024: 12.56, 2048: 12.35},
}
REFERENCE_CONTEXT = 512  # the paper's shortest
STYLES = {  # colour, line and marker; hollow: windows of 1,024
    "retnet_256": (figures.BLUE, "-", "o"),
    "retnet_1024": (figures.BLUE, "--", "D"),
    "retnet_256_in_order": (figures.GREY, "-", "^"),
    "retnet_256_carried": (figures.PURPLE, "-", "v"),
    "transformer_256": (figures.VERMILLION, "-", "s"),
    "transformer_1024": (figures.VERMILLION, "--", "P"),
}
FEWEST = 5  # documents of a range of positions that is drawn
_ERRORS = " (\u00b1 over documents, \u00b1 over seeds)"


def tables(budget: str, records: Records) -> list[Table]:
    """Losses by context and position, and the differences that matter."""
    return [
        _levels(budget, records),
        _changes(budget, records),
        _pairs(budget, records),
        _positions("window", "loss by position, read in windows of the training length", records),
        _positions("stateful", "loss by position, state carried from the beginning", records),
        _positions("gain", "what the carried state saves: windows minus state carried", records),
    ]


def _made(records: Records) -> list[str]:
    return [model for model in LABELS if _of_seeds(records, model)]


def _levels(budget: str, records: Records) -> Table:
    models = _made(records)
    table = Table(
        f"bits per byte of the same last {LAST_TOKENS} tokens{_ERRORS}",
        ["context", *(LABELS[model] for model in models)],
    )
    for context in CONTEXTS[budget]:
        estimates = [last_loss(records, model, context, per="byte") for model in models]
        table.add(f"{context:,}", *_cells(estimates, ".4f"))
    return table


def _changes(budget: str, records: Records) -> Table:
    """The change of a longer or shorter context, paired; the paper's as logarithms of ratios."""
    models = _made(records)
    names = [LABELS[model] for model in models]
    table = Table(
        f"nats per token minus those after {REFERENCE_CONTEXT} tokens{_ERRORS}",
        ["context", *names, *(f"{name} of the paper" for name in PAPER)],
    )
    for context in CONTEXTS[budget]:
        if context == REFERENCE_CONTEXT:
            continue
        estimates = [
            last_loss(records, model, context, other_context=REFERENCE_CONTEXT) for model in models
        ]
        paper = [
            f"{math.log(of[context] / of[REFERENCE_CONTEXT]):+.4f}" if context in of else ""
            for of in PAPER.values()
        ]
        table.add(f"{context:,}", *_cells(estimates, "+.4f"), *paper)
    return table


PAIRS = (
    ("retnet_256", "transformer_256"),
    ("retnet_1024", "transformer_1024"),
    ("retnet_1024", "retnet_256"),
    ("retnet_256_carried", "retnet_256_in_order"),
)


def _pairs(budget: str, records: Records) -> Table:
    """Differences of two models on the same tokens after the same context."""
    pairs = [pair for pair in PAIRS if set(pair) <= set(_made(records))]
    names = [f"{LABELS[one]}, minus {LABELS[other]}" for one, other in pairs]
    title = f"differences of two models, nats per token{_ERRORS}"
    table = Table(title, ["context", *names, "RetNet minus Transformer, paper"])
    for context in CONTEXTS[budget]:
        estimates = [last_loss(records, one, context, other=other) for one, other in pairs]
        of_paper = [of.get(context) for of in PAPER.values()]
        paper = f"{math.log(of_paper[0] / of_paper[1]):+.4f}" if all(of_paper) else ""
        table.add(f"{context:,}", *_cells(estimates, "+.4f"), paper)
    return table


def _positions(protocol: str, title: str, records: Records) -> Table:
    models = [x for x in _made(records) if position_loss(records, x, 0, protocol)]
    names = [LABELS[model] for model in models]
    table = Table(f"{title}, nats per token{_ERRORS}", ["positions", "documents", *names])
    counts = [(np.array(x["positions"]["tokens"]) > 0).sum(0) for x in records.values()]
    for place, first in enumerate(FIRST_POSITIONS):
        if not counts[0][place]:
            break
        last = FIRST_POSITIONS[place + 1] if first < FIRST_POSITIONS[-1] else None
        name = f"{first:,} to {last - 1:,}" if last else f"{first:,} and later"
        estimates = [position_loss(records, model, place, protocol) for model in models]
        shown = _cells(estimates, "+.4f" if protocol == "gain" else ".4f")
        table.add(name, str(counts[0][place]), *shown)
    return table


def _cells(estimates: Sequence[Estimate | None], form: str) -> list[str]:
    return ["" if value is None else value.text(form) for value in estimates]


def draw_contexts(budget: str, records: Records) -> None:
    """Bits per byte by context; and the change from a context of 512, beside the paper's."""
    pyplot = figures.start()
    size = (figures.WIDTH, 6.4)
    figure, axes = pyplot.subplots(1, 2, figsize=size, layout="constrained")
    contexts = CONTEXTS[budget]
    of_changes = contexts[1:]  # after 128 tokens all are far worse
    for number, model in enumerate(LABELS):
        if not _of_seeds(records, model):
            continue
        levels = [last_loss(records, model, x, per="byte") for x in contexts]
        changes = [
            last_loss(records, model, x, other_context=REFERENCE_CONTEXT) for x in of_changes
        ]
        aside = 2 ** (0.06 * number - 0.15)
        _line(axes[0], [aside * x for x in contexts], levels, model)
        _line(axes[1], [aside * x for x in of_changes], changes, model)
    for name, line in zip(PAPER, ("k*-", "kX--"), strict=True):
        of, label = PAPER[name], f"{name} of the paper, 200M parameters"
        changes = [math.log(x / of[REFERENCE_CONTEXT]) for x in of.values()]
        axes[1].plot(list(of), changes, line, ms=8, lw=1, label=label)
    axes[0].set_ylabel(f"bits per byte of the same last {LAST_TOKENS} tokens")
    axes[1].set_ylabel(f"nats per token, minus those after {REFERENCE_CONTEXT} tokens")
    for axis, shown in zip(axes, (contexts, of_changes), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(shown, [figures.in_thousands(x) for x in shown])
        axis.set_xlabel("tokens of context, with the scored ones")
        axis.grid(alpha=0.3)
    axes[1].axhline(0, color="black", linewidth=0.8)
    axes[0].set_title("loss by context")
    axes[1].set_title("what a longer context changes\n(below 0: it helps)")
    _legend(figure, axes[1])
    documents = len(set(next(iter(records.values()))["last"]["documents"]))
    figure.suptitle(_title(records, f"{documents} documents"), fontsize=figures.SMALL + 0.5)
    figures.save(figure, "long_context", budget)
    pyplot.close(figure)


def draw_positions(budget: str, records: Records) -> None:
    """The loss by position, and what carrying the state saves."""
    pyplot = figures.start()
    size = (figures.WIDTH, 6.4)
    figure, axes = pyplot.subplots(1, 2, figsize=size, layout="constrained")
    tokens = np.array(next(iter(records.values()))["positions"]["tokens"])
    counts = (tokens > 0).sum(0)
    places = [x for x, count in enumerate(counts) if count >= min(FEWEST, len(tokens))]
    for number, model in enumerate(LABELS):
        if not (made := _of_seeds(records, model)):
            continue
        is_retnet = "stateful" in made[0]["positions"]["nats"]
        losses = [
            position_loss(records, model, place, "stateful" if is_retnet else "window")
            for place in places
        ]
        beside = [place + 0.06 * number - 0.15 for place in places]
        _line(axes[0], beside, losses, model)
        if is_retnet:
            gains = [position_loss(records, model, place, "gain") for place in places]
            _line(axes[1], beside, gains, model)
    names = [f"{figures.in_thousands(FIRST_POSITIONS[x])}\n{counts[x]}" for x in places]
    for axis in axes:
        axis.set_xticks(places, names)
        axis.set_xlabel("positions from (number of documents below)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("nats per token")
    axes[1].set_ylabel("windows minus state carried, nats per token")
    axes[1].axhline(0, color="black", linewidth=0.8)
    axes[0].set_title(
        "loss by position in the document:\nRetNets carry their state, "
        "Transformers read\nwindows of their training length"
    )
    axes[1].set_title(
        "what a RetNet's state from the beginning of\nthe document saves, beside windows of\n"
        "the training length (above 0: it helps)"
    )
    _legend(figure, axes[0])
    figure.suptitle(_title(records, f"{len(tokens)} documents"), fontsize=figures.SMALL + 0.5)
    figures.save(figure, "loss_by_position", budget)
    pyplot.close(figure)


def _line(axis, x, estimates: Sequence[Estimate | None], model: str) -> None:
    """One model's line; the models' bars stand side by side."""
    there = [i for i, value in enumerate(estimates) if value is not None]
    values = [value for value in estimates if value is not None]
    colour, style, marker = STYLES[model]
    axis.errorbar(
        [x[i] for i in there],
        [value.mean for value in values],
        yerr=[value.shown_error for value in values],
        fmt=marker,
        linestyle=style,
        color=colour,
        markerfacecolor="white" if model.endswith("_1024") else colour,
        markersize=5,
        elinewidth=1,
        capsize=2,
        label=LABELS[model],
    )


def _legend(figure, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)


def _title(records: Records, documents: str) -> str:
    some = next(iter(records.values()))
    counts = {len(_of_seeds(records, model)) for model in _made(records)}
    seeds = " or ".join(map(str, sorted(counts)))
    return (
        f"{some['parameters'] / 1e6:.1f} million parameters, {some['tokens'] / 1e6:.1f} million "
        f"tokens, {documents}; bars: a standard error over documents and {seeds} seeds.\n"
        "All models read the same documents, which are easy or hard for all alike: on the left "
        "their differences\nare surer than the bars suggest. Points of one place are shifted "
        "sideways, so that bars can be seen"
    )


def _of_seeds(records: Records, model: str) -> list[dict[str, Any]]:
    found = [records.get(f"{model}_{seed}") for seed in SEEDS]
    return [record for record in found if record]


def last_loss(
    records: Records,
    model: str,
    context: int,
    *,
    other: str | None = None,
    other_context: int | None = None,
    per: str = "token",
) -> Estimate | None:
    """The loss on the last 128 tokens, or its difference from another model's or context's.

    Args:
      records: Records of the runs.
      model: Name of the model.
      context: Tokens of context.
      other: Model whose loss after the same context is subtracted.
      other_context: Context after which the loss of the same model is subtracted.
      per: Unit: "token" for nats per token, "byte" for bits per byte.

    Returns:
      The estimate over the documents and the seeds that there are; None if there are none.
    """
    amounts = []
    for record in _of_seeds(records, model):
        last = record["last"]
        nats = np.array(last["nats"][str(context)])
        if other is not None:
            if f"{other}_{record['seed']}" not in records:
                continue
            nats = nats - records[f"{other}_{record['seed']}"]["last"]["nats"][str(context)]
        if other_context is not None:
            nats = nats - last["nats"][str(other_context)]
        amounts.append(by_document(nats, last["documents"]))
    if not amounts:
        return None
    last = _of_seeds(records, model)[0]["last"]
    sizes = [LAST_TOKENS] * len(last["documents"]) if per == "token" else last["bytes"]
    unit = 1 if per == "token" else math.log(2)
    return estimate(np.array(amounts) / unit, by_document(sizes, last["documents"]))


def position_loss(records: Records, model: str, place: int, protocol: str) -> Estimate | None:
    """The loss in a range of positions in nats per token, over the documents that reach it.

    The protocol "gain" is that of windows minus stateful: what a state carried from the beginning
    of the document saves, on the same tokens.
    """
    amounts = []
    for record in _of_seeds(records, model):
        nats = record["positions"]["nats"]
        if protocol == "gain" and "stateful" in nats:
            amounts.append(np.subtract(nats["window"], nats["stateful"]))
        elif protocol in nats:
            amounts.append(np.array(nats[protocol]))
    if not amounts:
        return None
    tokens = np.array(_of_seeds(records, model)[0]["positions"]["tokens"])[:, place]
    reached = tokens > 0
    if not reached.any():
        return None
    return estimate(np.array(amounts)[:, reached, place], tokens[reached])
