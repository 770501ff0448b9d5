"""The table of tolerances by dtype: the largest difference over the largest expected value.

They follow from the rounding of the dtype and are never fitted to an observed error.
"""

import numpy as np

RELATIVE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}


def relative_difference(actual, expected) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape
    assert np.isfinite(actual).all()
    scale = np.abs(expected).max(initial=0)
    return float(np.abs(actual - expected).max(initial=0) / (scale or 1.0))


def assert_close(actual, expected, dtype="float32", what="") -> None:
    """Checks that two arrays, or two trees of arrays, agree within the table's tolerance."""
    import jax

    leaves, structure = jax.tree.flatten(actual)
    expected_leaves, expected_structure = jax.tree.flatten(expected)
    assert structure == expected_structure
    for index, (a, b) in enumerate(zip(leaves, expected_leaves, strict=True)):
        difference = relative_difference(a, b)
        assert difference <= RELATIVE[str(dtype)], f"{what} leaf {index}: {difference:.2e}"
