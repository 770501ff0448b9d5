"""Sizes of property tests: few examples in the quick tests, many in the slow ones."""

import pytest
from hypothesis import HealthCheck, given, settings


def sizes(quick, slow):
    """The number of examples of a test, and of its long variant."""
    return pytest.mark.parametrize("most", [quick, pytest.param(slow, marks=pytest.mark.slow)])


def holds_for(most, *strategies, **named):
    """Runs a function with so many examples, at once."""

    def run(function):
        checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
        settings(max_examples=most, suppress_health_check=checks)(
            given(*strategies, **named)(function)
        )()

    return run
