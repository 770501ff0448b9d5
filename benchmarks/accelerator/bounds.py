"""Lower bounds of times: FLOPs at the matrix rate, or bytes at the bandwidth.

Each input is read once and each output is written once; states stay on the chip.
"""

from typing import NamedTuple

# Chunk size of the roofline. With states on the chip, short chunks have the cheapest score
# products, but matrix units need at least this number of rows.
CHUNK = 128


class Work(NamedTuple):
    """The minimal work of a computation."""

    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The larger of the two times."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def retention_work(
    tokens: int,
    heads: int,
    key_width: int,
    value_width: int,
    both: bool,
    chunk: int = CHUNK,
    itemsize: int = 2,
) -> Work:
    """The work of chunkwise retention, forward or forward and backward ("both").

    Forward takes 4KV + c(K+V) FLOPs per token and head: writing and reading the state, and half of
    the c by c scores and of their product with v. Backward takes 10KV + c(3K+2V): the states again,
    four products with states and five with scores. Forward reads q, k, v and writes y; backward
    reads q, k, v, dy and writes dq, dk, dv.
    """
    k, v = key_width, value_width
    flops = 4 * k * v + chunk * (k + v)
    moved = 2 * k + 2 * v
    if both:
        flops += 10 * k * v + chunk * (3 * k + 2 * v)
        moved += 4 * k + 3 * v
    return Work(tokens * heads * flops, tokens * heads * moved * itemsize)


def attention_work(
    tokens: int, heads: int, width: int, length: int, both: bool, itemsize: int = 2
) -> Work:
    """The work of tiled causal attention: per half of the scores 2 products forward, 5 backward."""
    products = 7 if both else 2
    moved = (4 + 7) if both else 4
    flops = products * 2 * width * (length + 1) / 2
    return Work(tokens * heads * flops, tokens * heads * moved * width * itemsize)


def decoding_bytes(weights: float, state_read: float, state_written: float, batch: int) -> float:
    """Bytes moved in a decoding step: all weights once, and each row's reads and writes of state.

    A RetNet reads and writes its whole state; a Transformer reads all earlier keys and values.
    """
    return weights + batch * (state_read + state_written)
