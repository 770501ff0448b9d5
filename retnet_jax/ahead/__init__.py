"""Training steps compiled before the hardware is there: what they need, and programs to start with.

step = compile_step(config, topologies.tpus("v5p:4x4x4"))
print(report(step).text())
"""

from retnet_jax.ahead.fit import fit, ranking
from retnet_jax.ahead.program import Messages, Program
from retnet_jax.ahead.report import Report, report
from retnet_jax.ahead.step import CompiledStep, DoesNotFitError, compile_step, load, save

__all__ = [
    "CompiledStep",
    "DoesNotFitError",
    "Messages",
    "Program",
    "Report",
    "compile_step",
    "fit",
    "load",
    "ranking",
    "report",
    "save",
]
