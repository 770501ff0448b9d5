"""Checkpoints of training states: the one file that knows Orbax.

A checkpoint is a directory named by its step: `model` and `optimizer` hold arrays under names such
as `layers/mixer/q/kernel`, `progress` the place in the data. It is written under another name and
renamed when complete, so what carries a step's name is whole.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from retnet_jax.errors import CheckpointError
from retnet_jax.sharding import path_name


class Checkpoints:
    """The checkpoints of one run, written while training goes on.

    Args:
      directory: holds one directory for each checkpoint; created when it is not there.
      keep: the number of newest checkpoints that are not deleted.
    """

    def __init__(self, directory: Path, keep: int):
        self._directory = directory
        # What a killed run left unfinished. Orbax can do this too, but in the background, where it
        # can meet the next save to the same step.
        for unfinished in directory.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(unfinished)
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.LatestN(keep),
            ),
        )

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, model: Any, optimizer: Any, carry: Any = None) -> None:
        """Copies the state and begins to write it; `carry` only if there is one.

        Raises:
          CheckpointError: if the disk has no room for it, or the save before this one failed and
            nobody waited for it; older checkpoints stay good.
        """
        with self._reporting():
            trees = _present(model=model, optimizer=optimizer, carry=carry)
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
            free = shutil.disk_usage(self._directory).free
            if free < needed:
                raise OSError(f"{needed:,} bytes are needed, {free:,} are free on the disk")
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(_named(tree)) for name, tree in trees.items()},
                    # A batch is a function of (seed, step), so this is all of the data's state.
                    progress=ocp.args.JsonSave({"step": step, "next_batch": step}),
                ),
            )

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
          CheckpointError: if the last save failed.
        """
        with self._reporting():
            self._manager.wait_until_finished()

    def restore(
        self, step: int, model: Any, optimizer: Any, carry: Any = None
    ) -> tuple[Any, Any, Any, int]:
        """The model, the optimiser's and the carried state, and the next batch's number.

        Args:
          step: of the checkpoint.
          model: shapes, dtypes and shardings, as from `abstract_state`.
          optimizer: the same.
          carry: the same; None: none is restored.

        Raises:
          CheckpointError: if files are missing or damaged, or hold other arrays.
        """
        path = self._directory / str(step)
        trees = _present(model=model, optimizer=optimizer, carry=carry)
        found = _read(self._manager, path, **trees)
        restored = {name: _unnamed(tree, found[name]) for name, tree in trees.items()}
        return (
            restored["model"],
            restored["optimizer"],
            restored.get("carry"),
            found.progress["next_batch"],
        )

    def close(self) -> None:
        """Waits for the last save and ends its threads."""
        with self._reporting():
            self._manager.close()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"a checkpoint could not be written to {self._directory} ({_brief(error)}); "
                f"the newest good one is of step {self._manager.latest_step()}"
            ) from error


def restore_model(directory: Path, model: Any) -> tuple[Any, int]:
    """The model of the newest checkpoint in a run's `checkpoints/`, and its step.

    Args:
      directory: as of `Checkpoints`.
      model: shapes, dtypes and shardings.

    Raises:
      CheckpointError: if there is none, files are missing or damaged, or hold other arrays.
    """
    with _reading(directory) as (manager, step):
        found = _read(manager, directory / str(step), model=model)
    return _unnamed(model, found.model), step


class ParameterReader:
    """Reads single parameters of the newest checkpoint in a run's `checkpoints/`.

    Args:
      directory: as of `Checkpoints`.
      model: shapes and dtypes.

    Raises:
      CheckpointError: as `restore_model`.
    """

    def __init__(self, directory: Path, model: Any):
        with _reading(directory) as (_, step):
            self._path = directory / str(step) / "model"
            _check_arrays(self._path.parent, "model", model)

    def read(self, name: str) -> np.ndarray:
        """A parameter by its name, such as layers/mixer/q/kernel."""
        item, how = 0, ocp.RestoreArgs(restore_type=np.ndarray)
        for part in reversed(name.split("/")):
            item, how = {part: item}, {part: how}
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(self._path.absolute(), args=arguments)
        for part in name.split("/"):
            found = found[part]
        return found


@contextlib.contextmanager
def _reading(directory: Path) -> Iterator[tuple[ocp.CheckpointManager, int]]:
    """A manager of a directory that is only read, and the newest step in it."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist: there is no checkpoint to load")
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
        step = manager.latest_step()
        if step is None:
            raise CheckpointError(f"{directory} holds no complete checkpoint")
        yield manager, step


def _read(manager: ocp.CheckpointManager, path: Path, **trees: Any) -> Any:
    """The named items of a checkpoint, each with the shapes and shardings of a tree."""
    arguments = {name: ocp.args.StandardRestore(_named(tree)) for name, tree in trees.items()}
    try:
        for name, tree in trees.items():
            _check_arrays(path, name, tree)
        return manager.restore(
            int(path.name),
            args=ocp.args.Composite(**arguments, progress=ocp.args.JsonRestore()),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged ({_brief(error)}); delete or move this directory to use "
            "the checkpoint before it"
        ) from error


def _check_arrays(path: Path, item: str, tree: Any) -> None:
    """Raises `CheckpointError` that lists all arrays that are missing, extra or misshapen."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        stored = handler.metadata(epath.Path(path / item).absolute()).tree
    found, expected = (
        {path_name(place): leaf.shape for place, leaf in jax.tree_util.tree_flatten_with_path(t)[0]}
        for t in (stored, _named(tree))
    )
    differences = [
        f"{name}: {found.get(name, 'nothing')} is there, {expected.get(name, 'nothing')} is needed"
        for name in sorted(found | expected)
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"checkpoint {path / item} is of another model or optimiser:\n  "
            + "\n  ".join(differences)
        )


def _brief(error: Exception) -> str:
    """The first 300 characters of an error: Orbax appends whole trees and stack traces."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def _present(**trees: Any) -> dict[str, Any]:
    return {name: tree for name, tree in trees.items() if tree is not None}


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree in nested dictionaries, by the parts of their names."""
    nested: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, last = path_name(path).split("/")
        level = nested
        for name in parents:
            level = level.setdefault(name, {})
        level[last] = leaf
    return nested


def _unnamed(like: Any, nested: dict[str, Any]) -> Any:
    """The inverse of `_named`, with the structure of `like`."""
    leaves = []
    for path, _ in jax.tree_util.tree_flatten_with_path(like)[0]:
        leaf: Any = nested
        for name in path_name(path).split("/"):
            leaf = leaf[name]
        leaves.append(leaf)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
