"""A config of the paper without its corpus, or without memory: four lines, and nothing is left."""

import dataclasses
import os
import re

import programs
import pytest

from retnet_jax.configs.retnet_200m import get_config
from retnet_jax.errors import ConfigError
from retnet_jax.programs.missing_corpus import check_corpus
from retnet_jax.training import memory

GB = 10**9
RUN_OF_PAPER = 25_000 * 2048 * 2048
CONFIGS = f"{programs.ROOT}/configs"
RUNS = [  # arguments, tokens of the run, bytes of a token
    (["--config=retnet_200m"], 10_000 * 256 * 2048, 4),
    ([f"--config={CONFIGS}/retnet_1p3b.py"], RUN_OF_PAPER, 4),
    ([f"--config={CONFIGS}/retnet_2p7b.py:transformer"], 25_000 * 2048 * 2048, 4),
    (["--config=retnet_6p7b"], RUN_OF_PAPER, 4),
    (["--config=retnet_200m", "--config.train.steps=500"], 500 * 256 * 2048, 4),
    (["--config=retnet_200m", "--config.data.tokenizer=byte"], 10_000 * 256 * 2048, 2),
]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """The working directory of the programs, which is empty."""
    monkeypatch.setattr(programs, "DIRECTORY", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("arguments", "tokens", "width"), RUNS)
def test_a_missing_corpus_is_four_lines(arguments, tokens, width, directory):
    done = programs.run("train.py", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    *before, missing, disk, model, command = done.stderr.splitlines()
    assert all(line.startswith("for this corpus: data.store=") for line in before)
    assert len(before) == ("--config.data.tokenizer=byte" in arguments)
    assert (
        "train.py: no corpus: data.path='data/corpus/**/*.jsonl*' matches no file (from "
        f"{directory}), and there is no store in data.store='data/corpus_b"
    ) in missing
    assert re.search(rf"reads {tokens:,} tokens .* takes {width * tokens / GB:.3g} GB", disk)
    assert re.search(r"parameters, .* take [\d.]+ GB of device memory.*; here: \d+ cpu of", model)
    assert command.endswith(
        " is downloaded by this command (then train with the same options): "
        "python tools/prepare_corpus.py paper " + " ".join(arguments)
    )
    assert os.listdir(directory) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "stdlib"},
        {"source": "hf", "path": "allenai/c4:en:train"},
        {"mixture": {"one": 1.0}},
        {"store": "."},
    ],
)
def test_a_run_that_needs_no_such_corpus_is_not_refused(changes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = get_config()
    with pytest.raises(ConfigError, match="no corpus: "):
        check_corpus(config, "prepare")
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
    check_corpus(changed, "prepare")


def test_preparing_a_missing_corpus_says_the_same(directory):
    done = programs.run("tools/prepare_data.py", "--config=retnet_200m")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 4
    assert "no corpus: data.path='data/corpus/**/*.jsonl*'" in done.stderr
    assert os.listdir(directory) == []


def test_a_path_that_the_user_gives_is_named_alone(directory):
    done = programs.run("train.py", "--config=retnet_200m", "--config.data.path=mine/*.jsonl")
    assert done.returncode == 2
    assert "data.path='mine/*.jsonl' matches no file" in done.stderr.splitlines()[-1]
    assert "prepare_corpus" not in done.stderr
    assert os.listdir(directory) == []


def test_too_little_memory_is_four_lines(directory, monkeypatch):
    corpus = directory / "data" / "corpus"
    corpus.mkdir(parents=True)
    (corpus / "a.jsonl").write_text('{"text": "some words"}\n' * 10)
    monkeypatch.setattr(memory, "device_memory", lambda device: 5 * GB)
    copied = ("--config.mesh.data=-1", "--config.mesh.fsdp=1")  # parameters on each device
    done = programs.run("train.py", "--config=retnet_1p3b", *copied)
    assert (done.returncode, done.stdout) == (2, "")
    # 16 bytes for each parameter
    lacking, parts, devices, smaller = done.stderr.splitlines()
    assert lacking.endswith(
        "train.py: not enough memory: 1,619,202,048 parameters need at least 25.9 GB on each "
        "device, and a cpu has 5 GB here"
    )
    assert "6.48 GB of parameters, 13 GB of optimiser state and 6.48 GB of gradients" in parts
    assert "at least 6 such devices can hold them, divided by --config.mesh.fsdp=-1" in devices
    assert smaller.split()[-3:] == ["--config=retnet_200m", "and", "--config=quickstart"]
    assert sorted(os.listdir(directory)) == ["data"]
    assert os.listdir(directory / "data") == ["corpus"]


def test_an_unknown_argument_of_a_config_is_one_line(directory):
    done = programs.run("train.py", "--config=retnet_1p3b:nonsense")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.endswith(
        "train.py: the argument after --config=FILE:='nonsense' is not one of 'retnet', "
        "'transformer', 'paper', 'paper_transformer'"
    )
