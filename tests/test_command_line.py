"""Options on the command line: how values are read, and the text of `--help`."""

import programs
import pytest

from retnet_jax.config import Config
from retnet_jax.config.as_json import config_from_json, options
from retnet_jax.errors import ConfigError
from retnet_jax.programs.command_line import _config_file
from retnet_jax.programs.overrides import apply, option_from_text, shares_from_text, taken_out


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("data/pile:0.6,gs://b/c4:2", {"data/pile": 0.6, "gs://b/c4": 2.0}),
        ("", {}),
        ("{'data/pile': 1.0}", {"data/pile": 1.0}),
        ("{'data/pile': 0.6, 'data/c4': 0.4}", {"data/pile": 0.6, "data/c4": 0.4}),
    ],
)
def test_shares_of_a_mixture(text, shares):
    assert shares_from_text(text) == option_from_text("data.mixture", text) == shares


@pytest.mark.parametrize("text", ["data/pile", "data/pile:x", ":0.5", "data/a:1,"])
def test_invalid_shares_are_named(text):
    with pytest.raises(ValueError, match=r"expected STORE:SHARE such as data/pile:0.6, got"):
        shares_from_text(text)


VALUES = [
    ("data.extensions", "py,c", ("py", "c")),
    ("data.extensions", "('py', 'c')", ("py", "c")),
    ("data.extensions", "['py']", ("py",)),
    ("data.extensions", "py", ("py",)),
    ("data.extensions", "", ()),
    ("data.extensions", "()", ()),
    ("data.skip_batches", "5,6", (5, 6)),
    ("data.skip_batches", "(5,)", (5,)),
    ("model.decay_range", "(1/32, 1/512)", (1 / 32, 1 / 512)),
    ("model.decay_range", "0.03,2e-3", (0.03, 2e-3)),
    ("model.key_dim", "None", None),
    ("model.key_dim", "64", 64),
    ("model.ffn_norm", "None", None),
    ("model.ffn_norm", "rms", "rms"),
    ("model.norm_epsilon", "1e-5", 1e-5),
    ("model.tie_embeddings", "true", True),
    ("model.tie_embeddings", "0", False),
    ("model.remat", "q,k,v", "q,k,v"),
    ("train.wandb", "None", ""),
    ("train.wandb", "mine", "mine"),
    ("train.steps", "1e6", 1_000_000),
    ("train.steps", "10_000", 10_000),
    ("data.path", "a/*.txt,b/*.txt", "a/*.txt,b/*.txt"),
    ("init_from", "gs://b/run", "gs://b/run"),
]


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_an_option_is_read_as_it_is_meant(name, text, value):
    found = option_from_text(name, text)
    assert (found, type(found)) == (value, type(value))


REFUSED = [
    ("data.skip_batches", "5:8", "skip_batches=5:8: '5:8' is no integer, such as 8; several"),
    ("train.steps", "1.5", "'1.5' is no integer"),
    ("train.steps", "None", "'None' is no integer"),
    ("train.steps", "inf", "'inf' is no integer"),
    ("model.decay_range", "1/32", "2 values are needed, such as 1/32,1/512"),
    ("model.norm_epsilon", "1/0", "'1/0' is no number, such as 0.03 or 1/32"),
    ("model.tie_embeddings", "maybe", "'maybe' is neither true nor false"),
]


@pytest.mark.parametrize(("name", "text", "message"), REFUSED)
def test_a_value_that_does_not_fit_is_refused(name, text, message):
    with pytest.raises(ConfigError) as error:
        option_from_text(name, text)
    assert message in str(error.value)
    assert str(error.value).startswith(f"--config.{name}={text}: ")


def test_options_can_be_given_in_several_forms():
    arguments = ["--workdir=x", "--config.train.steps", "5", "--config.model.tie_embeddings"]
    arguments += ["--noconfig.data.strict", "-config.data.extensions=py", "--config=f"]
    arguments += ["--config.data.extensions=c,h", "--config.train.steps=6"]
    rest, found = taken_out(arguments)
    assert rest == ["--workdir=x", "--config=f"]
    config = Config()
    apply(config, found)
    assert (config.train.steps, config.model.tie_embeddings, config.data.strict) == (6, True, False)
    assert config.data.extensions == ("py", "c", "h")
    for arguments, message in (
        (["--config.train.steps"], "--config.train.steps needs a value"),
        (["--noconfig.train.steps"], "only an option that is true or false can be negated"),
        (["--config.train.step=5"], "config.train.step: no such field; did you mean train.steps"),
        (["--config.data.skip_steps=5:8"], "was renamed: use config.data.skip_batches"),
    ):
        with pytest.raises(ConfigError, match=message):
            taken_out(arguments)


def test_a_tuple_in_a_file_has_all_its_values():
    text = '{"model": {"decay_range": [0.1, 0.2, 0.3]}}'
    with pytest.raises(
        ConfigError, match=r"model.decay_range=\[0.1, 0.2, 0.3\]: 2 values are needed"
    ):
        config_from_json(text)


def test_options_in_a_file_of_flags(tmp_path):
    """A misspelt option is named as on the command line."""
    file = tmp_path / "flags"
    for line, message in (
        ("--config.train.step=5", "config.train.step: no such field; did you mean train.steps"),
        ("--config.train.steps=x", "--config.train.steps=x: 'x' is no integer"),
        (
            "--config.optimizer.warmup_steps=9\n--config.train.steps=8",
            "leaves nothing of train.ste",
        ),
    ):
        file.write_text(f"--config=quickstart\n--workdir={tmp_path / 'run'}\n{line}\n")
        done = programs.run("train.py", f"--flagfile={file}")
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_config_imports_modules_beside_it_from_any_directory(tmp_path):
    """A program in tools/ is started in another directory than the config's."""
    directory = tmp_path / "mine_configs"
    directory.mkdir()
    (directory / "beside_shared.py").write_text("STEPS = 0\n")
    (directory / "run.py").write_text(
        "from mine_configs.beside_shared import STEPS\n"
        "from beside_shared import STEPS as again\n"
        "from retnet_jax.config import Config, TrainConfig\n"
        "def get_config(): return Config(train=TrainConfig(steps=STEPS + again))\n"
    )
    done = programs.run("tools/prepare_data.py", f"--config={directory / 'run.py'}")
    assert done.returncode == 2, done.stderr
    assert "train.steps=0 is less than 1" in done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.py", "--config=nowhere.py: there is no file nowhere.py (from "),
        ("configs/nowhere.py:retnet", "there is no file configs/nowhere.py (from "),
        ("nowhere", "--config=nowhere: no such config; give a file, such as my_config.py, or "),
        ("", "--config=: no such config"),
    ],
)
def test_a_config_that_does_not_exist(given, message):
    with pytest.raises(ConfigError) as error:
        _config_file(given)
    assert message in str(error.value)
    assert "quickstart, retnet_1p3b" in str(error.value)


def test_help_lists_every_option_with_its_default():
    done = programs.run("train.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Trains a language model.")
    lines = [line.split(" = ")[0].strip() for line in done.stdout.splitlines() if " = " in line]
    assert lines == list(options())
    assert "  train.steps = 25000\n      Number of steps\n" in done.stdout
    assert "Several processes:\n  --coordinator_address=TEXT\n" in done.stdout
    assert "May change when a run is resumed" in done.stdout


def test_help_shows_the_values_of_a_config_with_overrides():
    given = ("--config=quickstart:transformer", "--config.train.steps=7", "--help")
    done = programs.run("train.py", *given)
    assert "  train.steps = 7  (default 25000)\n" in done.stdout
    assert "  model.mixer = attention  (default retention)\n" in done.stdout
    assert "  train.seed = 0\n" in done.stdout


@pytest.mark.parametrize(
    ("program", "group", "flag"),
    [
        ("eval.py", "Perplexity", "  --protocol=A,B,... (default window,stateful)\n"),
        ("generate.py", "Sampling", "  --temperature=X (default 0.0)\n"),
        ("tools/inspect_data.py", "Flags", "  --split=train|held_out (default train)\n"),
    ],
)
def test_help_groups_the_flags(program, group, flag):
    done = programs.run(program, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert flag in done.stdout.split(f"\n{group}:\n")[1]
    assert "--helpfull" not in done.stdout
    assert done.stdout.count(f"python {program} ") >= 2
