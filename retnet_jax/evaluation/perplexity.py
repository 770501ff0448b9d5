"""-log p of every token of documents, by three protocols.

A document is its tokens d_0 = BOS, d_1 ... d_n. Scored are d_1 ... d_n, each given the tokens
before it that the protocol lets the model see; BOS is not, nor is the end of a document.

    stateful   d_i given d_0 ... d_{i-1}: the state is carried through the document
    window     windows of L tokens, each read from zero state. Every token is scored once, the first
               from BOS. The last window of a document begins as early as L inputs allow and is
               scored where the one before ended: `loglikelihood_rolling` of lm-evaluation-harness
    sliding    windows of which each is scored for `stride` tokens and has the L - stride before
               them as context; `window` is the case stride = L
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

# Most tokens of a document that are read at once. What bounds it is a Transformer's attention to
# its whole cache: batch * heads * piece * capacity scores.
_PIECE_LENGTH = 512


def stateful_nll(
    model: LanguageModel,
    documents: Sequence[np.ndarray],
    *,
    batch_size: int,
    piece_length: int = _PIECE_LENGTH,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[np.ndarray]:
    """-log p(d_i | d_0 ... d_{i-1}) of each document, in nats.

    Documents of similar length go through the model together, piece by piece.

    Args:
      model: scores the tokens.
      documents: token ids [n + 1] of each, BOS first.
      batch_size: documents at once.
      piece_length: most tokens at once; to rounding the result is the same for all.
      progress: called with the number of tokens read since the last call.

    Returns:
      float32 [n] of each.

    Raises:
      ConfigError: for a document that is empty, or has ids that the model does not know.
      CheckpointError: for a model whose probabilities are not finite.
    """
    _check_documents(model, documents)
    lengths = [len(document) - 1 for document in documents]
    nll = [np.zeros(0, np.float32)] * len(documents)
    some = [number for number, length in enumerate(lengths) if length]
    if not some:
        return nll
    # One length for all groups, so that few programs are compiled; where most documents are short
    # it is short, so that little of it is padding.
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
            f"{len(wrong)} of {len(documents)} documents have tokens without a finite probability "
            f"from this model, the first of them token {first + 1} of document {wrong[0]}: "
            f"{why_not_finite(model)}"
        )
    return nll


def _check_documents(model: LanguageModel, documents: Sequence[np.ndarray]) -> None:
    for number, document in enumerate(documents):
        if not len(checked_ids(document, model.config.vocab_size, f"document {number}")):
            raise ConfigError(f"document {number} is empty; BOS, the first token, is needed")


def window_nll(
    model: LanguageModel,
    documents: Sequence[np.ndarray],
    *,
    window_length: int,
    stride: int | None = None,
    batch_size: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> list[np.ndarray]:
    """-log p(d_i | what its window has before it) of each document, in nats.

    Args:
      model: scores the tokens.
      documents: token ids [n + 1] of each, BOS first.
      window_length: inputs of a window, the protocol's L.
      stride: tokens that a window is scored for; None: all, so that windows do not overlap.
      batch_size: windows at once.
      progress: called with the number of tokens read since the last call, of those that
        `windows` has.

    Returns:
      float32 [n] of each.

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
    """Inputs d_start ... d_{stop-1} of a document, scored on the last `scored` of their targets."""

    start: int
    stop: int
    scored: int


def windows(tokens: int, length: int, stride: int | None = None) -> list[Window]:
    """The windows of a document of so many tokens after BOS; see `window_nll`."""
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ConfigError(f"stride={stride} is not in 1 ... {length}, the window's length")
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

    Of each document that is long enough, the `scored` tokens that end the longest context's window
    are scored in windows that end there and have that many inputs in all.

    Returns:
      For each length float64 [documents that are long enough], the sum over the tokens in nats.

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
    """Raises what `last_tokens_nll` raises."""
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
    """As `stateful_nll` of at most `rows` documents, the longest first."""
    n_pieces = math.ceil((len(documents[0]) - 1) / piece_length)
    # A Transformer is compiled for each capacity: rounded up, at most by a quarter, they are few.
    step = max(1, power_of_two(n_pieces) // 8)
    state = model.init_state(rows, piece_length * step * math.ceil(n_pieces / step))
    nll = []
    for start in range(0, n_pieces * piece_length, piece_length):
        # One token more than is read: the target of the last.
        tokens = np.zeros((rows, piece_length + 1), np.int32)
        real = np.zeros((rows, piece_length), np.int32)
        for row, document in enumerate(documents):
            piece = document[start : start + piece_length + 1]
            tokens[row, : len(piece)] = piece
            real[row, : max(0, len(piece) - 1)] = 1
        losses, state = _piece_nll(model, state, tokens[:, :-1], tokens[:, 1:], real)
        nll.append(np.asarray(losses))
        progress(int(real.sum()))
    joined = np.concatenate(nll, axis=1)
    return [joined[row, : len(document) - 1] for row, document in enumerate(documents)]


@partial(jax.jit, donate_argnames="state")
def _piece_nll(
    model: LanguageModel,
    state: State,
    tokens: Int[Array, "b t"],
    targets: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
) -> tuple[Float[Array, "b t"], State]:
    hidden, state = model.hidden(constrain(tokens, "bt"), state, segment_ids)
    losses = token_cross_entropy(hidden, model.head_matrix(), targets)
    return constrain(losses, "  "), state  # whole, for every process to read
