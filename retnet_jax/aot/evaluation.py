"""What the evaluation inside training needs: the held-out loss, beside the whole training state."""

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
    """Bytes of one device."""

    temporary_bytes: int  # activations, buffers
    peak_bytes: int  # with the optimiser's state and all else that waits for the next step


def evaluation_memory(step: CompiledStep) -> EvaluationMemory:
    """Compiles the program of the held-out loss for the mesh of a step, to see what it needs.

    It runs one micro-batch. An evaluator of `train(evaluators=...)` may need more.

    Raises:
      DoesNotFitError: as `compile_step`.
    """
    of_what = "evaluation inside training", step.config, step.mesh
    lowered = lower_evaluation(step.config, step.mesh, step.state)
    memory = memory_of(compile_if_it_fits(lowered, *of_what))
    # The program gets the model alone, and the rest of the state stays where it is.
    peak = peak_bytes(memory) + device_bytes(step.state._replace(model=None))
    check_memory(peak, *of_what)
    return EvaluationMemory(memory.temp_size_in_bytes, peak)


def lower_evaluation(config: Config, mesh: Mesh, state: TrainState) -> jax.stages.Lowered:
    """The program that `HeldOutLoss` runs, of shapes and shardings."""
    rows = config.train.batch_size // config.train.micro_batches
    part = replace(config, train=replace(config.train, batch_size=rows, micro_batches=1))
    with jax.set_mesh(mesh):
        return first_rows_loss.lower(state.model, abstract_batch(part, mesh), rows)
