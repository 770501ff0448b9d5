"""Training steps compiled ahead of time: what they need, and programs to start with.

    step = compile_step(config, tpus("v5p:4x4x4"))
    print(report(step).text())

compile_step.py  the step that train.py runs, compiled for any devices; saved and loaded
evaluation.py    the memory of the evaluation inside training
topologies.py    devices that this machine does not have
fit.py           the search for the mesh, micro-batches and recomputation that train fastest
report.py        what a step costs, from flops.py (matrix products) and hlo.py (memory, messages)
traffic.py       bytes that a compiled program moves through memory
"""

from retnet_jax.aot.compile_step import CompiledStep, DoesNotFitError, load, save
from retnet_jax.aot.report import Report

__all__ = ["CompiledStep", "DoesNotFitError", "Report", "load", "save"]
