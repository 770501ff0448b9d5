"""Errors over documents and seeds: known amounts have known means and errors."""

import math

import numpy as np
import pytest

from experiments.paired import by_document, estimate


def test_a_constant_rate_has_no_error():
    found = estimate([[2.0, 6.0, 10.0]] * 3, [1, 3, 5])
    assert (found.mean, found.of_documents, found.of_seeds, found.error) == (2.0, 0.0, 0.0, 0.0)


def test_errors_of_seeds_and_of_documents_are_apart():
    seeds = estimate([[1.0, 3.0], [2.0, 6.0], [3.0, 9.0]], [1, 3])
    assert seeds.each == (1.0, 2.0, 3.0)
    assert (seeds.mean, seeds.of_documents) == (2.0, 0.0)
    assert seeds.error == seeds.of_seeds == pytest.approx(1 / math.sqrt(3))
    documents = estimate([[1.0, 3.0]] * 2, [1, 1])
    assert (documents.mean, documents.of_seeds) == (2.0, 0.0)
    assert documents.error == documents.of_documents == pytest.approx(1.0)


def test_the_error_over_both_is_that_of_their_sum():
    found = estimate([[0.0, 2.0], [2.0, 4.0]], [1, 1])
    assert found.error == pytest.approx(math.sqrt(found.of_documents**2 + found.of_seeds**2))
    assert math.isnan(estimate([[0.0, 2.0]], [1, 1]).error)


def test_long_documents_weigh_as_their_sizes():
    assert estimate([[1.0, 0.0]], [1, 9]).mean == 0.1
    with pytest.raises(ValueError, match=r"amounts of \(2,\) documents, but sizes of \(3,\)"):
        estimate([[1.0, 0.0]], [1, 9, 9])


def test_the_covered_share_is_that_of_two_errors():
    """Of many experiments with the same true rate, about 95% have it within two errors."""
    rng, inside = np.random.default_rng(0), 0
    sizes = rng.integers(50, 2000, 150)
    for _ in range(400):
        documents = 0.3 * rng.normal(size=150)  # what all seeds find hard in a document
        seeds = 0.05 * rng.normal(size=(20, 1))
        rates = 1 + documents + seeds + 0.1 * rng.normal(size=(20, 150))
        found = estimate(rates * sizes, sizes)
        inside += abs(found.mean - 1) < 2 * found.error
    assert 0.9 < inside / 400 < 0.99


def test_pieces_of_a_document_are_summed():
    assert by_document([1, 2, 3, 4], [7, 2, 7, 9]).tolist() == [4, 2, 4]
