"""Chunkwise retention on Hopper GPUs: Pallas kernels for H100 and H200, forward and backward.

One kernel, `walk`, computes the recurrence. With A the contracted and B the written width,

    y_l = read_l T q_l + sum_s P_ls v_s        T <- across T + sum_s write_s v_s^T k_s

over the chunks of a row, forwards or backwards, with T [B A] the transposed state. It computes the
outputs and all three gradients:

               q     k     v     direction   T        A   B
    y          q     k     v     forwards    S^T      k   v
    d_q        d_y   v     k     forwards    S        v   k
    d_k        v     d_y   q     backwards   d_S      v   k
    d_v        k     q     d_y   backwards   d_S^T    k   v

P [64 64] of a chunk are the decayed scores, which the kernel `scores` computes for all chunks at
once: those of (q, k) for y and d_v, those of (d_y, v) for d_q and d_k. The rows of T are divided
over CTAs (cooperative thread arrays), which then need no results of each other.

How a CTA works. T stays in the registers of one or two warpgroups, 64 of its rows in each, as
the left operand of T q and as accumulators: 128 float32 a thread for A = 256. A wider A is halved
between two warpgroups, which add their T q through shared memory. One more warpgroup loads tiles of
64 tokens by 64 columns (128 bytes of bfloat16, the widest swizzle) through the TMA, into a ring
buffer, one or two chunks ahead. TMA reads and writes [b t h k] in place. Beyond the end of a row or
a head it reads 0 and writes nothing. Two CTAs that differ only in their columns form a cluster:
each loads half of q, k and P for both.

Costs for a token and head of width 256/512, at the 790 TFLOP/s and 4.3 TB/s that an H200 reaches,
counted; an H100 took 2.4 ns forward and 8.4 ns both (docs/measurements.md):
  forward   `walk` 4 K V + 128 V FLOPs, 0.75 ns; q, k, v, y and 128 bytes of P, 0.75 ns.
            `scores` 128 K FLOPs, 0.04 ns; q and k once more and P, 0.27 ns.
  backward  three walks, 12 K V + 256 K + 128 V FLOPs, 2.16 ns; 3.2 KB each, 2.23 ns.
            The scores of (d_y, v) and (q, k), 0.12 ns; 3.3 KB, 0.77 ns.
- Chunks of 64 tokens balance computation and memory. 128 would add 128 V + 128 K FLOPs, a tenth,
  and halve the number of chunks in flight: q and k of a chunk already take 64 KiB (forward) or
  128 KiB (d_q, d_k).
- If `walk` computed P itself, all V / 128 or K / 64 CTAs of a head would repeat it: 0.16 instead
  of 0.27 ns forward, 0.9 instead of 0.8 ns backward, in warpgroups whose registers are full.
- Backward does two K V multiply-adds more than necessary, since d_k and d_v each accumulate d_S,
  in different orientations. With V divided over 4 CTAs instead, d_q and d_k would each be sums of
  4 float32 parts: 8 KiB to write and read again.

Where there are too few CTAs for the GPU, rows are divided into segments. A first walk computes the
states that segments leave when they begin empty; their decayed sums are the states with which the
segments begin (retention is linear in the state). It reads only k and v and takes half the FLOPs.

`entry.py` has the function and its gradient, `walk.py` and `scores.py` a kernel each, `tiling.py`
the division of the work, `tuned.py` the choice of a tiling for a device, `memory.py` helpers of
both kernels.
"""

from retnet_jax.ops.retention.mosaic_gpu.entry import chunkwise, unsupported

__all__ = ["chunkwise", "unsupported"]
