"""Compiles the kernels of fla's chunk_retention in parallel, before they are tuned and measured.

    python -m benchmarks.accelerator.fla_compile [--shapes=256/512,128/128] [--processes=16]

fla tunes its kernels at the first call: it compiles more than a hundred variants for a shape, one
after another, which takes minutes. Here each process compiles a part of them on a few tokens, into
Triton's cache on disk. fla's own tuning then only has to time them.
"""

import os
import subprocess
import sys

from absl import app, flags

from benchmarks.accelerator.kernels import KEYS

flags.DEFINE_list("shapes", ["256/512", "128/128"], "Widths of keys and values, in order")
flags.DEFINE_integer("processes", os.cpu_count(), "Number of processes", lower_bound=1)
flags.DEFINE_integer("part", None, "Part to compile; used for the processes that are started")

_TOKENS = 512  # the variants do not depend on the length


def main(_) -> None:
    args = flags.FLAGS
    shapes = [tuple(map(int, shape.split("/"))) for shape in args.shapes]
    if args.part is not None:
        compile_part(shapes, args.part, args.processes)
        return
    command = [sys.executable, "-m", "benchmarks.accelerator.fla_compile"]
    command += [f"--shapes={','.join(args.shapes)}", f"--processes={args.processes}"]
    # Results of tuning a part must not be kept.
    environment = os.environ | {"FLA_CACHE_RESULTS": "0"}
    started = [
        subprocess.Popen([*command, f"--part={part}"], env=environment)
        for part in range(args.processes)
    ]
    if failed := sum(process.wait() != 0 for process in started):
        sys.exit(f"{failed} of {args.processes} processes failed; see their output")


def compile_part(shapes: list[tuple[int, int]], part: int, parts: int) -> None:
    """Compiles every `parts`-th variant of each kernel, for each shape; runs each variant once."""
    import torch
    from fla.ops.retention import chunk_retention
    from triton.runtime.autotuner import Autotuner

    all_of = Autotuner.prune_configs

    def of_this_part(self, kwargs):
        found = all_of(self, kwargs)
        # One of them has to run: the one that needs the least shared memory.
        least = min(found, key=lambda x: (*x.kwargs.values(), x.num_stages))
        return [*found[part::parts], least]

    def run_once(call, quantiles):
        call()
        return [0.0] * len(quantiles)

    Autotuner.prune_configs = of_this_part
    Autotuner.do_bench = property(lambda self: run_once)
    for key, value in shapes:
        q, k, v = (
            torch.randn(1, _TOKENS, KEYS // key, width, device="cuda", dtype=torch.bfloat16)
            for width in (key, key, value)
        )
        with torch.no_grad():
            chunk_retention(q, k, v, scale=1.0)
        arrays = [x.requires_grad_() for x in (q, k, v)]
        y, _ = chunk_retention(*arrays, scale=1.0)
        torch.autograd.grad(y, arrays, torch.ones_like(y))
        print(f"fla {key}/{value}: part {part} is compiled", flush=True)


if __name__ == "__main__":
    app.run(main)
