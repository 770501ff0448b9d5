"""Verifies every file of a run."""

import json
from collections.abc import Iterator

from etils import epath

from retnet_jax.data.store_problems import store_problems
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.files import paths as files
from retnet_jax.runs import checkpoint_files
from retnet_jax.runs.checkpoint import steps_in
from retnet_jax.runs.workdir import STORES, read_workdir


def run_problems(workdir: epath.Path) -> Iterator[str]:
    """Problems with the config, tokenizer, log and checkpoints of a run, one line each."""
    try:
        read_workdir(workdir)
    except ConfigError as error:
        yield str(error)
    for name in ("metrics.jsonl", "starts.jsonl"):
        yield from _log_problems(workdir / name)
    for step in reversed(steps_in(workdir / "checkpoints")):
        path = workdir / "checkpoints" / str(step)
        try:
            yield from (f"{path}: {problem}" for problem in checkpoint_files.problems(path))
        except CheckpointError as error:
            yield str(error)


def unchecked(workdir: epath.Path) -> Iterator[str]:
    """Files of a run that cannot be verified or that no program reads, one line each."""
    for entry in sorted(files.entries(workdir / "checkpoints")):
        if not entry.name.isdecimal():
            yield f"{entry}: not verified, because no program reads it"
        elif not checkpoint_files.has_digests(entry):
            yield f"{entry}: written without digests; at most the sizes of its files were compared"


def stores_of(workdir: epath.Path) -> Iterator[tuple[str, list[str]]]:
    """The token stores of a run, and the problems with each."""
    path = workdir / STORES
    if not path.exists():
        return
    try:
        recorded = json.loads(path.read_text())
        names = list(recorded)
    except (ValueError, TypeError) as error:
        yield str(path), [f"{path} is damaged: {error}"]
        return
    for name in names:
        if files.exists(name):
            yield name, store_problems(name)
        else:
            yield name, [f"{name} does not exist in this directory or on this machine"]


def _log_problems(path: epath.Path) -> Iterator[str]:
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines[:-1], start=1):
        try:
            json.loads(line)
        except ValueError:
            yield f"{path}, line {number} is not JSON"
    if lines[-1]:
        yield f"{path}: the last line was cut off"
