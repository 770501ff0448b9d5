"""Checkpoints of training states: the one file that knows Orbax.

A checkpoint is a directory named by its step: `model` and `optimizer` hold arrays under names such
as `layers/mixer/q/kernel`, `progress` how far the run is, `files.json` a digest of every file. It
is written under another name and gets its own when its files are listed; on object stores, which
have no renaming, the list comes last. So what carries a step's name was whole once; `files.json`
tells whether it still is. Every reader compares it first, because Orbax reads most flipped bits
without complaint.
"""

import concurrent.futures
import contextlib
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
from retnet_jax.files.paths import is_remote
from retnet_jax.parallel import processes
from retnet_jax.runs import checkpoint_files
from retnet_jax.trees import named_leaves, nested, with_leaves

T = TypeVar("T")

_MOST_SECONDS = 3600  # of writing


class Checkpoints:
    """The checkpoints of one run, written while training goes on.

    Args:
      directory: holds one directory for each checkpoint; created when it is not there.
      keep: the number of newest checkpoints that are not deleted.
      keep_every: those of steps divisible by this are not deleted either; 0: none.
    """

    def __init__(self, directory: epath.PathLike, keep: int, keep_every: int = 0):
        self._directory = _absolute(directory)
        self._keep, self._keep_every = keep, keep_every
        self._saves = 0  # begun by this process
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._finishing: concurrent.futures.Future | None = None
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(),
            async_options=ocp.options.AsyncOptions(timeout_secs=_MOST_SECONDS),
        )
        processes.once(self._prepare)

    def _prepare(self) -> None:
        """Makes the directory, and deletes what a killed run left unfinished."""
        with self._reporting():
            self._directory.mkdir(parents=True, exist_ok=True)
            for entry in self._directory.iterdir():
                unnamed = ENDING in entry.name or ".orbax-checkpoint-tmp" in entry.name
                if unnamed or (entry.name.isdecimal() and not _is_complete(entry)):
                    entry.rmtree()

    def steps(self) -> list[int]:
        """The steps of complete checkpoints, the newest first."""
        return steps_in(self._directory)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return next(iter(self.steps()), None)

    def save(self, step: int, items: dict[str, Any], progress: dict[str, Any]) -> None:
        """Copies trees of arrays and begins to write them, all processes together.

        Args:
          step: names the checkpoint.
          items: trees by name; one that is None is left out.
          progress: values for JSON, such as the number of the next batch: a batch is a function of
            seed and number, so this is all of the data's state.

        Raises:
          CheckpointError: if the disk has no room for it, or the save before this one failed and
            nobody waited for it; older checkpoints stay good.
        """
        self.wait()
        with self._reporting():
            self._directory.mkdir(parents=True, exist_ok=True)  # it may be moved or deleted
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
            self._saves += 1
            self._finishing = self._thread.submit(self._finish, path, step, self._saves)

    def _finish(self, path: epath.Path, step: int, save: int) -> None:
        """Waits until Orbax has written a checkpoint, lists its files and gives it its name.

        Runs in a thread, of each process.
        """
        self._writer.wait_until_finished()
        barrier = ocp.multihost.get_barrier_sync_fn()
        if jax.process_count() > 1:
            checkpoint_files.hash_own(path, jax.process_index())
        barrier(key=f"checkpoint {save} is hashed", timeout_ms=1000 * _MOST_SECONDS)
        if processes.is_first():
            checkpoint_files.write_list(path)
            if not is_remote(path):
                path.rename(self._directory / str(step))
            self._delete_old()
        barrier(key=f"checkpoint {save} is complete", timeout_ms=1000 * _MOST_SECONDS)

    def _delete_old(self) -> None:
        for step in self.steps()[self._keep :]:
            if not self._keep_every or step % self._keep_every:
                path = self._directory / str(step)
                if not is_remote(path):  # half deleted it must not look damaged
                    path = path.rename(path.with_name(f"{step}.deleted{ENDING}"))
                path.rmtree()

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
          CheckpointError: if the last save failed.
        """
        finishing, self._finishing = self._finishing, None
        if finishing is not None:
            with self._reporting():
                finishing.result()

    def restore(self, step: int, items: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Trees of arrays, and the progress that was saved with them.

        Args:
          step: of the checkpoint.
          items: shapes, dtypes and shardings of each, as from `abstract_state`; None for none.

        Raises:
          DamagedCheckpointError: if files are missing or damaged.
          CheckpointError: if they hold other arrays.
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

    def _check_room(self, needed: int) -> None:
        if is_remote(self._directory):
            return
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise OSError(f"{needed:,} bytes are needed, {free:,} are free on the disk")

    def close(self) -> None:
        """Waits for the last save and ends its threads."""
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
    """Whether what is named by a step was written to its end: on a disk always."""
    if not is_remote(path):
        return True
    return (path / "commit_success.txt").exists() and checkpoint_files.is_listed(path)


def steps_in(directory: epath.Path) -> list[int]:
    """The steps of complete checkpoints in a directory, the newest first."""
    if not directory.exists():
        return []
    found = (entry for entry in directory.iterdir() if entry.name.isdecimal())
    return sorted((int(entry.name) for entry in found if _is_complete(entry)), reverse=True)


def _verify(path: epath.Path, items: list[str]) -> bool:
    """As `checkpoint_files.verify`, all processes together: each compares a share of the files."""
    share = jax.process_index(), jax.process_count()
    return processes.together(lambda: checkpoint_files.verify(path, items, share))


def restore_model(directory: Path, model: Any) -> tuple[Any, int]:
    """The model of the newest checkpoint in a run's `checkpoints/`, and its step.

    Args:
      directory: as of `Checkpoints`.
      model: shapes, dtypes and shardings.

    Raises:
      CheckpointError: if there is none, files are missing or damaged, or hold other arrays.
    """

    def read(path: epath.Path) -> tuple[Any, int]:
        return _unnamed(model, _read(path, model=model).model), int(path.name)

    return _of_newest(directory, read)


class ParameterReader:
    """Reads single parameters of the newest checkpoint in a run's `checkpoints/`.

    Args:
      directory: as of `Checkpoints`.
      model: shapes and dtypes.

    Raises:
      CheckpointError: as `restore_model`.
    """

    def __init__(self, directory: Path, model: Any):
        def open_model(path: epath.Path) -> epath.Path:
            _check_arrays(path, "model", model)
            return path / "model"

        self._path = _of_newest(directory, open_model)

    def read(self, name: str) -> np.ndarray:
        """A parameter by its name, such as layers/mixer/q/kernel."""
        item, how = 0, ocp.RestoreArgs(restore_type=np.ndarray)
        for part in reversed(name.split("/")):
            item, how = {part: item}, {part: how}
        arguments = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                found = checkpointer.restore(_absolute(self._path), args=arguments)
        except Exception as error:  # Orbax raises of every kind
            if self._path.exists():
                raise
            raise CheckpointError(
                f"checkpoint {self._path.parent} was deleted while it was read, perhaps by the run "
                "that writes there: start again, or copy the checkpoint first"
            ) from error
        for part in name.split("/"):
            found = found[part]
        return found


def _of_newest(directory: Path, read: Callable[[epath.Path], T]) -> T:
    """What is read of the newest checkpoint in a directory, after its files were compared.

    A run that is still training may delete it meanwhile, for a newer one: then that is read.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist: there is no checkpoint to load")
    while True:
        path = _newest(_absolute(directory))
        try:
            if not _verify(path, ["model", "progress"]):
                warnings.warn(
                    f"checkpoint {path} was written without digests: that its numbers are still "
                    "those that were written cannot be checked",
                    stacklevel=2,
                )
        except CheckpointError as error:  # in all processes
            if processes.any_of_us(not path.exists()):
                continue
            raise _with_advice(error) from error
        try:
            return read(path)
        except Exception as error:  # whatever Orbax meets in what is being deleted
            if jax.process_count() > 1 or path.exists():
                raise _with_advice(error) from error


def _with_advice(error: Exception) -> Exception:
    if not isinstance(error, DamagedCheckpointError):
        return error
    return DamagedCheckpointError(
        f"{error}; delete or move that directory to use the checkpoint before it"
    )


def _newest(directory: epath.Path) -> epath.Path:
    """The newest complete checkpoint in a directory, the same for all processes."""
    (step, *_) = processes.gather_texts(str(next(iter(steps_in(directory)), "")))
    if not step:
        raise CheckpointError(f"{directory} holds no complete checkpoint")
    return directory / step


def _read(path: epath.Path, **trees: Any) -> Any:
    """The named items of a checkpoint, each with the shapes and shardings of a tree."""
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
    except Exception as error:  # Orbax raises of every kind for what is damaged
        if checkpoint_files.has_digests(path):  # they were compared, so it is something else
            raise CheckpointError(f"checkpoint {path} cannot be read: {_brief(error)}") from error
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {_brief(error)}") from error


def _check_arrays(path: Path, item: str, tree: Any) -> None:
    """Raises `CheckpointError` that lists all arrays that are missing, extra or misshapen."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        stored = handler.metadata(_absolute(path / item)).tree
    found, expected = (
        {name: leaf.shape for name, leaf in named_leaves(x).items()} for x in (stored, tree)
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


def _present(items: dict[str, Any]) -> dict[str, Any]:
    return {name: tree for name, tree in items.items() if tree is not None}


def _absolute(path: epath.PathLike) -> epath.Path:
    return epath.Path(path if is_remote(path) else Path(path).absolute())


def _named(tree: Any) -> dict[str, Any]:
    """A tree as Orbax gets it, so that a checkpoint does not depend on the classes of the tree."""
    return nested(named_leaves(tree))


def _unnamed(like: Any, found: dict[str, Any]) -> Any:
    """The inverse of `_named`, with the structure of `like`."""
    return with_leaves(like, named_leaves(found))
