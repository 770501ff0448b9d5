"""Means and differences over the same documents and several seeds, with the errors of both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retnet_jax.evaluation.statistics import ratio_standard_error, standard_error
from retnet_jax.evaluation.tables import plus_minus


@dataclass(frozen=True)
class Estimate:
    """A ratio of sums over documents, averaged over seeds.

    Attributes:
      mean: Mean over the seeds.
      of_documents: Standard error over documents, of the amounts averaged over the seeds.
      of_seeds: Standard error over seeds, of the ratio on all documents; NaN for one seed.
      each: The ratio of each seed.
    """

    mean: float
    of_documents: float
    of_seeds: float
    each: tuple[float, ...]

    @property
    def error(self) -> float:
        """The standard error over both; NaN for one seed.

        What documents and seeds do together is counted twice, so it is too large rather than too
        small.
        """
        return math.hypot(self.of_documents, self.of_seeds)

    @property
    def shown_error(self) -> float:
        """The error for figures: over both, of a single seed over documents."""
        return self.of_documents if math.isnan(self.of_seeds) else self.error

    def text(self, form: str) -> str:
        """The mean, such as with form "+.4f", and its errors over documents and over seeds."""
        errors = [x for x in (self.of_documents, self.of_seeds) if not math.isnan(x)]
        return " ".join([f"{self.mean:{form}}", *map(plus_minus, errors)])


def estimate(
    amounts: Sequence[Sequence[float]] | np.ndarray, sizes: Sequence[float] | np.ndarray
) -> Estimate:
    """The estimate of sum of amounts / sum of sizes.

    Args:
      amounts: Such as nats, or differences of two models' nats: [seeds, documents].
      sizes: Such as tokens or bytes of the same documents: [documents].

    Raises:
      ValueError: if a document's size is missing.
    """
    amounts, sizes = np.asarray(amounts, np.float64), np.asarray(sizes, np.float64)
    if amounts.shape[1:] != sizes.shape:
        raise ValueError(f"amounts of {amounts.shape[1:]} documents, but sizes of {sizes.shape}")
    each = amounts.sum(1) / sizes.sum()
    return Estimate(
        mean=float(each.mean()),
        of_documents=ratio_standard_error(amounts.mean(0), sizes),
        of_seeds=standard_error(each),
        each=tuple(each.tolist()),
    )


def by_document(values: Sequence[float], owners: Sequence[int]) -> np.ndarray:
    """Sums of the values of each document, in the order of the documents' first values.

    Several pieces of one document are not independent draws, so errors are over documents.
    """
    numbers = list(dict.fromkeys(owners))
    sums = np.zeros(len(numbers))
    np.add.at(sums, [numbers.index(owner) for owner in owners], np.asarray(values, np.float64))
    return sums
