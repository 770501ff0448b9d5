"""The state that a run begins with: its newest intact checkpoint, a trained model, or a new one."""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from retnet_jax.config import Config
from retnet_jax.errors import CheckpointError, DamagedCheckpointError
from retnet_jax.pretrained import load_checkpoint, run_options
from retnet_jax.runs import checkpoint_files
from retnet_jax.runs.checkpoint import Checkpoints
from retnet_jax.runs.workdir import progress_of_old_checkpoint
from retnet_jax.training.step import TrainState, initial_state, state_of


class RunProgress(NamedTuple):
    """The progress of a run, which a checkpoint holds beside the arrays of the state."""

    next_batch: int = 0  # number of the next batch
    run_began: float = 0.0  # time of the run's first start, in seconds since 1970
    training_seconds: float = 0.0  # spent in its steps; a repeated step counts once


def start_or_restore(
    config: Config,
    mesh: jax.sharding.Mesh,
    state_shape: TrainState,
    checkpoints: Checkpoints,
    workdir: epath.Path,
) -> tuple[TrainState, RunProgress, list[str]]:
    """The state of the newest intact checkpoint; without one, of `init_from` or a new one.

    Returns:
      The state, the progress, and a message for each checkpoint that is damaged or unchecked.

    Raises:
      CheckpointError: if there are checkpoints but none is intact.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state_shape)
    problems: list[str] = []
    damaged: list[int] = []
    for step in checkpoints.steps():
        try:
            items, found = checkpoints.restore(step, items_of(state_shape))
        except DamagedCheckpointError as error:
            problems.append(str(error))
            damaged.append(step)
            continue
        # Only now: with all renamed, the same command would begin the run anew.
        for each in damaged:
            checkpoints.set_aside(each)
        problems = [f"{each}; it is renamed, and an older checkpoint is used" for each in problems]
        if found.get("format", 1) < checkpoint_files.FORMAT:
            problems.append(
                f"checkpoint {step} was written without digests: damage to its numbers cannot be "
                "detected"
            )
        if "run_began" not in found:
            found |= progress_of_old_checkpoint(workdir, step)
        progress = RunProgress(**{name: found[name] for name in RunProgress._fields})
        count = jax.device_put(np.int32(step), shardings.step)
        return TrainState(step=count, **items), progress, problems
    problems += [
        f"checkpoint {path} was found damaged before" for path in checkpoints.set_aside_before()
    ]
    if problems:
        advice = (
            "there is no other checkpoint: copy an intact one to its place, or train in another "
            "workdir"
        )
        raise CheckpointError("\n".join([*problems, advice]))
    progress = RunProgress(run_began=time.time())
    if config.init_from:
        model, _ = load_checkpoint(config.init_from, mesh, **run_options(config.model))
        begin = jax.jit(partial(state_of, config), out_shardings=shardings, donate_argnums=0)
        return begin(model), progress, []
    return jax.jit(partial(initial_state, config), out_shardings=shardings)(), progress, []


def check_finite(state: TrainState, config: Config, workdir: epath.Path) -> None:
    """Raises `CheckpointError` if a run would begin with numbers that are not finite.

    A training step never produces them (`step.py`), so no checkpoint of a run has any.
    """
    if not bool(_is_finite(items_of(state))):
        origin = f"checkpoint {workdir / 'checkpoints' / str(int(state.step))}"
        if config.init_from and not int(state.step):
            origin = f"init_from={config.init_from}"
        raise CheckpointError(
            f"{origin} has parameters or moments that are NaN or infinite, so it cannot be trained "
            "further; use another checkpoint"
        )


@jax.jit
def _is_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def items_of(state: TrainState) -> dict[str, Any]:
    """The parts of a state that a checkpoint stores, by name; the step names the checkpoint."""
    items = state._asdict()
    del items["step"]
    return items
