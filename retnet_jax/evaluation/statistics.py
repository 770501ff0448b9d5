"""Statistics of -log p of documents: perplexities, standard errors, and the loss by position."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PerplexityReport:
    """Perplexity on a set of documents, by one protocol."""

    bits_per_byte: float  # nll / ln 2 / bytes
    standard_error: float  # of bits_per_byte, by `ratio_standard_error` over documents
    mean_bits_per_byte: float  # mean of the bits per byte of single documents
    mean_standard_error: float  # of mean_bits_per_byte, over documents
    token_perplexity: float  # exp(nll / tokens)
    word_perplexity: float  # exp(nll / words)
    byte_perplexity: float  # exp(nll / bytes)
    nll: float  # -log p of all documents, in nats
    documents: int
    tokens: int  # scored tokens, without BOS
    words: int  # separated by whitespace
    bytes: int  # UTF-8


def perplexity_report(
    nll: Sequence[np.ndarray], texts: Sequence[str], byte_counts: np.ndarray | None = None
) -> PerplexityReport:
    """The report of a set of documents.

    Args:
      nll: -log p of each document's tokens, in nats.
      texts: The same documents as text, to count words and bytes.
      byte_counts: Number of UTF-8 bytes of each document, for texts that were decoded from tokens
        and may have lost bytes; None: those of `texts`.
    """
    if byte_counts is None:
        byte_counts = np.array([len(text.encode("utf-8")) for text in texts])
    of_documents = sums(nll)
    bits = of_documents / math.log(2)
    total = float(of_documents.sum())
    tokens = sum(map(len, nll))
    words = sum(map(count_words, texts))
    return PerplexityReport(
        bits_per_byte=float(bits.sum() / byte_counts.sum()),
        standard_error=ratio_standard_error(bits, byte_counts),
        mean_bits_per_byte=float((bits / byte_counts).mean()),
        mean_standard_error=standard_error(bits / byte_counts),
        token_perplexity=_exp(total / tokens),
        word_perplexity=_exp(total / words),
        byte_perplexity=_exp(total / int(byte_counts.sum())),
        nll=total,
        documents=len(nll),
        tokens=tokens,
        words=words,
        bytes=int(byte_counts.sum()),
    )


def sums(nll: Sequence[np.ndarray]) -> np.ndarray:
    """The -log p of each whole document, float64."""
    return np.array([losses.sum(dtype=np.float64) for losses in nll])


def count_words(text: str) -> int:
    """The number of words separated by whitespace."""
    return len(text.split())


@dataclass(frozen=True)
class PositionBucket:
    """The tokens of all documents at positions `first` to `last`, where d_1 is at 0."""

    first: int
    last: int
    nll_per_token: float  # in nats
    standard_error: float  # of nll_per_token, by `ratio_standard_error` over documents
    documents: int  # number of documents that reach this bucket
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the -log p per token."""
        return _exp(self.nll_per_token)


def position_buckets(nll: Sequence[np.ndarray], shortest: int = 128) -> list[PositionBucket]:
    """The loss by position in the document, which shows up to which length context helps.

    Args:
      nll: -log p of each document's tokens.
      shortest: Number of positions in the first bucket; each later one ends at twice the position.
    """
    found, first, end = [], 0, shortest
    while here := [losses[first:end] for losses in nll if len(losses) > first]:
        total, tokens = sums(here), np.array([len(losses) for losses in here])
        found.append(
            PositionBucket(
                first=first,
                last=end - 1,
                nll_per_token=float(total.sum() / tokens.sum()),
                standard_error=ratio_standard_error(total, tokens),
                documents=len(here),
                tokens=int(tokens.sum()),
            )
        )
        first, end = end, 2 * end
    return found


def ratio_standard_error(x: np.ndarray, y: np.ndarray) -> float:
    """Standard error of R = sum x / sum y over n randomly drawn units, such as documents.

    sqrt(n / (n - 1) * sum (x_i - R y_i)^2) / sum y: the delta method (Cochran, Sampling Techniques,
    1977, chapter 6, without its correction for a finite population). NaN for a single unit.
    """
    n = len(x)
    if n == 1:
        return math.nan
    residuals = x - x.sum() / y.sum() * y
    return float(np.sqrt(n / (n - 1) * np.square(residuals).sum()) / y.sum())


def standard_error(x: np.ndarray) -> float:
    """Standard error of the mean of x, over randomly drawn units; NaN for a single one."""
    return float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


@dataclass(frozen=True)
class Difference:
    """The mean difference of two models on the same rows or documents, and its standard error."""

    mean: float
    standard_error: float

    @property
    def z(self) -> float:
        """The mean in units of the standard error; 0 if the two never differ."""
        if self.mean == 0:
            return 0.0
        if self.standard_error == 0:
            return math.copysign(math.inf, self.mean)
        return self.mean / self.standard_error


def paired_difference(one: np.ndarray, other: np.ndarray) -> Difference:
    """The mean of `one` minus `other`, on the same rows or documents."""
    differences = one.astype(np.float64) - other.astype(np.float64)
    return Difference(float(differences.mean()), standard_error(differences))


def _exp(x: float) -> float:
    """exp(x), infinity if it overflows: a text without spaces can be a single long word."""
    return math.exp(x) if x < 709 else math.inf
