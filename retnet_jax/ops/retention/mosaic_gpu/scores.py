"""The decayed scores of all chunks at once: a kernel with one CTA for each chunk of a head."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from retnet_jax.ops.retention.document_index import Chunks
from retnet_jax.ops.retention.mosaic_gpu.memory import (
    ACC,
    AS_ROWS,
    OF_COLUMN,
    OF_ROW,
    TILE,
    TOKENS,
    Ref,
    along_columns,
    along_rows,
    load,
    operands,
    views,
)
from retnet_jax.shapes import Array, Float, LogDecay

# Tiles in each ring: 64 KiB, so that three CTAs on a multiprocessor load while others compute.
_MOST_STAGES = 4


# As `walk_segments`, which says why it is a jax.jit of its own.
@jax.jit(static_argnames=("stages", "interpret"))
def decayed_scores(
    q: Float[Array, "b t h a"],
    k: Float[Array, "b t h a"],
    log_decay: LogDecay,
    chunks: Chunks,
    stages: int,
    interpret: Any,
) -> Float[Array, "b h n l m"]:
    """gamma^(l-m) q_l k_m of the tokens of each chunk, 0 where l does not see m; bfloat16.

    `stages` is the number of tiles of q, and of k, that are in shared memory: at most all of a
    chunk. It has no effect on the results. `interpret` is `memory.interpreter()`.
    """
    b, _, h, width = q.shape
    n_chunks = chunks.count.shape[1]
    codes = jnp.where(chunks.real, chunks.index + 1, 0)  # numbers of documents, from 1; 0: padding
    n_tiles = pl.cdiv(width, TILE)

    def scores(q, k, log_decay, count, code, scores, *shared):
        row, head = jax.lax.axis_index("rows"), jax.lax.axis_index("heads")
        chunk = jax.lax.axis_index("chunks")
        shared = _Shared(*shared)
        products = _products(q, k, shared, row, head, chunk, n_tiles, stages)
        decay = _decay(log_decay, count, code, row, head, chunk)
        shared.scores[...] = (products * decay).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shared.scores, scores.at[row, head, chunk])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        scores,
        out_type=jax.ShapeDtypeStruct((b, h, n_chunks, TOKENS, TOKENS), q.dtype),
        scratch_types=tuple(
            _Shared(
                q=operands(stages),
                k=operands(stages),
                scores=plgpu.SMEM((TOKENS, TOKENS), jnp.bfloat16, transforms=AS_ROWS),
                loaded=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            )
        ),
        grid=(n_chunks, h, b),
        grid_names=("chunks", "heads", "rows"),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
    )(q, k, log_decay, chunks.count, codes)


def default_stages(width: int) -> int:
    """`stages` of `decayed_scores` where `tuned.json` has none."""
    return min(_MOST_STAGES, pl.cdiv(width, TILE))


class _Shared(NamedTuple):
    """Shared memory and barriers of a CTA."""

    q: Ref  # ring of tiles
    k: Ref  # ring of tiles
    scores: Ref
    loaded: Ref  # a barrier for each slot of the rings


def _products(q, k, shared: _Shared, row, head, chunk, n_tiles: int, stages: int):
    """The float32 scores q k^T [64 64] of a chunk of a head."""

    def fetch(j):
        slot = jax.lax.rem(j, stages)
        place = (row, pl.ds(chunk * TOKENS, TOKENS), head, pl.ds(j * TILE, TILE))
        for array, tiles in ((q, shared.q), (k, shared.k)):
            rows, _ = views(tiles)
            plgpu.copy_gmem_to_smem(array.at[place], rows.at[slot], shared.loaded.at[slot])

    def product(total):
        (_, q), (_, k) = views(shared.q), views(shared.k)

        @pl.loop(0, n_tiles)
        def _(j):
            slot = jax.lax.rem(j, stages)
            plgpu.barrier_wait(shared.loaded.at[slot])
            plgpu.wgmma(total, q.at[slot], k.at[slot].T)
            plgpu.wgmma_wait(0)

            @pl.when(j + stages < n_tiles)
            def _():
                fetch(j + stages)

        return total[...]

    pl.loop(0, stages)(fetch)
    return pl.run_scoped(product, ACC((TOKENS, TOKENS), jnp.float32))


def _decay(log_decay, count, code, row, head, chunk):
    """gamma^(l-m) [64 64] in real tokens, 0 where l does not see m."""

    def of_pair(numbers):
        ends = (
            load(numbers.at[row, chunk], layout, optimized=False) for layout in (OF_ROW, OF_COLUMN)
        )
        return [along(x) for along, x in zip((along_rows, along_columns), ends, strict=True)]

    (query, key), (query_code, key_code) = of_pair(count), of_pair(code)
    sees = (query_code == key_code) & (query_code > 0) & (query >= key)
    distance = (query - key).astype(jnp.float32)
    return jnp.exp(jnp.where(sees, log_decay[head] * distance, -jnp.inf))
