"""-log p of every token of documents, by three protocols.

A document is a sequence of tokens d_0 = BOS, d_1 ... d_n. The tokens d_1 ... d_n are scored, each
given the earlier tokens that the protocol shows to the model. The end of a document is not scored.

    stateful   d_i is predicted from d_0 ... d_{i-1}: the state is carried through the document
    window     windows of L input tokens, each read from the zero state. Every token is scored
               once. The last window of a document also has L inputs if the document is long enough;
               it is scored only after the end of the previous window. This is
               `loglikelihood_rolling` of lm-evaluation-harness
    sliding    overlapping windows of L inputs, each scored on its last `stride` tokens, with the
               L - stride tokens before them as context; `window` is the case stride = L
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.model import LanguageModel, State
from retnet_jax.model.parameters import why_not_finite
from retnet_jax.model.token_ids import checked_ids
from retnet_jax.ops.cross_entropy import token_cross_entropy
from retnet_jax.parallel.sharding import constrain
from retnet_jax.shapes import Array, Float, Int, power_of_two

# Largest number of tokens of a document read at once. A Transformer's attention to its whole cache
# limits it: batch * heads * piece * capacity scores.
_PIECE_LENGTH = 512


def stateful_nll(
    model: LanguageModel,
    documents: Sequence[np.ndarray],
    *,
    batch_size: int,
    piece_length: int = _PIECE_LENGTH,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[np.ndarray]:
    """-log p(d_i | d_0 ... d_{i-1}) of each document's tokens, in nats.

    Documents of similar length are read together in a batch, piece by piece.

    Args:
      model: Model that scores the tokens.
      documents: Token ids [n + 1] of each document, BOS first.
      batch_size: Documents in a batch.
      piece_length: Largest number of tokens read at once; it changes results only by rounding.
      progress: Called with the number of tokens read since the last call.

    Returns:
      float32 [n] for each document.

    Raises:
      ConfigError: for a document that is empty or has ids unknown to the model.
      CheckpointError: for a model whose probabilities are not finite.
    """
    _check_documents(model, documents)
    lengths = [len(document) - 1 for document in documents]
    nll = [np.zeros(0, np.float32)] * len(documents)
    some = [number for number, length in enumerate(lengths) if length]
    if not some:
        return nll
    # All groups use the same piece length, so that few programs are compiled. It is short if most
    # documents are short, to avoid padding.
    piece_length = min(piece_length, power_of_two(math.ceil(np.mean(lengths))))
    rows = min(batch_size, len(some))
    longest_first = sorted(some, key=lambda number: -lengths[number])
    for start in range(0, len(some), rows):
        group = longest_first[start : start + rows]
        found = _group_nll(model, [documents[i] for i in group], rows, piece_length, progress)
        for i, losses in zip(group, found, strict=True):
            nll[i] = losses
    wrong = [number for number in some if not np.isfinite(nll[number]).all()]
    if wrong:
        first = np.flatnonzero(~np.isfinite(nll[wrong[0]]))[0]
        raise CheckpointError(
            f"the model's probabilities are not finite in {len(wrong)} of {len(documents)} "
            f"documents (first: token {first + 1} of document {wrong[0]}): {why_not_finite(model)}"
        )
    return nll


def _check_documents(model: LanguageModel, documents: Sequence[np.ndarray]) -> None:
    for number, document in enumerate(documents):
        if not len(checked_ids(document, model.config.vocab_size, f"document {number}")):
            raise ConfigError(f"document {number} is empty; it must begin with BOS")


def window_nll(
    model: LanguageModel,
    documents: Sequence[np.ndarray],
    *,
    window_length: int,
    stride: int | None = None,
    batch_size: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[np.ndarray]:
    """-log p(d_i | the tokens before it in its window) of each document's tokens, in nats.

    Args:
      model: Model that scores the tokens.
      documents: Token ids [n + 1] of each document, BOS first.
      window_length: Number of input tokens of a window, L in the protocols.
      stride: Number of tokens scored in each window; None: `window_length`, without overlap.
      batch_size: Windows in a batch.
      progress: Called with the number of tokens read since the last call.

    Returns:
      float32 [n] for each document.

    Raises:
      ConfigError: for a stride that is not in 1 ... `window_length`; and as `stateful_nll`.
      CheckpointError: as `stateful_nll`.
    """
    _check_documents(model, documents)
    parts, owners = [], []
    for owner, document in enumerate(documents):
        for window in windows(len(document) - 1, window_length, stride):
            parts.append((document[window.start : window.stop + 1], window.scored))
            owners.append(owner)
    found = stateful_nll(
        model,
        [tokens for tokens, _ in parts],
        batch_size=batch_size,
        piece_length=min(window_length, _PIECE_LENGTH),
        progress=progress,
    )
    nll = [[np.zeros(0, np.float32)] for _ in documents]
    for owner, losses, (_, scored) in zip(owners, found, parts, strict=True):
        nll[owner].append(losses[len(losses) - scored :])
    return [np.concatenate(losses) for losses in nll]


class Window(NamedTuple):
    """Inputs d_start ... d_{stop-1} of a document; the last `scored` of their targets count."""

    start: int
    stop: int
    scored: int


def windows(tokens: int, length: int, stride: int | None = None) -> list[Window]:
    """The windows of a document that has `tokens` tokens after BOS; see `window_nll`."""
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ConfigError(f"stride={stride} is not in 1 ... {length} (the window length)")
    found = [Window(0, min(length, tokens), min(length, tokens))]
    while (done := found[-1].stop) < tokens:
        stop = min(tokens, done + stride)
        found.append(Window(stop - length, stop, stop - done))
    return found


def last_tokens_nll(
    model: LanguageModel,
    documents: Sequence[np.ndarray],
    context_lengths: Sequence[int],
    *,
    scored: int = 128,
    batch_size: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> dict[int, np.ndarray]:
    """-log p of the same tokens after contexts of several lengths (arXiv 2307.08621, Table 8).

    Only documents of at least the longest context length count. In each, the `scored` tokens that
    end at the longest context length are scored in windows that end there. The input length of a
    window is its context length.

    Returns:
      For each context length, the sum over the scored tokens of each such document, in nats:
      float64 [documents].

    Raises:
      ConfigError: if no document is as long as the longest context, or a context is shorter than
        `scored`.
    """
    _check_documents(model, documents)
    check_contexts(documents, context_lengths, scored)
    longest = max(context_lengths)
    long = [document[: longest + 1] for document in documents if len(document) > longest]
    nll = {}
    for length in context_lengths:
        parts = [document[longest - length :] for document in long]
        found = stateful_nll(model, parts, batch_size=batch_size, progress=progress)
        nll[length] = np.array([losses[-scored:].sum(dtype=np.float64) for losses in found])
    return nll


def check_contexts(
    documents: Sequence[np.ndarray], context_lengths: Sequence[int], scored: int = 128
) -> None:
    """Raises the errors of `last_tokens_nll` for its documents and context lengths."""
    longest, most = max(context_lengths), max(len(document) - 1 for document in documents)
    if min(context_lengths) < scored:
        raise ConfigError(
            f"a context of {min(context_lengths)} tokens is shorter than the {scored} that are "
            "scored at its end"
        )
    if most < longest:
        raise ConfigError(
            f"no document has {longest} tokens, the longest context; the longest has {most}"
        )


def _group_nll(
    model: LanguageModel,
    documents: list[np.ndarray],
    rows: int,
    piece_length: int,
    progress: Callable[[int], object],
) -> list[np.ndarray]:
    """`stateful_nll` of at most `rows` documents, sorted with the longest first."""
    n_pieces = math.ceil((len(documents[0]) - 1) / piece_length)
    # A Transformer is compiled for each cache capacity. Rounding it up, by at most a quarter, keeps
    # the number of capacities small.
    step = max(1, power_of_two(n_pieces) // 8)
    state = model.init_state(rows, piece_length * step * math.ceil(n_pieces / step))
    nll = []
    for start in range(0, n_pieces * piece_length, piece_length):
        # One token more than is read, the target of the last one.
        tokens = np.zeros((rows, piece_length + 1), np.int32)
        segment_ids = np.zeros((rows, piece_length), np.int32)  # 0: padding
        for row, document in enumerate(documents):
            piece = document[start : start + piece_length + 1]
            tokens[row, : len(piece)] = piece
            segment_ids[row, : max(0, len(piece) - 1)] = 1
        losses, state = _piece_nll(model, state, tokens[:, :-1], tokens[:, 1:], segment_ids)
        nll.append(np.asarray(losses))
        progress(int(segment_ids.sum()))
    joined = np.concatenate(nll, axis=1)  # [rows, all tokens]
    return [joined[row, : len(document) - 1] for row, document in enumerate(documents)]


@partial(jax.jit, donate_argnames="state")
def _piece_nll(
    model: LanguageModel,
    state: State,
    tokens: Int[Array, "b t"],
    targets: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
) -> tuple[Float[Array, "b t"], State]:
    """The -log p of targets, and the state after the tokens."""
    hidden, state = model.hidden(constrain(tokens, "bt"), state, segment_ids)  # [b t d]
    losses = token_cross_entropy(hidden, model.head_matrix(), targets)
    return constrain(losses, "  "), state  # replicated, so that every process can read them
