"""What is said of -log p of documents: perplexities, their errors, and their course by position."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PerplexityReport:
    """What one protocol gives on a set of documents."""

    bits_per_byte: float  # nll / ln 2 / bytes
    standard_error: float  # of bits_per_byte, by `ratio_standard_error` over documents
    mean_bits_per_byte: float  # of the documents' own bits per byte, each counting alike
    mean_standard_error: float  # of that, over documents
    token_perplexity: float  # exp(nll / tokens)
    word_perplexity: float  # exp(nll / words)
    byte_perplexity: float  # exp(nll / bytes)
    nll: float  # -log p of all documents, in nats
    documents: int
    tokens: int  # scored, so without BOS
    words: int  # separated by whitespace
    bytes: int  # of UTF-8


def perplexity_report(
    nll: Sequence[np.ndarray], texts: Sequence[str], byte_counts: np.ndarray | None = None
) -> PerplexityReport:
    """Sums up documents.

    Args:
      nll: of each document the -log p of its tokens, in nats.
      texts: the same documents as text, for their words and bytes.
      byte_counts: bytes of each document's UTF-8, where the texts were decoded from tokens and may
        have lost some; None: those of the texts.
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
    """The -log p of each document, float64."""
    return np.array([losses.sum(dtype=np.float64) for losses in nll])


def count_words(text: str) -> int:
    """What lies between whitespace."""
    return len(text.split())


@dataclass(frozen=True)
class PositionBucket:
    """The tokens of all documents at positions `first` to `last`, where d_1 is at 0."""

    first: int
    last: int
    nll_per_token: float  # in nats
    standard_error: float  # of that, by `ratio_standard_error` over documents
    documents: int  # that reach here
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the -log p per token."""
        return _exp(self.nll_per_token)


def position_buckets(nll: Sequence[np.ndarray], shortest: int = 128) -> list[PositionBucket]:
    """The loss by position in the document: does context help, and how far does that go?

    Args:
      nll: of each document the -log p of its tokens.
      shortest: positions of the first bucket; each later one ends at twice the position.
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
    """Standard error of R = sum x / sum y over n units drawn at random, such as documents.

    sqrt(n / (n - 1) * sum (x_i - R y_i)^2) / sum y: the delta method (Cochran, Sampling Techniques,
    1977, chapter 6, without its correction for a finite population). NaN for a single unit.
    """
    n = len(x)
    if n == 1:
        return math.nan
    residuals = x - x.sum() / y.sum() * y
    return float(np.sqrt(n / (n - 1) * np.square(residuals).sum()) / y.sum())


def standard_error(x: np.ndarray) -> float:
    """Of the mean of x, over units drawn at random; NaN for a single one."""
    return float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan


@dataclass(frozen=True)
class Difference:
    """Of two models on the same rows or documents: the mean difference, and what it is worth."""

    mean: float
    standard_error: float

    @property
    def z(self) -> float:
        """The mean in standard errors; 0 where the two never differ."""
        if self.mean == 0:
            return 0.0
        if self.standard_error == 0:
            return math.copysign(math.inf, self.mean)
        return self.mean / self.standard_error


def paired_difference(one: np.ndarray, other: np.ndarray) -> Difference:
    """How much larger `one` is than `other`, which are of the same rows or documents."""
    differences = one.astype(np.float64) - other.astype(np.float64)
    return Difference(float(differences.mean()), standard_error(differences))


def _exp(x: float) -> float:
    """exp(x), infinite where that is beyond float64: text without spaces can be one long word."""
    return math.exp(x) if x < 709 else math.inf
