"""Training steps compiled before the hardware is there: what they need, and programs to start with.

step = compile_step(config, topologies.tpus("v5p:4x4x4"))
print(report(step).text())
"""

from retnet_jax.aot.compile_step import CompiledStep, DoesNotFitError, compile_step, load, save
from retnet_jax.aot.fit import fit, ranking
from retnet_jax.aot.hlo import Messages, Program
from retnet_jax.aot.report import Report, report

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
