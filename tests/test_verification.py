"""`tools/verify.py` reports every problem of a run or a store, and nothing else."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import programs
import pytest

from retnet_jax.runs.checkpoint import Checkpoints

OLD = Path(__file__).parent / "fixtures" / "88e272d"


@pytest.fixture
def run(tmp_path):
    """An old run and its store, with a checkpoint of the current format."""
    shutil.copytree(OLD, tmp_path / "old")
    workdir = tmp_path / "old" / "run"
    with contextlib.closing(Checkpoints(workdir / "checkpoints", keep=5)) as checkpoints:
        items = {"model": {"kernel": np.arange(600.0).reshape(20, 30)}}
        checkpoints.save(9, items, {"next_batch": 9})
    (workdir / "stores.json").write_text(json.dumps({str(tmp_path / "old" / "store"): "of then"}))
    return workdir


def verify(path):
    return programs.run("tools/verify.py", path)


def flip(path, byte=-1):
    contents = bytearray(path.read_bytes())
    contents[byte] ^= 16
    path.write_bytes(contents)


def test_an_intact_run_has_no_problems(run):
    done = verify(run)
    assert (done.returncode, done.stderr) == (0, "")
    old, *verdicts = done.stdout.splitlines()
    assert old.startswith(f"{run}/checkpoints/4: written without digests")
    assert verdicts == [f"{run}: intact", f"{run.parent}/store: intact"]
    assert verify(run.parent / "store").stdout == f"{run.parent}/store: intact\n"


def test_everything_that_is_wrong_is_named(run):
    files = (path for path in (run / "checkpoints" / "9" / "model").rglob("*") if path.is_file())
    kernel = max(files, key=lambda path: path.stat().st_size)
    flip(kernel, 100)
    (run / "checkpoints" / "9" / "_CHECKPOINT_METADATA").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], "{\n", *lines[1:]]) + '{"st')
    flip(run / "tokenizer.json", 1)
    tokens = run.parent / "store" / "shards" / "00000" / "train.tokens.npy"
    flip(tokens)
    done = verify(run)
    assert done.returncode == 1
    problems = done.stderr.splitlines()
    for path, what in (
        (run / "tokenizer.json", ""),
        (run / "metrics.jsonl", ", line 2 is not JSON"),
        (run / "metrics.jsonl", ": the last line was cut off"),
        (run / "checkpoints" / "9", ": _CHECKPOINT_METADATA is missing"),
        (run / "checkpoints" / "9", f": {kernel.relative_to(run / 'checkpoints' / '9')} is not"),
        (tokens, " is not what was written"),
    ):
        assert any(f"{path}{what}" in problem for problem in problems), (path, what, problems)
    assert len(problems) == 6
    assert f"{run}: 5 problems\n{run.parent}/store: 1 problem\n" in done.stdout


def test_a_directory_that_is_neither_is_refused(tmp_path):
    assert "give a run or a token store" in programs.run("tools/verify.py").stderr
    done = verify(tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path} is neither a run (it has no config.json) nor a token store" in done.stderr
    done = programs.run("tools/verify.py", "a", "b")
    assert "'b' is not a flag" in done.stderr
