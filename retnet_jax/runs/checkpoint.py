"""Checkpoints of training states: the one file that knows Orbax.

A checkpoint is a directory named by its step: `model` and `optimizer` hold arrays under names such
as `layers/mixer/q/kernel`, `progress` how far the run is, `files.json` the size and SHA-256 of
every file. It is written under another name and renamed when complete, so what carries a step's
name was whole once; `files.json` tells whether it still is. Every reader compares it first, because
Orbax reads most flipped bits without complaint.
"""

import concurrent.futures
import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from retnet_jax.errors import CheckpointError, DamagedCheckpointError
from retnet_jax.files.digests import sha256_of_file
from retnet_jax.files.paths import is_remote
from retnet_jax.parallel import processes
from retnet_jax.trees import named_leaves, nested, with_leaves

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run, written while training goes on.

    Args:
      directory: holds one directory for each checkpoint; created when it is not there.
      keep: the number of newest checkpoints that are not deleted.
      keep_every: those of steps divisible by this are not deleted either; 0: none.
    """

    def __init__(self, directory: epath.PathLike, keep: int, keep_every: int = 0):
        self._directory = epath.Path(directory)
        # What a killed run left unfinished. Orbax can do this too, but in the background, where it
        # can meet the next save to the same step.
        processes.once(self._delete_unfinished)
        kept = [checkpoint_managers.LatestN(keep)]
        if keep_every:
            kept.append(checkpoint_managers.EveryNSteps(keep_every))
        self._begun: int | None = None
        self._manager = ocp.CheckpointManager(
            _absolute(self._directory),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept),
                async_options=ocp.options.AsyncOptions(
                    timeout_secs=3600, post_finalization_callback=self._list_files
                ),
            ),
        )

    def _delete_unfinished(self) -> None:
        for unfinished in self._directory.glob("*.orbax-checkpoint-tmp"):
            unfinished.rmtree()

    def steps(self) -> list[int]:
        """The steps of complete checkpoints, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

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
        with self._reporting():
            self._manager.wait_until_finished()
            if not self._directory.exists():  # moved or deleted meanwhile
                self._directory.mkdir(parents=True, exist_ok=True)
                self._manager.reload()
            trees = _present(items)
            self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(trees)))
            self._begun = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(_named(tree)) for name, tree in trees.items()},
                    progress=ocp.args.JsonSave({"step": step, **progress}),
                ),
            )

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
          CheckpointError: if the last save failed.
        """
        with self._reporting():
            self._manager.wait_until_finished()

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
        processes.once(lambda: _verify(path, *trees, "progress"))
        found = _read(self._manager, path, **trees)
        restored = {
            name: with_leaves(tree, named_leaves(found[name])) for name, tree in trees.items()
        }
        return dict.fromkeys(items) | restored, found.progress

    def set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint so that it is ignored."""
        path = self._directory / str(step)
        processes.once(lambda: path.rename(path.with_name(f"{step}.damaged-{time.time_ns()}")))
        self._manager.reload()

    def _list_files(self) -> None:
        if not processes.is_first():
            return
        # It gets its name next; on object stores, which cannot rename, a marker inside instead.
        path = self._directory / f"{self._begun}.orbax-checkpoint-tmp"
        path = path if path.exists() else self._directory / str(self._begun)
        (path / _FILES).write_text(json.dumps(_digests(path, _files_under(path)), indent=0))

    def _check_room(self, needed: int) -> None:
        if is_remote(self._directory):
            return
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise OSError(f"{needed:,} bytes are needed, {free:,} are free on the disk")

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


_FILES = "files.json"


def _files_under(path: epath.Path, prefix: str = "") -> list[str]:
    """The files below a directory by their paths in it, but for what Orbax writes last."""
    found: list[str] = []
    for entry in path.iterdir():
        if entry.is_dir():
            found += _files_under(entry, f"{prefix}{entry.name}/")
        elif entry.name not in (_FILES, "_CHECKPOINT_METADATA", "commit_success.txt"):
            found.append(prefix + entry.name)
    return sorted(found)


def _digests(path: epath.Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """The size and the SHA-256 of files of a checkpoint, by their paths in it."""
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda name: sha256_of_file(path / name), names)
        return {
            name: {"bytes": (path / name).stat().length, "sha256": sha256}
            for name, sha256 in zip(names, found, strict=True)
        }


def _verify(path: epath.Path, *items: str) -> None:
    """Compares the files of some items of a checkpoint with `files.json`.

    Checkpoints of before 2026-11-25 have sizes alone there, and the oldest have no such file.

    Raises:
      DamagedCheckpointError: naming a file that is missing or not what was written.
      CheckpointError: if a file cannot be read, for a reason that may pass.
    """
    path = epath.Path(path)
    if not (path / _FILES).exists():
        return
    try:
        listed = json.loads((path / _FILES).read_text())
        inside = tuple(f"{item}/" for item in items)
        expected = {name: x for name, x in listed.items() if name.startswith(inside)}
        names = [name for name in _files_under(path) if name.startswith(inside)]
        if all(type(about) is int for about in listed.values()):
            found = {name: (path / name).stat().length for name in names}
        else:
            found = _digests(path, names)
    except (FileNotFoundError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {_brief(error)}") from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {_brief(error)}") from error
    for name in sorted(expected | found):
        if found.get(name) != expected.get(name):
            what = "is not what was written"
            if name not in found:
                what = "is missing"
            elif name not in expected:
                what = f"is not listed in {_FILES}"
            raise DamagedCheckpointError(f"checkpoint {path} is damaged: {name} {what}")


def _has_digests(path: epath.Path) -> bool:
    listed = json.loads((path / _FILES).read_text()) if (path / _FILES).exists() else {}
    return any(type(about) is dict for about in listed.values())


def restore_model(directory: Path, model: Any) -> tuple[Any, int]:
    """The model of the newest checkpoint in a run's `checkpoints/`, and its step.

    Args:
      directory: as of `Checkpoints`.
      model: shapes, dtypes and shardings.

    Raises:
      CheckpointError: if there is none, files are missing or damaged, or hold other arrays.
    """

    def read(manager: ocp.CheckpointManager, step: int) -> tuple[Any, int]:
        found = _read(manager, directory / str(step), model=model)
        return _unnamed(model, found.model), step

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
        def open_model(_, step: int) -> Path:
            _check_arrays(directory / str(step), "model", model)
            return directory / str(step) / "model"

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


def _of_newest(directory: Path, read: Callable[[ocp.CheckpointManager, int], T]) -> T:
    """What is read of the newest checkpoint, by manager and step, in a directory.

    A run that is still training may delete it meanwhile, for a newer one: then that is read.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist: there is no checkpoint to load")
    while True:
        options = ocp.CheckpointManagerOptions(create=False)
        with ocp.CheckpointManager(_absolute(directory), options=options) as manager:
            step = manager.latest_step()
            if step is None:
                raise CheckpointError(f"{directory} holds no complete checkpoint")
            path = epath.Path(directory) / str(step)
            try:
                _verify(path, "model", "progress")
                return read(manager, step)
            except Exception as error:  # whatever Orbax meets in what is being deleted
                if not path.exists():
                    continue
                if not isinstance(error, DamagedCheckpointError):
                    raise
                raise DamagedCheckpointError(
                    f"{error}; delete or move that directory to use the checkpoint before it"
                ) from error


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
    except (CheckpointError, jax.errors.JaxRuntimeError, MemoryError):  # no room for the arrays
        raise
    except Exception as error:  # Orbax raises of every kind for what is damaged
        if _has_digests(epath.Path(path)):  # they were compared, so it is something else
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
