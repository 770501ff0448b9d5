"""Perplexity and bits per byte of documents.

A document is its tokens d_0 = BOS, d_1 ... d_n. Scored are d_1 ... d_n, each given the tokens
before it that the protocol lets the model see; BOS is not, nor is the end of a document. The
protocols:

    stateful   d_i given d_0 ... d_{i-1}: the state is carried through the document
    window     d_i given those of its window: d_{kL} ... d_{kL+L-1}, read from zero state, predict
               d_{kL+1} ... d_{kL+L}. Every token is scored once, the first from BOS, as by
               `loglikelihood_rolling` of EleutherAI's lm-evaluation-harness, but for the last
               window: there it is shorter too, but gets more context, L inputs in all
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from retnet_jax.cross_entropy import token_cross_entropy
from retnet_jax.model import LanguageModel, State
from retnet_jax.shapes import Array, Float, Int
from retnet_jax.sharding import constrain

# Most tokens of a document that are read at once. What bounds it is a Transformer's attention to
# its whole cache: batch * heads * piece * capacity scores.
_PIECE_LENGTH = 512


def document_nll_stateful(
    model: LanguageModel,
    documents: Sequence[np.ndarray],
    *,
    batch_size: int,
    piece_length: int = _PIECE_LENGTH,
    progress: Callable[[int], object] = lambda tokens: None,
) -> np.ndarray:
    """-log p(d_1 ... d_n | BOS) of each document, in nats.

    Documents of similar length go through the model together, piece by piece.

    Args:
      model: scores the tokens.
      documents: token ids [n + 1] of each, BOS first.
      batch_size: documents at once.
      piece_length: most tokens at once; to rounding the result is the same for all.
      progress: called with the number of tokens scored since the last call.

    Returns:
      float64 [documents], summed in float64.
    """
    lengths = [len(document) - 1 for document in documents]
    # One length for all groups, so that few programs are compiled; where most documents are short
    # it is short, so that little of it is padding.
    piece_length = min(piece_length, _power_of_two(math.ceil(np.mean(lengths))))
    rows = min(batch_size, len(documents))
    longest_first = np.argsort(lengths, kind="stable")[::-1]
    nll = np.zeros(len(documents))
    for start in range(0, len(documents), rows):
        group = longest_first[start : start + rows]
        nll[group] = _group_nll(model, [documents[i] for i in group], rows, piece_length, progress)
    return nll


def document_nll_window(
    model: LanguageModel,
    documents: Sequence[np.ndarray],
    *,
    window_length: int,
    batch_size: int,
    progress: Callable[[int], object] = lambda tokens: None,
) -> np.ndarray:
    """The sum over the windows of each document of -log p(window | the token before it), in nats.

    Args:
      model: scores the tokens.
      documents: token ids [n + 1] of each, BOS first.
      window_length: tokens scored in a window; the last of a document may have fewer.
      batch_size: windows at once.
      progress: called with the number of tokens scored since the last call.

    Returns:
      float64 [documents], summed in float64.
    """
    windows, owners = [], []
    for owner, document in enumerate(documents):
        for start in range(0, len(document) - 1, window_length):
            windows.append(document[start : start + window_length + 1])
            owners.append(owner)
    nll = document_nll_stateful(
        model,
        windows,
        batch_size=batch_size,
        piece_length=min(window_length, _PIECE_LENGTH),
        progress=progress,
    )
    return np.bincount(owners, weights=nll, minlength=len(documents))


def _group_nll(
    model: LanguageModel,
    documents: list[np.ndarray],
    rows: int,
    piece_length: int,
    progress: Callable[[int], object],
) -> np.ndarray:
    """As `document_nll_stateful` of at most `rows` documents, the longest first."""
    n_pieces = math.ceil((len(documents[0]) - 1) / piece_length)
    # A Transformer is compiled for each capacity: rounded up, at most by a quarter, they are few.
    step = max(1, _power_of_two(n_pieces) // 8)
    state = model.init_state(rows, piece_length * step * math.ceil(n_pieces / step))
    nll = np.zeros(rows)
    for start in range(0, n_pieces * piece_length, piece_length):
        # One token more than is read: the target of the last.
        tokens = np.zeros((rows, piece_length + 1), np.int32)
        real = np.zeros((rows, piece_length), np.int32)
        for row, document in enumerate(documents):
            piece = document[start : start + piece_length + 1]
            tokens[row, : len(piece)] = piece
            real[row, : max(0, len(piece) - 1)] = 1
        losses, state = _piece_nll(model, state, tokens[:, :-1], tokens[:, 1:], real)
        nll += np.asarray(losses, np.float64).sum(axis=1, where=real == 1)
        progress(int(real.sum()))
    return nll[: len(documents)]


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


def _power_of_two(least: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(0, least - 1).bit_length()


@dataclass(frozen=True)
class PerplexityReport:
    """What one protocol gives on a set of documents."""

    bits_per_byte: float  # nll / ln 2 / bytes
    standard_error: float  # of bits_per_byte, by `ratio_standard_error` over documents
    token_perplexity: float  # exp(nll / tokens)
    word_perplexity: float  # exp(nll / words)
    nll: float  # -log p of all documents, in nats
    documents: int
    tokens: int  # scored, so without BOS
    words: int  # separated by whitespace
    bytes: int  # of UTF-8


def perplexity_report(
    nll: np.ndarray,
    documents: Sequence[np.ndarray],
    texts: Sequence[str],
    byte_counts: np.ndarray | None = None,
) -> PerplexityReport:
    """Sums up documents; all sums and quotients are of totals, not means over documents.

    Args:
      nll: of each document, in nats.
      documents: token ids [n + 1] of each, BOS first.
      texts: the same documents as text, for their words and bytes.
      byte_counts: bytes of each document's UTF-8, where the texts were decoded from tokens and may
        have lost some; None: those of the texts.
    """
    if byte_counts is None:
        byte_counts = np.array([len(text.encode("utf-8")) for text in texts])
    bits = nll / math.log(2)
    total = float(nll.sum())
    tokens = sum(len(document) - 1 for document in documents)
    words = sum(len(text.split()) for text in texts)
    return PerplexityReport(
        bits_per_byte=float(bits.sum() / byte_counts.sum()),
        standard_error=ratio_standard_error(bits, byte_counts),
        token_perplexity=_exp(total / tokens),
        word_perplexity=_exp(total / words),
        nll=total,
        documents=len(documents),
        tokens=tokens,
        words=words,
        bytes=int(byte_counts.sum()),
    )


def ratio_standard_error(x: np.ndarray, y: np.ndarray) -> float:
    """Standard error of R = sum x / sum y over n units drawn at random, such as documents.

    sqrt(n / (n - 1) * sum (x_i - R y_i)^2) / sum y: the delta method (Cochran, Sampling Techniques,
    1977, chapter 6, without its correction for a finite population). NaN for a single unit.
    """
    n = len(x)
    if n == 1:
        return math.nan
    residuals = x - x.sum() / y.sum() * y
    return float(np.sqrt(n / (n - 1) * np.square(residuals).sum()) / y.sum())


def _exp(x: float) -> float:
    """exp(x), infinite where that is beyond float64: text without spaces can be one long word."""
    return math.exp(x) if x < 709 else math.inf
