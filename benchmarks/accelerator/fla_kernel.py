"""The chunk_retention of flash-linear-attention (torch and Triton), timed by CUDA events."""

from collections.abc import Sequence

import numpy as np

from benchmarks.accelerator.timing import REPEATS, Measured, rounds


def measure(sets: Sequence[tuple], kind: str) -> Measured:
    """Times chunk_retention on jax's arrays.

    Args:
      sets: Sets of q, k, v and dy from `kernels.inputs`.
      kind: "forward", or "both" with the gradients of q, k and v.

    Raises:
      ImportError: if torch or fla is not installed.
      NotImplementedError: if torch has no GPU.
    """
    import torch
    from fla.ops.retention import chunk_retention

    if not torch.cuda.is_available():
        raise NotImplementedError("torch finds no GPU, and fla's kernels need one")
    shared = [[torch.from_dlpack(x) for x in arguments] for arguments in sets]

    def forward(q, k, v, dy):
        with torch.no_grad():
            return (chunk_retention(q, k, v, scale=1.0)[0],)

    def both(q, k, v, dy):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        y, _ = chunk_retention(q, k, v, scale=1.0)
        return y.detach(), *torch.autograd.grad(y, (q, k, v), dy)

    function = {"forward": forward, "both": both}[kind]
    first = function(*shared[0])  # also compiles and tunes
    times = rounds(
        lambda: [function(*arguments) for arguments in shared],
        lambda _: torch.cuda.synchronize(),
        len(shared),
        REPEATS,
    )
    return Measured(times | _event_times(torch, function, shared, times["ms"]), first, {})


def _event_times(torch, function, shared, host_ms: float) -> dict:
    """Device milliseconds between two events around the calls of a round."""
    calls = max(1, min(24, round(50 / (host_ms * len(shared)))))
    samples = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            for arguments in shared:
                function(*arguments)
        end.record()
        torch.cuda.synchronize()
        samples.append(begin.elapsed_time(end) / calls / len(shared))
    return {"ms": float(np.median(samples)), "samples_ms": samples}
