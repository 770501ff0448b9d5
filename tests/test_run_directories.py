"""Directories of runs that a command line does not name."""

import os
from pathlib import Path

import programs
import pytest

from retnet_jax.errors import ConfigError
from retnet_jax.programs.run_directories import default_workdir, newest_run

NAMES = [
    ("quickstart", {}, "quickstart"),
    ("configs/retnet_1p3b.py:transformer", {}, "retnet_1p3b_transformer"),
    ("quickstart", {"optimizer.learning_rate": 0.02}, "quickstart_learning_rate-0.02"),
    ("quickstart", {"train.steps": 7, "model.d_model": 64}, "quickstart_d_model-64_steps-7"),
    ("quickstart", {"data.source": "text", "data.path": "a.txt"}, "quickstart_path-a.txt"),
    ("quickstart", {"data.source": "jsonl", "data.path": "a.jsonl"}, "quickstart_path-a.jsonl"),
    (
        "quickstart",
        {"data.source": "text", "data.path": "a.jsonl"},
        "quickstart_path-a.jsonl_source-text",
    ),
    ("quickstart", {"data.source": "jsonl"}, "quickstart_source-jsonl"),
    ("quickstart", {"train.log_every": 5, "mesh.data": 2}, "quickstart"),  # changeable on resume
]


@pytest.mark.parametrize(("config", "changes", "name"), NAMES)
def test_a_run_is_named_by_its_config_and_what_is_changed(config, changes, name):
    assert default_workdir(config, changes) == Path("runs") / name


def test_other_options_are_another_run():
    paths = [{"data.path": f"{directory}/shakespeare.txt"} for directory in ("a", "b")]
    names = [default_workdir("quickstart", changes).name for changes in paths]
    assert names[0] != names[1]
    assert all(name.startswith("quickstart_path-shakespeare.txt_") for name in names)
    long = {"data.extensions": tuple(f"ext{i}" for i in range(100))}
    name = default_workdir("quickstart", long).name
    assert len(name) < 120
    assert name != default_workdir("quickstart", {"data.extensions": ("ext0",)}).name
    assert default_workdir("quickstart", long).name == name


def test_the_newest_run_is_the_one_that_saved_last(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"runs has no run with a checkpoint: name the dir"):
        newest_run()
    for number, name in enumerate(("old", "new", "never saved")):
        path = tmp_path / "runs" / name / ("checkpoints" if number < 2 else "")
        path.mkdir(parents=True)
        os.utime(path, (number, number))
    assert newest_run() == Path("runs/new")


def test_one_directory_is_given_once():
    done = programs.run("generate.py", "here", "--workdir=there")
    assert (done.returncode, "give only one of them" in done.stderr) == (2, True), done.stderr
    done = programs.run("eval.py", "--checkpoint=here", "--workdir=there")
    assert "--workdir=there and --checkpoint=here: give only one of them" in done.stderr


def test_the_first_argument_may_be_any_model(tmp_path):
    """A run or not: the message says what was looked for there."""
    done = programs.run("eval.py", tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path} is not" in done.stderr or f"{tmp_path}/config.json" in done.stderr
