"""Checkpoints of training states: the only file that uses Orbax.

A checkpoint is a directory named by its step. `model` and `optimizer` hold arrays under names such
as `layers/mixer/q/kernel`, `progress` the progress of the run, `files.json` a digest of every file.
A checkpoint is written under a temporary name and renamed when its files are listed; on object
stores, which cannot rename, the list is written last. So a directory named by a step was complete
once, and `files.json` tells whether it still is. Every reader compares the digests first, because
Orbax reads most flipped bits without an error.
"""

import concurrent.futures
import contextlib
import itertools
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from retnet_jax.errors import CheckpointError, DamagedCheckpointError
from retnet_jax.files.atomic import ENDING
from retnet_jax.files.paths import entries, is_remote
from retnet_jax.parallel import processes
from retnet_jax.runs import checkpoint_files
from retnet_jax.trees import named_leaves, nested, with_leaves

T = TypeVar("T")

_MOST_SECONDS = 3600  # for writing one checkpoint
_saves = itertools.count()  # of this process: a barrier's name may be used once


class Checkpoints:
    """The checkpoints of one run, written while training continues.

    Args:
      directory: Directory with one directory for each checkpoint; created if it does not exist.
      keep: Number of newest checkpoints to keep.
      keep_every: Checkpoints of steps divisible by this are kept too; 0: none.
    """

    def __init__(self, directory: epath.PathLike, keep: int, keep_every: int = 0):
        self._directory = _absolute(directory)
        self._keep, self._keep_every = keep, keep_every
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._finishing: concurrent.futures.Future | None = None
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(timeout_secs=_MOST_SECONDS),
        )
        processes.once(self._prepare)

    def _prepare(self) -> None:
        """Makes the directory, and deletes unfinished checkpoints of a killed run."""
        with self._reporting():
            self._directory.mkdir(parents=True, exist_ok=True)
            for entry in entries(self._directory):
                unnamed = ENDING in entry.name or ".orbax-checkpoint-tmp" in entry.name
                if unnamed or (entry.name.isdecimal() and not _is_complete(entry)):
                    entry.rmtree()

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, newest first."""
        return steps_in(self._directory)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return next(iter(self.steps()), None)

    def save(self, step: int, items: dict[str, Any], progress: dict[str, Any]) -> None:
        """Copies trees of arrays and starts to write them. All processes call it together.

        Args:
          step: Step of the training state; it names the checkpoint.
          items: Trees of arrays by name; those that are None are left out.
          progress: JSON values, such as the number of the next batch. A batch is a function of seed
            and number, so the data has no other state.

        Raises:
          CheckpointError: if the disk has no room for it, or if the previous save failed and nobody
            waited for it; older checkpoints stay intact.
        """
        self.wait()
        with self._reporting():
            self._directory.mkdir(parents=True, exist_ok=True)  # in case it was moved or deleted
            trees = _present(items)
            self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(trees)))
            path = self._directory / str(step)
            if path.exists():
                raise OSError(f"{path} exists already")
            if not is_remote(self._directory):
                path = path.with_name(path.name + ENDING)
            self._writer.save(
                path,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(_named(tree)) for name, tree in trees.items()},
                    progress=ocp.args.JsonSave(
                        {"step": step, "format": checkpoint_files.FORMAT, **progress}
                    ),
                ),
            )
            self._finishing = self._thread.submit(self._finish, path, step, next(_saves))

    def _finish(self, path: epath.Path, step: int, save: int) -> None:
        """Waits until Orbax has written a checkpoint, lists its files and renames it.

        Runs in a thread of each process.
        """
        barrier = ocp.multihost.get_barrier_sync_fn()
        try:
            self._writer.wait_until_finished()
            if jax.process_count() > 1:
                checkpoint_files.hash_own(path, jax.process_index())
        finally:  # after an error too: the others wait here
            barrier(key=f"checkpoint {save} is hashed", timeout_ms=1000 * _MOST_SECONDS)
        try:
            if processes.is_first():
                checkpoint_files.write_list(path)
                if not is_remote(path):
                    path.rename(self._directory / str(step))
                self._delete_old()
        finally:
            barrier(key=f"checkpoint {save} is complete", timeout_ms=1000 * _MOST_SECONDS)

    def _delete_old(self) -> None:
        for step in self.steps()[self._keep :]:
            if not self._keep_every or step % self._keep_every:
                path = self._directory / str(step)
                if not is_remote(path):  # so that a half-deleted one does not look damaged
                    path = path.rename(path.with_name(f"{step}.deleted{ENDING}"))
                path.rmtree()

    def wait(self) -> None:
        """Waits until nothing is being written.

        Raises:
          CheckpointError: if the last save failed.
        """
        finishing, self._finishing = self._finishing, None
        if finishing is not None:
            with self._reporting():
                finishing.result()

    def restore(self, step: int, items: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads trees of arrays, and the progress that was saved with them.

        Args:
          step: Step of the checkpoint.
          items: Shapes, dtypes and shardings of each tree, as from `abstract_state`; None: no tree.

        Raises:
          DamagedCheckpointError: if files are missing or damaged.
          CheckpointError: if the checkpoint holds other arrays.
        """
        path, trees = self._directory / str(step), _present(items)
        _verify(path, [*trees, "progress"])
        found = _read(path, **trees)
        restored = {
            name: with_leaves(tree, named_leaves(found[name])) for name, tree in trees.items()
        }
        return dict.fromkeys(items) | restored, found.progress

    def set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint so that it is ignored."""
        path = self._directory / str(step)
        processes.once(lambda: path.rename(path.with_name(f"{step}.damaged-{time.time_ns()}")))

    def set_aside_before(self) -> list[epath.Path]:
        """The checkpoints that `set_aside` has renamed."""
        return [path for path in entries(self._directory) if ".damaged-" in path.name]

    def _check_room(self, needed: int) -> None:
        if is_remote(self._directory):
            return
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise OSError(f"{needed:,} bytes are needed, {free:,} are free on the disk")

    def close(self) -> None:
        """Waits for the last save and stops the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._writer.close()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"a checkpoint could not be written to {self._directory} ({_brief(error)}); "
                f"the newest good one is of step {self.latest_step()}"
            ) from error


def _is_complete(path: epath.Path) -> bool:
    """Whether a directory named by a step was written completely; on a disk it always was."""
    if not is_remote(path):
        return True
    return (path / "commit_success.txt").exists() and checkpoint_files.is_listed(path)


def steps_in(directory: epath.Path) -> list[int]:
    """The steps of the complete checkpoints in a directory, newest first."""
    found = (entry for entry in entries(directory) if entry.name.isdecimal())
    return sorted((int(entry.name) for entry in found if _is_complete(entry)), reverse=True)


def _verify(path: epath.Path, items: list[str]) -> bool:
    """`checkpoint_files.verify` by all processes together: each compares a share of the files."""
    share = jax.process_index(), jax.process_count()
    return processes.together(lambda: checkpoint_files.verify(path, items, share))


def restore_model(directory: Path | epath.Path, model: Any) -> tuple[Any, int]:
    """The model of the newest checkpoint in a run's `checkpoints/`, and its step.

    Args:
      directory: Directory of the checkpoints, as in `Checkpoints`.
      model: Shapes, dtypes and shardings of the model.

    Raises:
      CheckpointError: if there is no checkpoint, or files are missing, damaged or of other arrays.
    """

    def read(path: epath.Path) -> tuple[Any, int]:
        return _unnamed(model, _read(path, model=model).model), int(path.name)

    return _of_newest(directory, read)


class ParameterReader:
    """Reads single parameters of the newest checkpoint in a run's `checkpoints/`.

    Args:
      directory: Directory of the checkpoints, as in `Checkpoints`.
      model: Shapes and dtypes of the model.

    Attributes:
      step: Step of that checkpoint.

    Raises:
      CheckpointError: as `restore_model`.
    """

    def __init__(self, directory: Path | epath.Path, model: Any):
        def open_model(path: epath.Path) -> epath.Path:
            _check_arrays(path, "model", model)
            return path / "model"

        self._path = _of_newest(directory, open_model)
        self.step = int(self._path.parent.name)

    def read(self, name: str) -> np.ndarray:
        """The parameter with a name such as layers/mixer/q/kernel."""
        item, how = 0, ocp.RestoreArgs(restore_type=np.ndarray)
        for part in reversed(name.split("/")):
            item, how = {part: item}, {part: how}
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                found = checkpointer.restore(_absolute(self._path), args=arguments)
        except Exception as error:  # Orbax raises errors of every kind
            if self._path.exists():
                raise
            raise CheckpointError(
                f"checkpoint {self._path.parent} was deleted while it was read, perhaps by the run "
                "that is training there: try again, or copy the checkpoint first"
            ) from error
        for part in name.split("/"):
            found = found[part]
        return found


def _of_newest(directory: Path | epath.Path, read: Callable[[epath.Path], T]) -> T:
    """Verifies the newest checkpoint in a directory and returns the result of `read`.

    A run that is still training may delete it meanwhile. Then the next newest one is read.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist: there is no checkpoint to load")
    while True:
        path = _newest(_absolute(directory))
        try:
            if not _verify(path, ["model", "progress"]):
                warnings.warn(
                    f"checkpoint {path} was written without digests: damage to its numbers cannot "
                    "be detected",
                    stacklevel=2,
                )
        except CheckpointError as error:  # in all processes
            if processes.any_of_us(not path.exists()):
                continue
            raise _with_advice(error) from error
        try:
            return read(path)
        except Exception as error:  # Orbax may fail in any way while files are deleted
            if jax.process_count() > 1 or path.exists():
                raise _with_advice(error) from error


def _with_advice(error: Exception) -> Exception:
    if not isinstance(error, DamagedCheckpointError):
        return error
    return DamagedCheckpointError(
        f"{error}; delete or move that directory to use the previous checkpoint"
    )


def _newest(directory: epath.Path) -> epath.Path:
    """The newest complete checkpoint in a directory, the same for all processes."""
    (step, *_) = processes.gather_texts(str(next(iter(steps_in(directory)), "")))
    if not step:
        raise CheckpointError(f"{directory} holds no complete checkpoint")
    return directory / step


def _read(path: epath.Path, **trees: Any) -> Any:
    """Reads named items of a checkpoint, each with the shapes and shardings of a tree."""
    arguments = {name: ocp.args.StandardRestore(_named(tree)) for name, tree in trees.items()}
    try:
        for name, tree in trees.items():
            _check_arrays(path, name, tree)
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            return reader.restore(
                path, args=ocp.args.Composite(**arguments, progress=ocp.args.JsonRestore())
            )
    except (CheckpointError, jax.errors.JaxRuntimeError, MemoryError):  # no room for the arrays
        raise
    except Exception as error:  # Orbax raises errors of every kind for damaged files
        if checkpoint_files.has_digests(path):  # they were compared, so the files are intact
            raise CheckpointError(f"checkpoint {path} cannot be read: {_brief(error)}") from error
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {_brief(error)}") from error


def _check_arrays(path: epath.Path, item: str, tree: Any) -> None:
    """Raises a `CheckpointError` that lists every missing, extra or misshapen array."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        stored = handler.metadata(_absolute(path / item)).tree
    found, expected = (
        {name: leaf.shape for name, leaf in named_leaves(x).items()} for x in (stored, tree)
    )
    differences = [
        f"{name}: found {found.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
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


def _present(items: dict[str, Any]) -> dict[str, Any]:
    return {name: tree for name, tree in items.items() if tree is not None}


def _absolute(path: epath.PathLike) -> epath.Path:
    return epath.Path(path if is_remote(path) else Path(path).absolute())


def _named(tree: Any) -> dict[str, Any]:
    """A tree as nested dicts, so that a checkpoint does not depend on the tree's classes."""
    return nested(named_leaves(tree))


def _unnamed(like: Any, found: dict[str, Any]) -> Any:
    """The inverse of `_named`, with the structure of `like`."""
    return with_leaves(like, named_leaves(found))
