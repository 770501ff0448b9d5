"""Which models use a long context, and how far beyond their training? The paper's Table 8, further.

The same last 128 tokens are scored after contexts of 128 to 8,192 tokens, in 44 pieces of 8,192
tokens of the 26 held-out documents that are longer. The loss by position in these documents, up to
47,000 tokens, says how long a carried state still helps. Models of the quickstart's size, each
with two seeds and the quickstart's 1,500 steps of 2,048 tokens of the standard library:

    retnet_256, retnet_1024             RetNets trained in windows of 256 and 1,024 tokens
    retnet_256_in_order                 each row of the batch reads the windows of a text in order
    retnet_256_carried                  the same, beginning with the state of the window before
    transformer_256, transformer_1024   Transformers with rotation, which no context beyond their
                                        windows was seen with

A carried state needs windows in order, which by itself makes batches less diverse. So in_order is
the control of carried. All have the quickstart's rates, which were chosen with windows of 128
tokens for the RetNet. The paper's numbers are perplexities at 200M parameters.

    python -m experiments.long_context                  12 runs of 8 to 10 minutes on one core
    python -m experiments.long_context --budget=small   two runs of a few steps, as a test

Two processes with one core each, `taskset -c 0` and `taskset -c 1` before the command, share the
runs.
"""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.held_out import bytes_of, chosen_documents, does_not_match
from experiments.long_context_report import (
    CONTEXTS,
    FIRST_POSITIONS,
    SEEDS,
    draw_contexts,
    draw_positions,
    tables,
)
from experiments.recipe import with_options
from experiments.runs import Records, Run, main
from retnet_jax.config import Config
from retnet_jax.configs.quickstart import get_config
from retnet_jax.data import open_store
from retnet_jax.data.token_store import TokenStore
from retnet_jax.evaluation.perplexity import last_tokens_nll, stateful_nll, window_nll
from retnet_jax.evaluation.results import LAST_TOKENS
from retnet_jax.evaluation.tables import as_markdown
from retnet_jax.model import LanguageModel
from retnet_jax.training.loop import TrainResult

BUDGETS = ("small", "2cores")

_256 = {"data.sequence_length": 256, "train.batch_size": 8}
_1024 = {"data.sequence_length": 1024, "train.batch_size": 2}
_IN_ORDER = _256 | {"data.windows": "contiguous"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "retnet_256": ("retnet", _256),
    "retnet_1024": ("retnet", _1024),
    "retnet_256_in_order": ("retnet", _IN_ORDER),
    "retnet_256_carried": ("retnet", _IN_ORDER | {"train.carry_state": True}),
    "transformer_256": ("transformer", _256),
    "transformer_1024": ("transformer", _1024),
}


def runs(budget: str, records: Records) -> list[Run]:
    """A run of each model and seed; the small budget has one RetNet and one Transformer."""
    if budget == "small":
        return [_run(name, 0, budget) for name in ("retnet_256_carried", "transformer_256")]
    return [_run(name, seed, budget) for seed in SEEDS for name in MODELS]


def _run(name: str, seed: int, budget: str) -> Run:
    architecture, options = MODELS[name]
    config = with_options(get_config(architecture), options | {"train.seed": seed})
    config.train.eval_every, config.train.eval_batches = 10_000, 1  # `_measure` evaluates
    if budget == "small":
        config.train.steps, config.optimizer.warmup_steps = 10, 2
    about = {"model": name, "seed": seed}
    return Run(f"{name}_{seed}", config, about, _measure(config, budget))


def _measure(config: Config, budget: str):
    """Measures a trained model on the long held-out documents."""

    def measure(result: TrainResult) -> dict[str, Any]:
        store, contexts = open_store(config.data.store), CONTEXTS[budget]
        lengths = store.held_out.lengths
        chosen = chosen_documents(store, does_not_match(config.data.apart))
        chosen = [i for i in chosen if lengths[i] > max(contexts)]
        if budget == "small":
            chosen = chosen[:2]
        length = config.data.sequence_length
        found = {"last": last_losses(result.model, store, chosen, contexts)}
        return found | {"positions": losses_by_position(result.model, store, chosen, length)}

    return measure


def last_losses(
    model: LanguageModel, store: TokenStore, chosen: Sequence[int], contexts: Sequence[int]
) -> dict[str, Any]:
    """The loss on the last 128 tokens of pieces of documents, after contexts of several lengths.

    The pieces are as long as the longest context and do not overlap; what is left at the end of a
    document is not used.

    Returns:
      Of each piece the number of its document and the number of bytes of the last 128 tokens; and
      by context length their -log p, in nats.
    """
    longest = max(contexts)
    pieces, owners = [], []
    for i in chosen:
        document = store.held_out.document(i)
        for start in range(0, len(document) - longest, longest):
            pieces.append(document[start : start + longest + 1])
            owners.append(i)
    nll = last_tokens_nll(model, pieces, contexts, scored=LAST_TOKENS, batch_size=8)
    return {
        "documents": owners,
        "bytes": [bytes_of(store, piece[-LAST_TOKENS:]) for piece in pieces],
        "nats": {str(length): np.round(of_length, 3).tolist() for length, of_length in nll.items()},
    }


def losses_by_position(
    model: LanguageModel, store: TokenStore, chosen: Sequence[int], window_length: int
) -> dict[str, Any]:
    """The loss of each document by range of positions, in windows; of a RetNet also stateful.

    Returns:
      The number of tokens [documents, ranges], and by protocol their -log p in nats.
    """
    documents = [store.held_out.document(i) for i in chosen]
    nll = {"window": window_nll(model, documents, window_length=window_length, batch_size=32)}
    if model.config.mixer == "retention":
        nll["stateful"] = stateful_nll(model, documents, batch_size=8)
    tokens = [sums_by_position(np.ones(len(document) - 1)) for document in documents]
    found = {name: [sums_by_position(x).round(3).tolist() for x in of] for name, of in nll.items()}
    return {"tokens": np.array(tokens, int).tolist(), "nats": found}


def sums_by_position(values: np.ndarray) -> np.ndarray:
    """The sums of one document's values over the ranges that begin at FIRST_POSITIONS."""
    ends = (*FIRST_POSITIONS[1:], len(values))
    parts = zip(FIRST_POSITIONS, ends, strict=True)
    return np.array([values[first:end].sum(dtype=np.float64) for first, end in parts])


def report(budget: str, records: Records) -> str:
    """Draws the figures; returns the tables as Markdown."""
    draw_contexts(budget, records)
    draw_positions(budget, records)
    return as_markdown(tables(budget, records))


if __name__ == "__main__":
    main(sys.modules[__name__])
