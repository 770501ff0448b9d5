"""Loss over the logarithm of size: lines, their errors, and where two of them cross.

Two things vary: the documents that happen to be held out, and the seeds. Errors of lines and of
crossings are those of `DRAWS` draws in which the documents are resampled, the same ones for every
model and size, and each mean over seeds is moved by a normal number with the standard error of that
mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retnet_jax.evaluation.statistics import ratio_standard_error

DRAWS = 2000
REFERENCE = 1e6  # parameters at which a line's level is stated


@dataclass(frozen=True)
class Losses:
    """The losses of one model over sizes and seeds.

    Attributes:
      parameters: Parameters without the embedding, by size [n].
      bits: Bits of each document for each size: [seeds, documents].
      byte_counts: Bytes of each document.
      seed_deviations: Standard deviation over seeds at each size [n].
    """

    parameters: np.ndarray
    bits: list[np.ndarray]
    byte_counts: np.ndarray
    seed_deviations: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Bits per byte of each size, the mean over seeds."""
        return np.array([x.mean(0).sum() for x in self.bits]) / self.byte_counts.sum()

    @property
    def seed_errors(self) -> np.ndarray:
        """Standard error over seeds of each size's mean."""
        return self.seed_deviations / np.sqrt([len(x) for x in self.bits])

    @property
    def document_errors(self) -> np.ndarray:
        """Standard error over documents of each size's mean."""
        each = [ratio_standard_error(x.mean(0), self.byte_counts) for x in self.bits]
        return np.array(each)

    @property
    def shown_errors(self) -> np.ndarray:
        """Both errors together; if no model has several seeds, those over documents."""
        return np.hypot(self.document_errors, np.nan_to_num(self.seed_errors))

    def draws(self, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Bits per byte [draws, n] with resampled documents and seeds.

        Args:
          weights: How often each document is in each draw, from `document_draws`.
          rng: Source of the seeds' noise.
        """
        per_byte = weights @ np.array([x.mean(0) for x in self.bits]).T
        per_byte /= (weights @ self.byte_counts)[:, None]
        return per_byte + self.seed_errors * rng.standard_normal(per_byte.shape)


def seed_deviation(groups: Sequence[Sequence[float]]) -> float:
    """Standard deviation over seeds, pooled over groups of runs that differ in the seed only.

    NaN: no group has two runs.
    """
    freedom = sum(len(x) - 1 for x in groups)
    if not freedom:
        return math.nan
    return math.sqrt(sum(((np.array(x) - np.mean(x)) ** 2).sum() for x in groups) / freedom)


def document_draws(documents: int, rng: np.random.Generator) -> np.ndarray:
    """How often each document is in each of DRAWS samples with replacement: [draws, documents]."""
    return rng.multinomial(documents, np.full(documents, 1 / documents), DRAWS).astype(float)


@dataclass(frozen=True)
class Difference:
    """The bits per byte of one model minus those of another, at the sizes that both have.

    Attributes:
      parameters: Parameters without the embedding [n].
      mean: Differences [n].
      document_errors: Standard errors over documents, each model read on the same ones [n].
      seed_errors: Standard errors over seeds [n].
    """

    parameters: np.ndarray
    mean: np.ndarray
    document_errors: np.ndarray
    seed_errors: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """Both errors together; NaN if no model has several seeds."""
        return np.hypot(self.document_errors, self.seed_errors)

    @property
    def shown_errors(self) -> np.ndarray:
        """Both errors together; if no model has several seeds, those over documents."""
        return np.hypot(self.document_errors, np.nan_to_num(self.seed_errors))


def difference(one: Losses, other: Losses) -> Difference:
    """The difference of two models of the same sizes."""
    each = [a.mean(0) - b.mean(0) for a, b in zip(one.bits, other.bits, strict=True)]
    return Difference(
        one.parameters,
        one.mean - other.mean,
        np.array([ratio_standard_error(x, one.byte_counts) for x in each]),
        np.hypot(one.seed_errors, other.seed_errors),
    )


@dataclass(frozen=True)
class Line:
    """A line through values over log10 of the parameters.

    Attributes:
      level: Value at REFERENCE parameters.
      slope: Change with ten times as many parameters.
      level_error, slope_error: Their standard errors, from draws.
      residuals: Distance of each value from the line [n].
      draws: Level and slope of each draw [draws, 2].
    """

    level: float
    slope: float
    level_error: float
    slope_error: float
    residuals: np.ndarray
    draws: np.ndarray


def line(parameters: np.ndarray, values: np.ndarray, draws: np.ndarray) -> Line:
    """The line of least squares through values [n], with errors from draws of them [draws, n]."""
    x = _decades(parameters)
    solve = np.linalg.pinv(np.stack([np.ones_like(x), x], 1))  # [2 n]
    level, slope = solve @ values
    each = draws @ solve.T
    errors = each.std(0, ddof=1)
    residuals = np.abs(values - level - slope * x)
    return Line(level, slope, *map(float, errors), residuals, each)


def line_of(losses: Losses, rng: np.random.Generator) -> Line:
    """The line of one model."""
    weights = document_draws(len(losses.byte_counts), rng)
    return line(losses.parameters, losses.mean, losses.draws(weights, rng))


def line_of_difference(one: Losses, other: Losses, rng: np.random.Generator) -> Line:
    """The line of one model minus another, both with the same documents in each draw."""
    weights = document_draws(len(one.byte_counts), rng)
    draws = one.draws(weights, rng) - other.draws(weights, rng)
    return line(one.parameters, one.mean - other.mean, draws)


def crossing(level: float, slope: float, smallest: float) -> float:
    """Parameters at which a line of differences is 0; infinity if not at `smallest` or above."""
    if slope == 0:
        return math.inf
    exponent = math.log10(REFERENCE) - level / slope
    return 10**exponent if math.log10(smallest) <= exponent <= 300 else math.inf


def crossings(found: Line, smallest: float) -> tuple[float, float, float]:
    """Where a line of differences is 0, and the 2.5% and 97.5% quantiles of the draws."""
    each = np.array([crossing(level, slope, smallest) for level, slope in found.draws])
    low, high = np.quantile(each, (0.025, 0.975), method="nearest")
    return crossing(found.level, found.slope, smallest), float(low), float(high)


def _decades(parameters: np.ndarray) -> np.ndarray:
    return np.log10(np.asarray(parameters, float) / REFERENCE)
