"""Verifies the files of a checkpoint.

`files.json` lists every other file with its size and its XXH3, and has a digest of the list. With
several processes, each hashes the files that it wrote, and later a share of the files to read.

Checkpoints from before 2026-11-26 have only sizes in `files.json`; the oldest have no `files.json`.
"""

import concurrent.futures
import json
import re
from collections.abc import Iterable
from typing import Any

from etils import epath

from retnet_jax.errors import CheckpointError, DamagedCheckpointError, brief
from retnet_jax.files import atomic
from retnet_jax.files.digests import xxh3_of, xxh3_of_file

FILES = "files.json"
FORMAT = 2  # recorded in `progress`; checkpoints of format 2 or later have digests


def files_under(path: epath.Path, prefix: str = "") -> list[str]:
    """The paths of all files below a directory, sorted, without `files.json` itself."""
    found: list[str] = []
    for entry in path.iterdir():
        name = prefix + entry.name
        if entry.is_dir():
            found += files_under(entry, f"{name}/")
        elif not re.fullmatch(_LISTS, name):
            found.append(name)
    return sorted(found)


def hash_own(path: epath.Path, process: int) -> None:
    """Writes a list of the files of one process, which `write_list` collects."""
    # Orbax's names of what one process writes: its array data, and their shapes.
    own = {f"ocdbt.process_{process}", f"process_{process}"}
    names = [name for name in files_under(path) if own & set(name.split("/"))]
    atomic.write_text(path / f"files.{process}.json", json.dumps(_digests(path, names)))


def write_list(path: epath.Path) -> None:
    """Writes `files.json`: the lists of `hash_own`, and the files that none of them has."""
    files: dict[str, dict[str, Any]] = {}
    parts = [x for x in path.iterdir() if x.name != FILES and re.fullmatch(_LISTS, x.name)]
    for part in parts:
        files |= json.loads(part.read_text())
    files |= _digests(path, [name for name in files_under(path) if name not in files])
    listed = {"digest": _digest_of_list(files), "files": dict(sorted(files.items()))}
    atomic.write_text(path / FILES, json.dumps(listed, indent=0))
    for part in parts:
        part.unlink()


def verify(
    path: epath.Path, items: Iterable[str] | None = None, share: tuple[int, int] = (0, 1)
) -> bool:
    """Compares the files of a checkpoint with its `files.json`.

    Args:
      path: Directory of the checkpoint.
      items: Directories in it to compare; files outside any directory are always compared. None:
        all directories.
      share: The number of this process and the number of processes; each hashes its share.

    Returns:
      True if digests were compared; False if only sizes or nothing could be.

    Raises:
      DamagedCheckpointError: naming a file that is missing or not what was written.
      CheckpointError: if a file cannot be read for a reason that may be temporary.
    """
    for problem in problems(path, items, share):
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {problem}")
    return has_digests(path)


def problems(
    path: epath.Path, items: Iterable[str] | None = None, share: tuple[int, int] = (0, 1)
) -> list[str]:
    """The problems with the files of a checkpoint, as `verify` compares them, one line each.

    Raises:
      CheckpointError: as `verify`.
    """
    path = epath.Path(path)
    try:
        listed = _read_list(path)
        if listed is None:
            return []
        directories = None if items is None else {*items, ""}

        def counts(name: str) -> bool:
            return directories is None or _item(name) in directories

        expected = {name: about for name, about in listed.items() if counts(name)}
        there = {name for name in files_under(path) if counts(name)}
        if has_digests(path):
            index, count = share
            compared = sorted({*expected, *there})[index::count]
            found = _digests(path, [name for name in compared if name in there])
        else:
            compared = sorted(name for name in {*expected, *there} if not name.endswith(_LAST))
            found = {name: (path / name).stat().length for name in there}
    except (FileNotFoundError, ValueError) as error:
        return [brief(error, 300)]
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {brief(error, 300)}") from error
    return [
        f"{name} {_difference(name, found, expected)}"
        for name in compared
        if found.get(name) != expected.get(name)
    ]


def is_listed(path: epath.Path) -> bool:
    """Whether a checkpoint has its `files.json`. The oldest checkpoints do not need one."""
    if (path / FILES).exists():
        return True
    try:
        return json.loads((path / "progress" / "metadata").read_text()).get("format", 1) < FORMAT
    except (OSError, ValueError, AttributeError):  # damaged; whoever reads it reports that
        return True


def has_digests(path: epath.Path) -> bool:
    """Whether `files.json` of a checkpoint has digests."""
    try:
        return "digest" in json.loads((path / FILES).read_text())
    except FileNotFoundError:
        return False


_LISTS = r"files(\.\d+)?\.json"
_LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")  # not in the lists of sizes


def _read_list(path: epath.Path) -> dict[str, Any] | None:
    """Size and digest of each file, or only its size; None for a checkpoint without a list."""
    if not (path / FILES).exists():
        if not is_listed(path):
            raise ValueError(f"{FILES} is missing")
        return None
    try:
        listed = json.loads((path / FILES).read_text())
        if "digest" not in listed:
            return {name: x if type(x) is int else x["bytes"] for name, x in listed.items()}
        intact = _digest_of_list(listed["files"]) == listed["digest"]
    except (ValueError, AttributeError, TypeError, LookupError):
        intact = False
    if not intact:
        raise ValueError(f"{FILES} is not what was written")
    return listed["files"]


def _item(name: str) -> str:
    """The directory of the checkpoint that a file is in; "" for files outside any."""
    return name.split("/")[0] if "/" in name else ""


def _difference(name: str, found: dict[str, Any], expected: dict[str, Any]) -> str:
    if name not in expected:
        return f"is not listed in {FILES}"
    return "is not what was written" if name in found else "is missing"


def _digests(path: epath.Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """The size and the XXH3 of each file, by its path."""
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = threads.map(lambda name: xxh3_of_file(path / name), names)
        return {
            name: {"bytes": (path / name).stat().length, "xxh3": digest}
            for name, digest in zip(names, found, strict=True)
        }


def _digest_of_list(files: dict[str, Any]) -> str:
    return xxh3_of(json.dumps(files, sort_keys=True).encode())
