"""Training runs that are refused: the error names the reason, and nothing is changed."""

import dataclasses
import json
import os
import shutil

import numpy as np
import programs
import pytest
from etils import epath
from flax import nnx

from retnet_jax import interop
from retnet_jax.config.as_json import config_from_json, to_json
from retnet_jax.data.tokenizers import ByteTokenizer
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.evaluation.run import evaluate
from retnet_jax.model import build_model
from retnet_jax.runs.workdir import locked
from retnet_jax.training.loop import train

# A whole run on eight devices; to save it, Orbax copies each array to the host.
pytestmark = pytest.mark.compiles(80, reason="whole runs, saved from eight devices")


def test_another_config_is_refused_and_shown(config, uninterrupted):
    values = json.loads(to_json(config))
    values["model"]["d_model"] = 32
    other = config_from_json(json.dumps(values))
    with pytest.raises(ConfigError, match=r"model.d_model: 16 -> 32"):
        train(other, uninterrupted)


def test_another_tokenizer_is_refused(config, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").write_text(
        '{"model": {"type": "BPE", "vocab": {"<bos>": 0}, "merges": []}}'
    )
    with pytest.raises(ConfigError, match=r"tokenizer"):
        train(config, tmp_path / "run")


def test_a_store_that_was_built_again_from_other_text_is_refused(config, tmp_path):
    """By the resumed run, and by an evaluation, whose held-out documents would be others."""
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " * 20)
    data = dataclasses.replace(
        config.data, path=str(tmp_path / "*.txt"), store=str(tmp_path / "store")
    )
    short = dataclasses.replace(config.train, steps=3)
    run = dataclasses.replace(config, data=data, train=short)
    assert train(run, tmp_path / "run").status == "finished"
    shutil.rmtree(tmp_path / "store")
    assert train(run, tmp_path / "run").status == "finished"  # built again, the same
    (tmp_path / "7.txt").write_text("another text " * 20)
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(ConfigError, match=r"store' holds other data .* than when the run in"):
        train(run, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"store' holds other data"):
        evaluate(tmp_path / "run")


def test_weights_that_are_not_finite_are_refused(config, tmp_path):
    model = build_model(config.model, rngs=nnx.Rngs(0))
    model.embedding[...] = model.embedding[...].at[3, 3].set(np.nan)
    interop.save(model, tmp_path / "model", "own")
    ByteTokenizer().save(tmp_path / "model")
    data = dataclasses.replace(config.data, store=str(tmp_path / "store"))
    begun = dataclasses.replace(config, data=data, init_from=str(tmp_path / "model"))
    with pytest.raises(CheckpointError, match=r"init_from=.*model has parameters .* NaN"):
        train(begun, tmp_path / "run")


def test_a_directory_of_something_else_is_not_written_to(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"has files in it but no config.json"):
        train(config, tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_workdir_that_cannot_be_written_to_is_named(config, tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ConfigError, match=r"--workdir=.*file/run cannot be written to"):
        train(config, tmp_path / "file" / "run")


def test_a_workdir_in_use_is_refused(config, tmp_path):
    with (
        locked(epath.Path(tmp_path / "run")),
        pytest.raises(ConfigError, match=rf"is in use by another run \(process {os.getpid()} on "),
    ):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.stepz=3"], "config.train.stepz: no such field; did you mean train.steps"),
        (["--config.train.steps=many"], "--config.train.steps=many: 'many' is no integer"),
        (["--config.model.n_heads=3"], "is not divisible by model.n_heads=3"),
        (["--config.train.batch_size=12", "--config.mesh.data=8"], "batch_size"),
        (["steps=3"], "'steps=3' is not a flag"),
    ],
)
def test_command_line_errors_are_one_message(config_file, tmp_path, arguments, message):
    command = ["train.py", f"--config={config_file}", f"--workdir={tmp_path}/run"]
    done = programs.run(*command, *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
