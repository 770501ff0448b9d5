"""What a trained model makes of its context: loss by class of token, distance and position; recall.

`measure` is made when a run has ended. `while_training` is an evaluator for the course of it, which
shows when a model begins to copy.
"""

import functools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.held_out import bits_record, chosen_documents
from experiments.recipe import QUICKSTART_HELD_OUT
from experiments.token_classes import (
    CLASSES,
    RARE,
    common_pairs,
    context_starts,
    repeats,
    token_classes,
)
from retnet_jax.config import Config, ModelConfig
from retnet_jax.configs.quickstart import GENERATED
from retnet_jax.data import open_store
from retnet_jax.data.split import hash_of_name
from retnet_jax.data.token_store import TokenStore
from retnet_jax.evaluation.perplexity import stateful_nll, window_nll
from retnet_jax.evaluation.recall_probes import recall
from retnet_jax.evaluation.statistics import position_buckets, ratio_standard_error
from retnet_jax.model import LanguageModel
from retnet_jax.training.loop import Evaluator, TrainResult

CONTEXT = 256  # the classes of tokens are those in windows of this length, for all models
SHORTEST = 16  # positions, or tokens of distance, in the first bucket; each later one is as long as
# all before it together
DISTANCES = (16, 64, 128, 256, 512)  # of the synthetic probes
TRIALS = 64
# Of the evaluator during training: the first tokens of some validation documents, and a probe.
WATCHED_DOCUMENTS, WATCHED_TOKENS = 16, 1024
WATCHED_DISTANCE, WATCHED_TRIALS = 32, 32

Nll = list[np.ndarray]  # -log p of each document's tokens, in nats


def is_reported(name: str) -> bool:
    """Whether a held-out document is one that results are reported on."""
    return hash_of_name(name) < QUICKSTART_HELD_OUT and not re.search(GENERATED, name)


def is_validation(name: str) -> bool:
    """Whether a held-out document is one that choices are made on."""
    return hash_of_name(name) >= QUICKSTART_HELD_OUT and not re.search(GENERATED, name)


def measure(config: Config, budget: str) -> Callable[[TrainResult], dict[str, Any]]:
    """The function that measures a trained model, for its record.

    The record has: validation, the bits per byte of validation documents in windows; held_out, the
    bits per byte and the bits of each reported document, by protocol; and classes, distances,
    positions and recall.
    """
    length = config.data.sequence_length

    def of_result(result: TrainResult) -> dict[str, Any]:
        began = time.monotonic()
        store = open_store(config.data.store)
        chosen = chosen_documents(store, is_validation, budget)
        documents, byte_counts = _documents(store, chosen), store.held_out.byte_counts[chosen]
        nll = window_nll(result.model, documents, window_length=length, batch_size=32)
        record: dict[str, Any] = {"validation": bits_record(nll, byte_counts)["bits_per_byte"]}
        filler = np.concatenate([x[1:] for x in documents])

        chosen = chosen_documents(store, is_reported, budget)
        documents, byte_counts = _documents(store, chosen), store.held_out.byte_counts[chosen]
        window, longer = nll_by_protocol(result.model, documents, length)
        record["held_out"] = {
            "bytes": byte_counts.tolist(),
            "window": bits_record(window, byte_counts),
            "longer": bits_record(longer, byte_counts),
        }
        common = common_pairs(config.data.store)
        record["classes"] = loss_by_class(documents, window, common)
        record["distances"] = loss_by_distance(documents, longer, common)
        record["positions"] = _positions(longer)
        record["recall"] = _recall(result.model, store, filler, budget)
        return record | {"measuring_seconds": round(time.monotonic() - began, 1)}

    return of_result


def nll_by_protocol(
    model: LanguageModel, documents: Sequence[np.ndarray], length: int
) -> tuple[Nll, Nll]:
    """The -log p in windows, and with more of each document before its tokens ("longer").

    A model whose state has a fixed size reads documents from their beginning. A model with
    attention to all tokens fails beyond the windows that it was trained on. It reads windows that
    overlap by half, so that every token after the first window has at least half of one before it.
    """
    read = functools.partial(window_nll, model, documents, window_length=length, batch_size=32)
    if has_fixed_state(model.config):
        return read(), stateful_nll(model, documents, batch_size=16)
    return read(), read(stride=length // 2)


def has_fixed_state(config: ModelConfig) -> bool:
    """Whether the state does not grow with the number of tokens."""
    return config.mixer == "retention" and all(x.window for x in config.attention_layers)


def loss_by_class(documents: Sequence[np.ndarray], nll: Nll, common: np.ndarray) -> dict[str, Any]:
    """The loss by class of token; what is in a token's context is what a window of CONTEXT shows.

    Args:
      documents: Token ids of each document, BOS first.
      nll: -log p of each document's tokens.
      common: From `common_pairs`.

    Returns:
      For each class its number of tokens, and its bits in each document.
    """
    classes = [
        token_classes(document, context_starts(len(document) - 1, CONTEXT), common)
        for document in documents
    ]
    found = {}
    for number, name in enumerate(CLASSES):
        here = [of_document == number for of_document in classes]
        bits = [losses[x].sum(dtype=np.float64) for losses, x in zip(nll, here, strict=True)]
        found[name] = {
            "tokens": int(sum(x.sum() for x in here)),
            "bits": [round(x / math.log(2), 1) for x in map(float, bits)],
        }
    return found


def loss_by_distance(
    documents: Sequence[np.ndarray], nll: Nll, common: np.ndarray
) -> list[dict[str, Any]]:
    """The loss on rare pairs that occurred before in the document, by distance.

    Returns:
      For each bucket of distances first to last: bits per token, its standard_error over documents,
      and the number of tokens.
    """
    found, least = [], 1
    distances = []
    for document in documents:
        whole = np.zeros(len(document) - 1, np.int64)
        is_rare = token_classes(document, whole, common) == RARE
        distances.append(np.where(is_rare, repeats(document).distance(), 0))
    longest = max((int(x.max(initial=0)) for x in distances), default=0)
    while least <= longest:
        most = max(SHORTEST, 2 * (least - 1))
        here = [(least <= x) & (x <= most) for x in distances]
        bits = np.array([x[i].sum(dtype=np.float64) for x, i in zip(nll, here, strict=True)])
        tokens = np.array([i.sum() for i in here])
        if tokens.sum():
            found.append(
                {
                    "first": least,
                    "last": most,
                    "bits_per_token": round(float(bits.sum() / tokens.sum()) / math.log(2), 4),
                    "standard_error": round(ratio_standard_error(bits, tokens) / math.log(2), 4),
                    "tokens": int(tokens.sum()),
                }
            )
        least = most + 1
    return found


def while_training(config: Config, every: int) -> Evaluator:
    """The loss by class on validation documents, and copying, during training."""

    @functools.cache
    def read() -> tuple[TokenStore, list[np.ndarray]]:
        store = open_store(config.data.store)
        chosen = chosen_documents(store, is_validation)[:WATCHED_DOCUMENTS]
        return store, [x[: WATCHED_TOKENS + 1] for x in _documents(store, chosen)]

    def function(model: LanguageModel) -> Mapping[str, float]:
        store, documents = read()
        length = config.data.sequence_length
        nll = window_nll(model, documents, window_length=length, batch_size=32)
        of_class = loss_by_class(documents, nll, common_pairs(config.data.store))
        found = {name: sum(x["bits"]) / x["tokens"] for name, x in of_class.items() if x["tokens"]}
        probes = recall(
            model,
            np.concatenate([x[1:] for x in documents]),
            bos_id=store.tokenizer.bos_id,
            distances=[WATCHED_DISTANCE],
            trials=WATCHED_TRIALS,
            batch_size=32,
        )
        for probe in probes:
            found |= {probe.probe: probe.accuracy, f"{probe.probe} nll": probe.nll_per_token}
        return found

    return Evaluator("use of context", every, function)


def _documents(store: TokenStore, chosen: Sequence[int]) -> list[np.ndarray]:
    return [store.held_out.document(i) for i in chosen]


def _positions(nll: Nll) -> list[dict[str, Any]]:
    return [
        {
            "first": bucket.first,
            "last": bucket.last,
            "bits_per_token": round(bucket.nll_per_token / math.log(2), 4),
            "standard_error": round(bucket.standard_error / math.log(2), 4),
            "tokens": bucket.tokens,
        }
        for bucket in position_buckets(nll, SHORTEST)
    ]


def _recall(
    model: LanguageModel, store: TokenStore, filler: np.ndarray, budget: str
) -> list[dict[str, Any]]:
    is_small = budget == "small"
    found = recall(
        model,
        filler,
        bos_id=store.tokenizer.bos_id,
        distances=DISTANCES[:1] if is_small else DISTANCES,
        trials=4 if is_small else TRIALS,
        batch_size=32,
    )
    return [
        {
            "probe": x.probe,
            "distance": x.distance,
            "accuracy": x.accuracy,
            "standard_error": round(x.standard_error, 4),
            "nll_per_token": round(x.nll_per_token, 4),
            "random": x.random,
        }
        for x in found
    ]
