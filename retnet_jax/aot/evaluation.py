"""The memory of the evaluation during training: of the held-out loss and the training state."""

from dataclasses import replace
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from retnet_jax.aot.compile_step import (
    CompiledStep,
    check_memory,
    compile_if_it_fits,
    device_bytes,
)
from retnet_jax.aot.hlo import memory_of, peak_bytes
from retnet_jax.config import Config
from retnet_jax.training.held_out_loss import first_rows_loss
from retnet_jax.training.step import TrainState, abstract_batch


class EvaluationMemory(NamedTuple):
    """Memory of one device, in bytes."""

    temporary_bytes: int  # activations and buffers
    peak_bytes: int  # including the whole training state


def evaluation_memory(step: CompiledStep) -> EvaluationMemory:
    """Compiles the held-out loss of one micro-batch for the mesh of a step; returns its memory.

    Other evaluators (`train(evaluators=...)`) may need more.

    Raises:
      DoesNotFitError: as `compile_step`.
    """
    of_what = "evaluation during training", step.config, step.mesh
    lowered = lower_evaluation(step.config, step.mesh, step.state)
    memory = memory_of(compile_if_it_fits(lowered, *of_what))
    # Only the model is an argument of the program; the rest of the state stays on the device too.
    peak = peak_bytes(memory) + device_bytes(step.state._replace(model=None))
    check_memory(peak, *of_what)
    return EvaluationMemory(memory.temp_size_in_bytes, peak)


def lower_evaluation(config: Config, mesh: Mesh, state: TrainState) -> jax.stages.Lowered:
    """Lowers the program that `HeldOutLoss` runs, from shapes and shardings."""
    rows = config.train.batch_size // config.train.micro_batches
    part = replace(config, train=replace(config.train, batch_size=rows, micro_batches=1))
    with jax.set_mesh(mesh):
        return first_rows_loss.lower(state.model, abstract_batch(part, mesh), rows)
