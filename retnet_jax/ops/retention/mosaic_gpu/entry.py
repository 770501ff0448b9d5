"""Chunkwise retention and its gradient with the two kernels; rows are segmented to fill the GPU."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from retnet_jax.ops.retention.decay import decay_gradient, power_of_decay
from retnet_jax.ops.retention.document_index import Chunks, Documents, one_document
from retnet_jax.ops.retention.mosaic_gpu import memory, tuned
from retnet_jax.ops.retention.mosaic_gpu.memory import TILE, TOKENS
from retnet_jax.ops.retention.mosaic_gpu.scores import decayed_scores
from retnet_jax.ops.retention.mosaic_gpu.tiling import Tiling
from retnet_jax.ops.retention.mosaic_gpu.walk import walk_segments
from retnet_jax.ops.retention.xla import zero_state
from retnet_jax.parallel.mesh import backend
from retnet_jax.shapes import Array, Float, Keys, LogDecay, Queries, RetentionMatrix, Values

WIDEST = 512  # columns of a head: two warpgroups with 4 tiles of T each
MULTIPLE = 8  # head widths are multiples of it: TMA's strides are multiples of 16 bytes
SHORTEST_SEGMENT = 8  # chunks; shorter ones do not pay for the walk that computes states
HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")  # matches device kinds
PROCESSORS = 132  # streaming multiprocessors of an H100 or H200 (SXM)


def chunkwise(
    q: Queries,
    k: Keys,
    v: Values,
    log_decay: LogDecay,
    state: RetentionMatrix | None,
    documents: Documents | None,
    chunk_size: int | None = None,
) -> tuple[Values, RetentionMatrix]:
    """`xla.chunkwise` in chunks of 64 tokens, for bfloat16 inputs; `state=None` is 0.

    The backward pass keeps the inputs and the final state, and recomputes everything else.

    Raises:
      NotImplementedError: with the reason from `unsupported`.
    """
    if reason := unsupported(q, k, v, chunk_size):
        raise NotImplementedError(reason)
    if state is None:
        state = zero_state(q, v)
    return _retention(q, k, v, log_decay, state, documents)


def unsupported(q, k, v, chunk_size: int | None = None) -> str | None:
    """Why `chunkwise` cannot run arrays of these shapes on the backend; None if it can."""
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"q, k and v are {q.dtype}, {k.dtype}, {v.dtype}; it takes only bfloat16"
    if chunk_size not in (None, TOKENS):
        return f"chunk_size={chunk_size}; its chunks have {TOKENS} tokens"
    for name, width in (("key", q.shape[3]), ("value", v.shape[3])):
        if width % MULTIPLE or not TILE <= width <= WIDEST:
            return (
                f"{name} heads are {width} wide; it takes only multiples of {MULTIPLE} from {TILE} "
                f"to {WIDEST}"
            )
    platform = backend()
    if platform == "cpu":
        if not hasattr(plgpu, "InterpretGPUParams"):
            return f"jax {jax.__version__} cannot interpret it on a CPU; jax 0.11 can"
        return None
    device = jax.devices()[0] if _mesh().empty else _mesh().abstract_device
    if platform != "gpu" or not HOPPER.search(device.device_kind):
        return f"the backend is {platform} ({device.device_kind}), not a Hopper GPU"
    return None


def _mesh():
    return jax.sharding.get_abstract_mesh()


@jax.custom_vjp
def _retention(q, k, v, log_decay, state, documents):
    return _forward(q, k, v, log_decay, state, documents)[0]


def _forward(q, k, v, log_decay, state, documents):
    chunks = _chunks(documents, *q.shape[:2])
    scores = scores_of_chunks(q, k, log_decay, chunks)
    y, after = recurrence(q, k, v, scores, log_decay, chunks, state.swapaxes(2, 3))
    after = after.swapaxes(2, 3)
    return (y, after), (q, k, v, log_decay, state, documents, after)


def _backward(saved, cotangents):
    q, k, v, log_decay, state, documents, after = saved
    d_y, d_after = cotangents
    chunks = _chunks(documents, *q.shape[:2])
    backwards = partial(recurrence, log_decay=log_decay, chunks=chunks, reverse=True)
    scores = scores_of_chunks(d_y, v, log_decay, chunks)
    d_q, _ = recurrence(d_y, v, k, scores, log_decay, chunks, state)
    d_k, d_state = backwards(v, d_y, q, scores, state=d_after)
    scores = scores_of_chunks(q, k, log_decay, chunks)
    d_v, _ = backwards(k, q, d_y, scores, state=d_after.swapaxes(2, 3))
    d_log_decay = decay_gradient(q, d_q, k, d_k, after, d_after, documents)
    return d_q, d_k, d_v, d_log_decay, d_state, None


_retention.defvjp(_forward, _backward)


def scores_of_chunks(
    q: Float[Array, "b t h a"],
    k: Float[Array, "b t h a"],
    log_decay: LogDecay,
    chunks: Chunks,
    stages: int | None = None,
) -> Float[Array, "b h n l m"]:
    """`decayed_scores` with `stages`; None: the number that `tuned` has for this device."""
    if stages is None:
        stages = tuned.stages(tuned.Scores(q.shape[3], q.shape[1]))
    return decayed_scores(q, k, log_decay, chunks, stages, memory.interpreter())


def _chunks(documents: Documents | None, rows: int, length: int) -> Chunks:
    return (one_document(rows, length) if documents is None else documents).chunks(TOKENS)


def recurrence(
    q: Float[Array, "b t h a"],
    k: Float[Array, "b t h a"],
    v: Float[Array, "b t h c"],
    scores: Float[Array, "b h n l m"],
    log_decay: LogDecay,
    chunks: Chunks,
    state: Float[Array, "b h c a"],
    reverse: bool = False,
    tiling: Tiling | None = None,
) -> tuple[Float[Array, "b t h c"], Float[Array, "b h c a"]]:
    """`walk_segments` for whole rows, or for segments that each begin with their own state.

    `tiling=None` is the one to use on this device; `tuned` chooses it.
    """
    b, t, h, contracted = q.shape
    written = v.shape[3]
    if tiling is None:
        tiling = tuned.tiling(tuned.Walk(contracted, written, t, reverse))
    n_chunks = chunks.count.shape[1]
    # Sums depend on the segments, so these do not depend on the table of tilings.
    ctas = b * h * pl.cdiv(written, Tiling.of(contracted, written).rows)
    length = _segment_length(ctas, n_chunks)
    factors = _factors(log_decay, chunks, reverse)
    rows, columns = tiling.whole(written)
    state = jnp.pad(state, ((0, 0), (0, 0), (0, rows - written), (0, columns - contracted)))
    segments = list(itertools.pairwise([*range(0, n_chunks, length), n_chunks]))
    if reverse:
        segments.reverse()
    walk = partial(
        walk_segments,
        length=length,
        reverse=reverse,
        tiling=tiling,
        interpret=memory.interpreter(),
    )
    states = [state]
    if len(segments) > 1:
        # The states that segments leave when they begin empty; the last one's is not needed.
        # [b s-1 h rows columns]
        _, left = walk(None, k, v, None, factors, None)
        if reverse:
            left = left[:, ::-1]
        for i, segment in enumerate(segments[:-1]):
            decay = _across(log_decay, chunks, *segment)
            states.append(decay[..., None, None] * states[-1] + left[:, i])
    if reverse:
        states.reverse()
    states = jnp.stack(states, axis=1)
    y, after = walk(q, k, v, scores, factors, states)
    assert y is not None  # which it is only without queries
    return y, after[:, 0 if reverse else -1, :, :written, :contracted]


def _factors(log_decay: LogDecay, chunks: Chunks, reverse: bool) -> Float[Array, "b h n 3 l"]:
    """Powers of gamma in each chunk: for what tokens read, for what they write, and across it."""
    power = partial(power_of_decay, log_decay)
    from_start = power(chunks.from_start, chunks.reads_start)  # [b h n l], as the next two
    to_end = power(chunks.to_end, chunks.writes_end)
    across = jnp.broadcast_to(power(chunks.across, chunks.passes), to_end.shape)
    ends = (to_end, from_start) if reverse else (from_start, to_end)
    return jnp.stack([*ends, across], axis=3)


def _across(log_decay: LogDecay, chunks: Chunks, start: int, end: int) -> Float[Array, "b h"]:
    """gamma^tokens across the chunks from `start` up to `end`; 0 if there is a border in them."""
    return power_of_decay(
        log_decay,
        chunks.count_after[:, end - 1, 0] - chunks.count_before[:, start, 0],
        chunks.index_after[:, end - 1, 0] == chunks.index_before[:, start, 0],
    )


def _segment_length(ctas: int, n_chunks: int) -> int:
    """Chunks in a segment: enough segments to fill the GPU, but no short ones."""
    segments = max(1, min(PROCESSORS // ctas, n_chunks // SHORTEST_SEGMENT))
    return pl.cdiv(n_chunks, segments)
