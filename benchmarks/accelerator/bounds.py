"""The least time of a computation: its FLOPs at the matrix rate, or its bytes at the bandwidth.

Bytes are counted once: each input read, each output written; states stay on the chip.
"""

from typing import NamedTuple

# Of the roofline: with states on the chip the score products are cheapest in short chunks, but the
# matrix units want no fewer rows than this.
CHUNK = 128


class Work(NamedTuple):
    """What has to be computed and moved, at least."""

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
    """Chunkwise retention, forward or forward and backward ("both").

    A token and head take 4KV + c(K+V) FLOPs forward: writing and reading the state, and half
    of the c by c scores and of their product with v. Backward takes 10KV + c(3K+2V): states again
    and four products with states, five with scores. Forward reads q, k, v and writes y; backward
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
    """Causal attention in blocks: two products with half of the scores forward, five backward."""
    products = 7 if both else 2
    moved = (4 + 7) if both else 4
    flops = products * 2 * width * (length + 1) / 2
    return Work(tokens * heads * flops, tokens * heads * moved * width * itemsize)


def decoding_bytes(weights: float, state_read: float, state_written: float, batch: int) -> float:
    """Of one step of a batch: all weights once, and of each row what it reads and writes.

    A RetNet reads and writes its whole state; a Transformer reads the keys and values so far.
    """
    return weights + batch * (state_read + state_written)
