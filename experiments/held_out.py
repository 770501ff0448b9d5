"""Bits of held-out documents under a trained model."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from retnet_jax.data.token_store import TokenStore
from retnet_jax.evaluation.perplexity import stateful_nll, window_nll
from retnet_jax.evaluation.statistics import ratio_standard_error, sums
from retnet_jax.model import LanguageModel

SMALL = 8  # documents that the runs of a small budget are evaluated on


def chosen_documents(store: TokenStore, use: Callable[[str], bool], budget: str = "") -> list[int]:
    """The indices of the held-out documents whose names are used; few of them in budget "small"."""
    found = [i for i, name in enumerate(store.held_out.names) if use(name)]
    return found[:SMALL] if budget == "small" else found


def document_bits(
    model: LanguageModel,
    store: TokenStore,
    chosen: Sequence[int],
    window_length: int,
    longest: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Bits per byte of held-out documents by each protocol, as a record.

    A Transformer is evaluated in windows of its training length; a RetNet also reads each document
    from its beginning ("stateful").

    Args:
      model: Model to evaluate.
      store: Store with the documents.
      chosen: Indices of the held-out documents.
      window_length: Tokens in a window.
      longest: Number of tokens that are read of each document; None: all.

    Returns:
      For each protocol: bits_per_byte, its standard_error over documents, nll_per_token in nats,
      and the bits of each document.
    """
    documents, byte_counts = beginnings(store, chosen, longest)
    nll = {"window": window_nll(model, documents, window_length=window_length, batch_size=32)}
    if model.config.mixer == "retention":
        nll["stateful"] = stateful_nll(model, documents, batch_size=16)
    return {protocol: bits_record(found, byte_counts) for protocol, found in nll.items()}


def beginnings(
    store: TokenStore, chosen: Sequence[int], longest: int | None
) -> tuple[list[np.ndarray], np.ndarray]:
    """The first tokens of held-out documents, BOS before them, and their numbers of bytes."""
    documents = [store.held_out.document(i) for i in chosen]
    byte_counts = store.held_out.byte_counts[chosen]
    for number, document in enumerate(documents):
        if longest is not None and len(document) > longest + 1:
            documents[number] = document[: longest + 1]
            byte_counts[number] = bytes_of(store, document[1 : longest + 1])
    return documents, byte_counts


def bytes_of(store: TokenStore, tokens: np.ndarray) -> int:
    """The number of UTF-8 bytes of tokens; a character that is cut in two counts as three."""
    return len(store.tokenizer.decode(tokens.tolist()).encode())


def bits_record(nll: Sequence[np.ndarray], byte_counts: np.ndarray) -> dict[str, Any]:
    """The record of one protocol, as `document_bits` returns it.

    Args:
      nll: -log p of each document's tokens, in nats.
      byte_counts: Bytes of each document.
    """
    bits = sums(nll) / math.log(2)
    return {
        "bits_per_byte": float(bits.sum() / byte_counts.sum()),
        "standard_error": ratio_standard_error(bits, byte_counts),
        "nll_per_token": float(sums(nll).sum() / sum(map(len, nll))),
        "bits": [round(x, 2) for x in bits.tolist()],
    }


def best_bits_per_byte(validation: dict[str, dict[str, Any]]) -> float:
    """The bits per byte of the better protocol."""
    return min(found["bits_per_byte"] for found in validation.values())


def does_not_match(pattern: str) -> Callable[[str], bool]:
    """Whether a name does not match a regular expression."""
    return lambda name: re.search(pattern, name) is None
