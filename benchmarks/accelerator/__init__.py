"""What one accelerator does with this project, beside what it could do.

    python -m benchmarks.accelerator [--minutes=10] [--sections=limits,kernels,training,decoding]
    python -m benchmarks.accelerator --tiny          # small shapes, to see that the script works
    python -m benchmarks.accelerator --resume        # goes on where the last call was out of time
    python -m benchmarks.accelerator --plot_only     # table and plots again, from the JSON

It runs on whatever jax finds, and writes `accelerator.json`, `.md` (the tables) and `.png` into
`benchmarks/results/`, or where `--output=FILE.json` says. It needs jax, flax and optax; torch and
fla where they are to be compared with, and matplotlib for the plots.

    limits.py     what the device can do: its copy bandwidth, and its rate of matrix products
    kernels.py    retention by each implementation, beside fla (fla_kernel.py) and cuDNN attention
    training.py   the training step: tokens/s, model FLOPs utilisation, memory
    decoding.py   reading prompts and generating: latency, tokens/s, the best batch
    bounds.py     the least time that any of these can take
    report.py     tables, goals and plots, from the JSON alone
    sections.py   what belongs together; cases.py: measured case by case, into the JSON
    supervisor.py a process for each section, and the time

How it measures. Time of kernels is device time: one program computes two independent sets of
inputs, each larger than caches, a few such programs are enqueued, and the host waits once; the
median of five such rounds counts. XLA cannot lift anything out of that, and `host_share`, the
part of a round in which the host was still enqueuing, says whether the host was the limit. fla is
timed by CUDA events around as many calls, in the same process and on the same arrays. Steps of
training are enqueued together and timed by when their metrics arrive; decoding runs in one compiled
loop. Memory is the compiler's: arguments, results and all between.

Each section runs in a process of its own, so that none finds the memory of another in use, the
most important first and in each the most important case first. What is not possible is recorded
with its reason, and the script goes on: a case that raises, one that ends its process, and one that
never ends. The JSON is written after every case. It keeps to `--minutes`: what was not reached is
listed as that.
"""
