"""The kernel of the device, compared with the chunkwise XLA form in float32 on the CPU.

Each case has random q, k and v, a state before the first token, and cotangents of the outputs and
of the state after the last token. Its record has the largest |x - r| over the largest |r| of each
of the two results and five gradients, and fails if one is not finite or above `TOLERANCE`.
The random numbers have mean 1/2, because sums of numbers with mean 0 cancel.
"""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator.cases import Case
from benchmarks.accelerator.timing import on_cpu
from retnet_jax.ops.retention import log_decay, retention
from retnet_jax.ops.retention.api import KERNELS

TOLERANCE = 2e-2  # for operands in bfloat16, as in the tests
_NAMES = ("y", "after", "d_q", "d_k", "d_v", "d_log_decay", "d_state")

# Rows, length, heads, widths of keys and values, and the lengths of each row's documents;
# a negative length is padding.
_TINY = {"documents": (2, 70, 1, 64, 64, ([30, 34, -1, 5], [-3, 40, -10, 17]))}
_CASES = {
    "documents": (2, 133, 2, 64, 128, ([60, 4, 6, 62, -1], [-3, 60, 67, -3])),
    "widths of 72 and 64": (1, 70, 2, 72, 64, None),
    "widths of 256 and 512": (2, 1000, 2, 256, 512, ([300, 212, 488], [-130, 510, 360])),
    "segments": (1, 4096, 2, 128, 128, ([1000, 3000, -40, 56],)),
    "segments of one document": (1, 8192, 1, 256, 512, None),
}


def cases(tiny: bool) -> Iterator[Case]:
    for name, shape in (_TINY if tiny else _CASES).items():
        yield Case(name, partial(compare, *shape))


def compare(
    rows: int, length: int, heads: int, key_width: int, value_width: int, documents
) -> dict[str, float]:
    """The record of a case.

    Raises:
      AssertionError: if a result is not finite or differs too much.
    """
    arrays = _inputs(rows, length, heads, key_width, value_width)
    segment_ids = None if documents is None else _segment_ids(documents, length)
    kernel = KERNELS.get(jax.default_backend(), "pallas_tpu")
    found = jax.jit(_outputs_and_gradients(kernel, segment_ids))(*arrays)
    expected = on_cpu(_outputs_and_gradients("xla", segment_ids), arrays)
    errors = {
        name: float(np.abs(np.asarray(x, np.float32) - r).max() / np.abs(r).max())
        for name, x, r in zip(_NAMES, found, expected, strict=True)
    }
    shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    worst = float(np.max(list(errors.values())))  # Python's max could miss a NaN
    assert worst <= TOLERANCE, f"{kernel} differs from XLA by more than {TOLERANCE}: {shown}"
    return {"largest_error": worst, **errors}


def _inputs(rows, length, heads, key_width, value_width) -> list[jax.Array]:
    """q, k, v, log_decay and state, and d_y and d_after."""
    rng = np.random.default_rng(0)
    widths = (key_width, key_width, value_width, value_width)
    drawn = (rng.normal(0.5, size=(rows, length, heads, width)) for width in widths)
    q, k, v, d_y = (jnp.asarray(x, jnp.bfloat16) for x in drawn)
    states = rng.normal(0.5, size=(2, rows, heads, key_width, value_width))
    state, d_after = jnp.asarray(states, jnp.float32)
    decay = log_decay("log_spaced", heads, (1 / 32, 1 / 512))
    return [q * key_width**-0.5, k, v, decay, state, d_y, d_after]


def _segment_ids(documents, length: int) -> np.ndarray:
    rows = []
    for lengths in documents:
        ids = [0 if n < 0 else i for i, n in enumerate(lengths, 1)]
        rows.append(np.repeat(ids, np.abs(lengths)))
    assert all(len(row) == length for row in rows)
    return np.stack(rows).astype(np.int32)


def _outputs_and_gradients(implementation: str, segment_ids: np.ndarray | None) -> Callable:
    """A function of the arrays and cotangents that returns all that `_NAMES` lists."""

    def form(q, k, v, log_decay, state):
        ids = None if segment_ids is None else jnp.asarray(segment_ids)
        return retention(q, k, v, log_decay, state, ids, implementation=implementation)

    def run(q, k, v, log_decay, state, d_y, d_after):
        outputs, backward = jax.vjp(form, q, k, v, log_decay, state)
        return *outputs, *backward((d_y, d_after))

    return run
