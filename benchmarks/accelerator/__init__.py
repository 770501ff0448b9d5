"""The speed of this project on one accelerator, compared with the limits of the device.

    python -m benchmarks.accelerator [--minutes=10] [--sections=checks,limits,kernels,...]
    python -m benchmarks.accelerator --only="6.7B retnet"   # only cases with such names
    python -m benchmarks.accelerator --tiny          # small shapes, to test the script
    python -m benchmarks.accelerator --resume        # continues a run that was out of time
    python -m benchmarks.accelerator --plot_only     # only tables and plots, from the JSON
    python -m benchmarks.accelerator --sweep         # only the fastest tilings of Hopper kernels
    python -m benchmarks.accelerator.fla_compile     # before: saves fla's tuning its minutes

It runs on the first device of jax, and writes `accelerator.json`, `.md` (the tables) and `.png` to
`benchmarks/results/`, or beside `--output=FILE.json`. It needs jax, flax and optax; for comparisons
also torch and fla, and for plots matplotlib.

    checks.py     the kernel's results and gradients, compared with XLA's
    limits.py     limits of the device: copy bandwidth, and rate of matrix products
    kernels.py    implementations of retention, fla (fla_kernel.py, and fla_compile.py, which
                  compiles its variants in parallel), and cuDNN attention
    training.py   the training step: tokens/s, model FLOPs utilisation, memory
    decoding.py   reading prompts and generating: latency, tokens/s, the best batch size
    bounds.py     lower bounds of their times
    report.py     tables and goals, and plots.py: plots, from the JSON
    sections.py   the sections; cases.py: measures case by case and writes the JSON
    supervisor.py runs each section in a process, within the time
    sweep.py      the tilings of the Hopper kernels, and the table of the fastest

How it measures. Times of kernels are device times: one program computes two independent sets of
inputs, each larger than the caches; a few such programs are enqueued, and the host waits once. The
median of five such rounds is reported. XLA cannot simplify such a program. `host_share`, the part
of a round in which the host was still enqueuing, shows whether the host was the limit. fla is timed
by CUDA events around a similar number of calls, in the same process and on the same arrays.
Training steps are enqueued together and timed by the arrival of their metrics; decoding runs in one
compiled loop. Memory is the compiler's count of arguments, results and temporaries.

Each section runs in its own process, so that its memory is free at the start. The most important
section comes first, and in each section the most important case. A case that raises, ends its
process or never ends is recorded with the reason, and the script continues. The JSON is written
after every case. When `--minutes` are over, the remaining cases are listed as not reached.
"""
