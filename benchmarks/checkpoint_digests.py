"""What the digests of a checkpoint cost: saving and restoring one with and without them, in turn.

    python -m benchmarks.checkpoint_digests [--gigabytes=1] [--rounds=3] [--directory=DIR]

Seconds that `save` keeps training waiting; until the checkpoint is complete; of restoring it, with
its files in the system's cache and after they were dropped from it.
"""

import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from absl import flags

from benchmarks.measure import write_results
from retnet_jax.programs import command_line
from retnet_jax.runs import checkpoint, checkpoint_files
from retnet_jax.runs.checkpoint import Checkpoints

flags.DEFINE_float("gigabytes", 1.0, "Size of the checkpoint")
flags.DEFINE_integer("rounds", 3, "Number of saves with and without digests each", 1)
flags.DEFINE_string(
    "directory", None, "Where the checkpoints are written; by default a temporary one"
)

_MATRIX = 2048  # rows and columns


def main() -> None:
    matrices = max(3, round(flags.FLAGS.gigabytes * 1e9 / (4 * _MATRIX**2)))
    rng = np.random.default_rng(0)
    arrays = [
        jax.device_put(rng.standard_normal((_MATRIX, _MATRIX), np.float32)) for _ in range(matrices)
    ]
    third = len(arrays) // 3
    # As in training: the model, and twice as many moments.
    items = {
        "model": {f"layer_{i}": x for i, x in enumerate(arrays[:third])},
        "optimizer": {f"moment_{i}": x for i, x in enumerate(arrays[third:])},
    }
    found: dict[str, dict[str, list[float]]] = {"with": {}, "without": {}}
    with tempfile.TemporaryDirectory(dir=flags.FLAGS.directory) as directory:
        for number in range(flags.FLAGS.rounds + 1):
            for name, context in (
                ("with", contextlib.nullcontext()),
                ("without", without_digests()),
            ):
                with context:
                    seconds = save_and_restore(Path(directory) / name, items)
                if number:  # the first round is not counted
                    for what, value in seconds.items():
                        found[name].setdefault(what, []).append(value)
    size = sum(x.nbytes for x in arrays)
    print(f"{size / 1e9:.2f} GB, medians of {flags.FLAGS.rounds} rounds")
    for what in found["with"]:
        ours, bare = (statistics.median(found[name][what]) for name in ("with", "without"))
        print(f"{what:<34}{ours:8.3f} s with, {bare:8.3f} s without digests: {ours / bare:.3f}")
    print(f"written to {write_results('checkpoint_digests', {'bytes': size, **found})}")


def save_and_restore(directory: Path, items: dict[str, Any]) -> dict[str, float]:
    """Seconds of each part."""
    seconds = {}
    with contextlib.closing(Checkpoints(directory, keep=1)) as checkpoints:
        start = time.perf_counter()
        checkpoints.save(1, items, {})
        seconds["training waits for save"] = time.perf_counter() - start
        checkpoints.wait()
        seconds["until it is complete"] = time.perf_counter() - start
        for what in ("restore from the cache", "restore from the disk"):
            if what.endswith("disk"):
                drop_from_cache(directory)
            start = time.perf_counter()
            jax.block_until_ready(checkpoints.restore(1, items)[0])
            seconds[what] = time.perf_counter() - start
    shutil.rmtree(directory)
    return seconds


@contextlib.contextmanager
def without_digests() -> Iterator[None]:
    """Nothing is hashed, neither when it is written nor when it is read."""
    with (
        mock.patch.object(checkpoint_files, "write_list", return_value=None),
        mock.patch.object(checkpoint, "_verify", return_value=True),
    ):
        yield


def drop_from_cache(directory: Path) -> None:
    """Has the system forget the contents of files."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    command_line.run(main)
