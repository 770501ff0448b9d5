"""The state that a run begins with: of its newest intact checkpoint, of a model, or a fresh one."""

import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from retnet_jax.config import Config
from retnet_jax.errors import CheckpointError, DamagedCheckpointError
from retnet_jax.files.paths import place
from retnet_jax.pretrained import load_checkpoint, run_options
from retnet_jax.runs import checkpoint_files
from retnet_jax.runs.checkpoint import Checkpoints
from retnet_jax.runs.workdir import progress_of_old_checkpoint
from retnet_jax.training.step import TrainState, initial_state, state_of


class RunProgress(NamedTuple):
    """How far a run is: what a checkpoint holds beside the arrays of the state."""

    next_batch: int = 0  # number of the batch that comes next
    run_began: float = 0.0  # when the run was first started, seconds since 1970
    training_seconds: float = 0.0  # that its steps took, those not counted that were lost


def start_or_restore(
    config: Config,
    mesh: jax.sharding.Mesh,
    state_shape: TrainState,
    checkpoints: Checkpoints,
    workdir: epath.Path,
) -> tuple[TrainState, RunProgress, list[str]]:
    """The state of the newest intact checkpoint, or a fresh one.

    Returns:
      The state, the progress, and one line for each checkpoint that is damaged or unchecked.

    Raises:
      CheckpointError: if there are checkpoints but none is intact.
    """
    shardings = jax.tree.map(lambda x: x.sharding, state_shape)
    problems: list[str] = []
    for step in checkpoints.steps():
        try:
            items, found = checkpoints.restore(step, items_of(state_shape))
        except DamagedCheckpointError as error:
            problems.append(f"{error}; it is set aside, and the one before is used")
            checkpoints.set_aside(step)
            continue
        if found.get("format", 1) < checkpoint_files.FORMAT:
            problems.append(
                f"checkpoint {step} was written without digests: that its numbers are still those "
                "that were written cannot be checked"
            )
        if "run_began" not in found:
            found |= progress_of_old_checkpoint(workdir, step)
        progress = RunProgress(**{name: found[name] for name in RunProgress._fields})
        count = jax.device_put(np.int32(step), shardings.step)
        return TrainState(step=count, **items), progress, problems
    if problems:
        raise CheckpointError("\n".join([*problems, "there is no other checkpoint"]))
    progress = RunProgress(run_began=time.time())
    if config.init_from:
        model, _ = load_checkpoint(place(config.init_from), mesh, **run_options(config.model))
        begin = jax.jit(partial(state_of, config), out_shardings=shardings, donate_argnums=0)
        return begin(model), progress, []
    return jax.jit(partial(initial_state, config), out_shardings=shardings)(), progress, []


def check_finite(state: TrainState, config: Config, workdir: epath.Path) -> None:
    """Raises `CheckpointError` if a state to begin with has numbers that are not finite.

    A step never makes any (`training/step.py`), so none is ever saved.
    """
    if not bool(_is_finite(items_of(state))):
        origin = f"checkpoint {workdir / 'checkpoints' / str(int(state.step))}"
        if config.init_from and not int(state.step):
            origin = f"init_from={config.init_from}"
        raise CheckpointError(
            f"{origin} has parameters or moments that are NaN or infinite: it cannot be trained "
            "further; begin with another checkpoint"
        )


@jax.jit
def _is_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()


def items_of(state: TrainState) -> dict[str, Any]:
    """The parts of a state that a checkpoint holds, by name; its step is the checkpoint's own."""
    items = state._asdict()
    del items["step"]
    return items
