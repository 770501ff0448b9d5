"""Implementations of retention, fla's chunk_retention and cuDNN attention, on the same tokens.

q and k always have width 2048 over all heads, as in the paper's 1.3B model: 8 heads of 256 or 16 of
128, and 16 heads of 128 in attention. "both" is a forward and a backward pass with a random
cotangent; it returns the outputs and the gradients of q, k and v. Decays are fla's.
`relative_error` is the largest |x - r| / |r| of these arrays, in the first row, where r is from the
chunkwise XLA form in float32 on the CPU.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.accelerator import fla_kernel
from benchmarks.accelerator.bounds import attention_work, retention_work
from benchmarks.accelerator.cases import Case
from benchmarks.accelerator.timing import device_time, on_cpu
from retnet_jax.ops.retention import IMPLEMENTATIONS, log_decay, retention

KINDS = ("both", "forward")
KEYS = 2048  # width of q and k over all heads
# Widths of q and k, and of v (or attention, with 128 for both); and length.
_ORDER = [
    ((256, 512), 8192),
    ((128, 128), 8192),
    ("attention", 8192),
    ((256, 512), 32_768),
    ("attention", 32_768),
    ((256, 512), 2048),
    ((128, 128), 32_768),
    ((128, 128), 2048),
    ((128, 256), 8192),
    ((64, 128), 8192),
    ("attention", 2048),
    ((128, 256), 32_768),
    ((64, 128), 32_768),
    ((128, 256), 2048),
    ((64, 128), 2048),
]


class Shape(NamedTuple):
    """Shapes of q, k [rows length heads key_width] and v [rows length heads value_width]."""

    key_width: int
    value_width: int
    length: int
    rows: int
    heads: int

    def __str__(self):
        return f"{self.key_width}/{self.value_width} t {self.length}"

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def cases(tiny: bool) -> Iterator[Case]:
    """All implementations of a shape, then those of the next; the widest heads at 8k first."""
    if tiny:
        width, tokens, square = 32, 128, (8, 8)
        order = [((16, 32), 32), ("attention", 32)]
    else:
        width, tokens, square = KEYS, 65_536, (128, 128)
        order = _ORDER
    for widths, length in order:
        key, value = square if widths == "attention" else widths
        shape = Shape(key, value, length, tokens // length, width // key)
        yield from (_attention_cases if widths == "attention" else _retention_cases)(shape)


def _retention_cases(shape: Shape) -> Iterator[Case]:
    for kind in KINDS:
        # Kernels before the XLA form, because they are more important.
        for name in reversed(tuple(IMPLEMENTATIONS)):
            yield Case(f"{name} {shape} {kind}", partial(measure_own, name, shape, kind))
        yield Case(f"fla {shape} {kind}", partial(measure_fla, shape, kind))


def _attention_cases(shape: Shape) -> Iterator[Case]:
    for kind in KINDS:
        name = f"attention {shape} {kind}"
        yield Case(name, partial(measure_attention, shape, kind))


def measure_own(implementation: str, shape: Shape, kind: str) -> dict:
    """A record of `retention(..., implementation=NAME)`."""
    function = computing(partial(_retained, implementation, shape.heads), kind)
    found = device_time(function, inputs(shape))
    first = [np.asarray(x[:1], np.float32) for x in found.result]
    record = _described(implementation, shape, kind) | found.times | _error(first, shape)
    return record | {"kernels_ms": found.kernels_ms}


def measure_fla(shape: Shape, kind: str) -> dict:
    """A record of fla's chunk_retention."""
    found = fla_kernel.measure(inputs(shape), kind)
    first = [x[:1].float().cpu().numpy() for x in found.result]
    return _described("fla", shape, kind) | found.times | _error(first, shape)


def measure_attention(shape: Shape, kind: str) -> dict:
    """A record of causal softmax attention by cuDNN."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError("cuDNN is for NVIDIA GPUs")
    attention = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    found = device_time(computing(attention, kind), inputs(shape))
    return _described("cudnn attention", shape, kind) | found.times


def computing(outputs: Callable, kind: str) -> Callable:
    """A function of q, k, v and dy that returns the outputs, and for "both" the gradients too."""

    def forward(q, k, v, dy):
        return (outputs(q, k, v),)

    def both(q, k, v, dy):
        y, backward = jax.vjp(outputs, q, k, v)
        return y, *backward(dy)

    return {"forward": forward, "both": both}[kind]


@lru_cache(maxsize=1)
def inputs(shape: Shape) -> list[tuple]:
    """Two sets of random q, k, v and dy, in bfloat16."""

    @jax.jit
    def draw(key):
        widths = (shape.key_width, shape.key_width, shape.value_width, shape.value_width)
        drawn = [
            jax.random.normal(one, (shape.rows, shape.length, shape.heads, width), jnp.bfloat16)
            for one, width in zip(jax.random.split(key, 4), widths, strict=True)
        ]
        return (drawn[0] * shape.key_width**-0.5, *drawn[1:])

    return [draw(jax.random.key(seed)) for seed in range(2)]


def _retained(implementation: str, heads: int, q, k, v):
    decay = log_decay("powers_of_two", heads, (1 / 32, 1 / 512))
    return retention(q, k, v, decay, implementation=implementation)[0]


@lru_cache(maxsize=1)
def _reference(shape: Shape) -> list[np.ndarray]:
    """Outputs and gradients of the first row in float32, by the CPU."""
    function = computing(partial(_retained, "xla", shape.heads), "both")
    return on_cpu(function, [x[:1] for x in inputs(shape)[0]])


def _error(found: list[np.ndarray], shape: Shape) -> dict:
    """The largest relative error of the outputs, and of the gradients if they were computed."""
    pairs = zip(found, _reference(shape)[: len(found)], strict=True)
    errors = [float(np.linalg.norm(x - r) / np.linalg.norm(r)) for x, r in pairs]
    # Python's max could miss a NaN.
    return {"relative_error": float(np.max(errors))}


def _described(implementation: str, shape: Shape, kind: str) -> dict:
    """The fields of a record that describe the case, and its minimal work."""
    both = kind == "both"
    if implementation == "cudnn attention":
        work = attention_work(shape.tokens, shape.heads, shape.key_width, shape.length, both)
    else:
        widths = (shape.heads, shape.key_width, shape.value_width)
        work = retention_work(shape.tokens, *widths, both)
    described = {"implementation": implementation, "kind": kind, "tokens": shape.tokens}
    return described | shape._asdict() | work._asdict()
