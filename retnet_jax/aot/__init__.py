"""Compiles training steps ahead of time, and reports their memory and time.

    step = compile_step(config, tpus("v5p:4x4x4"))
    print(report(step).text())

compile_step.py  compiles, saves and loads the training step for any devices
evaluation.py    the memory of the evaluation during training
topologies.py    descriptions of devices that this machine does not have
fit.py           the search for the fastest mesh, micro-batches and recomputation
report.py        the costs of a step, from flops.py (matrix products) and hlo.py (memory, messages)
traffic.py       bytes that a compiled program moves between memory and chip
"""

from retnet_jax.aot.compile_step import CompiledStep, DoesNotFitError, load, save
from retnet_jax.aot.report import Report

__all__ = ["CompiledStep", "DoesNotFitError", "Report", "load", "save"]
