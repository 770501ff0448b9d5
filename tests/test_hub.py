"""Names on the Hugging Face hub: the real client against a small hub on the loopback address."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from foreign_checkpoints import FIXTURES, leaves
from hub_model import CONFIG, MODEL, WEIGHTS, files
from small_hub import commit_of, hub_in_use, running_hub

from retnet_jax import interop, load_pretrained
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.files.hub import HubName, cached_name, hub_name, model_directory
from retnet_jax.pretrained import read_pretrained

pytest.importorskip("huggingface_hub", reason="pip install -e '.[hub]'")
constants = pytest.importorskip("huggingface_hub.constants")

ROOT = Path(__file__).parent.parent


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one model, used by this process, in an empty working directory."""
    with hub_in_use(tmp_path, monkeypatch) as hub:
        hub.repositories[MODEL] = {"main": files()}
        yield hub


def refusal(kind, model=MODEL, **options):
    """The message of the error for a model."""
    with pytest.raises(kind) as error:
        model_directory(model, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_on_the_hub_gives_the_logits_of_its_directory(hub):
    tokens = jnp.arange(12).reshape(1, 12)
    logits = jax.jit(lambda model: model(tokens)[0])
    expected = logits(load_pretrained(FIXTURES / "fla/default"))
    np.testing.assert_array_equal(logits(load_pretrained(MODEL)), expected)
    assert sorted(hub.downloads()) == ["config.json", "model.safetensors"]


def test_the_second_time_nothing_is_downloaded(hub, monkeypatch):
    directory = model_directory(MODEL)
    del hub.asked[:]
    assert model_directory(MODEL) == directory
    assert hub.asked == [f"GET /api/models/{MODEL}/revision/main"]  # whether there is a newer one
    commit = directory.name
    assert model_directory(f"hf://{MODEL}@{commit}") == directory
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_directory(MODEL) == directory
    assert len(hub.asked) == 1
    message = refusal(CheckpointError, "some-owner/other")
    assert "hf://some-owner/other is not (completely) in the cache" in message
    assert message.endswith(": unset HF_HUB_OFFLINE to download it")


def environment_of(hub, tmp_path):
    """The environment of a process of its own that uses the hub."""
    environment = {name: x for name, x in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    return environment | {"PYTHONPATH": str(ROOT)}


def test_the_environment_of_the_client_is_used(hub, tmp_path):
    """In processes of their own: an endpoint, a token, a cache, and no network."""
    hub.token = "secret"
    code = f"from retnet_jax.files.hub import model_directory; print(model_directory('{MODEL}'))"
    environment = environment_of(hub, tmp_path) | {"HF_TOKEN": "secret"}
    found = []
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.append(done.stdout)
    assert found[0] == found[1]
    assert found[0].startswith(str(tmp_path / "hf/hub/models--some-owner--retnet-1.3B/snapshots/"))
    assert sum(line.startswith("GET /api/models") for line in hub.asked) == 2  # of the first alone


def test_what_the_client_says_is_printed_once(hub, tmp_path):
    """By its own logger; absl, of our programs, would print it too."""
    hub.break_connection(f"GET /large/{MODEL}")
    arguments = (f"--source={MODEL}", f"--target={tmp_path / 'new'}", "--layout=own")
    done = subprocess.run(
        [sys.executable, ROOT / "tools/convert_checkpoint.py", *arguments],
        env=environment_of(hub, tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Trying to resume download") == 1, done.stderr


def test_a_revision_is_a_branch_or_a_commit(hub):
    old, new = files(**{"config.json": b"{}"}), files()
    hub.repositories[MODEL] = {"main": new, "refs/pr/1": old}
    assert model_directory(MODEL).name == commit_of(new)
    commit = commit_of(old)
    assert model_directory(MODEL, revision=commit).name == commit
    assert model_directory(f"hf://{MODEL}@{commit}").name == commit
    assert model_directory(f"hf://{MODEL}@refs/pr/1").name == commit
    message = refusal(ConfigError, revision="v2")
    assert message == f"{hub.url}/{MODEL} has no revision v2: give a branch, a tag or a commit"
    assert "give only one of the revisions" in refusal(
        ConfigError, f"hf://{MODEL}@v1", revision="v2"
    )
    assert "needs a name on the Hugging Face hub" in refusal(ConfigError, ".", revision="v2")


def test_what_is_a_name_and_what_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub_name("owner/name") == HubName("owner/name")
    assert hub_name("hf://runs/mine@v1") == HubName("runs/mine", "v1")
    assert str(hub_name("hf://owner/name@refs/pr/1")) == "hf://owner/name@refs/pr/1"
    for path in ("runs/mine", "name", "./a/b", "../b", "~/b", "/a/b", "a/b/c", "a/b@v1", "a/b/"):
        assert hub_name(path) is None, path
    for path in ("gs://bucket/run", "a/..", "a--b/c", "", Path("owner/name")):
        assert hub_name(path) is None, path
    addresses = ("https://huggingface.co/owner/name", "HF://owner/name", "hf:/owner/name")
    for text in ("hf://name", "hf://datasets/a/b", "hf://a/b@", *addresses):
        with pytest.raises(ConfigError, match="expected hf://OWNER/NAME or hf://OWNER/NAME@REV"):
            hub_name(text)


def test_a_local_directory_is_never_requested(hub):
    Path("some-owner").mkdir()
    with pytest.raises(ConfigError) as error:
        load_pretrained(MODEL)
    assert f"{MODEL} is no directory; for the model of this name" in str(error.value)
    assert str(error.value).endswith(f"on the Hugging Face hub, give hf://{MODEL}")
    with pytest.raises(ConfigError) as error:
        load_pretrained(f"{MODEL}@v1")
    assert str(error.value).endswith(f"on the Hugging Face hub, give hf://{MODEL}@v1")
    interop.convert(FIXTURES / "fla/default", MODEL, "own")
    assert len(leaves(load_pretrained(MODEL))) > 0
    assert hub.asked == []
    assert cached_name(model_directory(f"hf://{MODEL}")) is not None
    assert hub.asked != []


def test_a_broken_connection_is_resumed(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.break_connection(f"GET /large/{MODEL}")
    directory = model_directory(MODEL)
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    (resumed,) = [line for line in hub.asked if line.startswith("RANGE")]
    assert 0 < int(resumed.split()[1]) < len(WEIGHTS)


def test_the_client_waits_if_the_hub_limits_requests(hub):
    hub.refuse("GET /large", 429, Retry_After="0")
    assert (model_directory(MODEL) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.downloads().count("config.json") == 1


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (429, {"Retry_After": "70"}, r"refuses more requests for now \(429\): try again in 70 sec"),
        (503, {}, r"cannot be downloaded, because the hub answered 503: try again later"),
        (401, {"X_Error_Code": "GatedRepo"}, r"accept them there, and log in with `hf auth login`"),
        (401, {}, r"cannot be read \(401\): log in with `hf auth login`, or set HF_TOKEN"),
        (403, {}, r"cannot be read \(403\): log in with `hf auth login`, or set HF_TOKEN"),
    ],
    ids=["limited", "down", "gated", "unauthorized", "forbidden"],
)
def test_a_refusal_says_what_would_help(hub, status, headers, expected):
    hub.refuse("GET /api/models", status, **headers)
    with pytest.raises((ConfigError, CheckpointError), match=expected):
        model_directory(MODEL)
    assert model_directory(MODEL).is_dir()


@pytest.mark.parametrize(
    ("wrong", "suggested"),
    [
        ("some-owner/retnet-1.3b", f" (did you mean {MODEL}?)"),  # names are case-sensitive
        ("some-owner/retnet1.3B", f" (did you mean {MODEL}?)"),
        ("sone-owner/retnet-1.3B", f" (did you mean {MODEL}?)"),
        ("some-owner/llama", ""),
        ("nobody/nothing", ""),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(hub, wrong, suggested):
    hub.repositories |= {x: {"main": files()} for x in ("some-owner/gpt", "a/retnet-1.3B")}
    message = refusal(ConfigError, wrong)
    assert f"private: correct the name{suggested}; for a private model log in" in message


def test_a_wrong_name_is_refused_if_the_hub_does_not_list_names(hub):
    hub.refuse("GET /api/models", 404, X_Error_Code="RepoNotFound")
    hub.refuse("GET /api/models", 403)
    hub.refuse("GET /api/models", 403)
    assert "correct the name; for a private model log in" in refusal(ConfigError, MODEL)


def test_a_hub_that_cannot_be_reached(hub, monkeypatch):
    with running_hub() as gone:
        url = gone.url
    monkeypatch.setattr(constants, "ENDPOINT", url)
    message = refusal(CheckpointError)
    path = f"{MODEL} is no directory in {os.getcwd()}"
    assert message.startswith(f"{path}, and {url}/{MODEL} cannot be downloaded (ConnectError: ")
    assert "check the connection and HF_ENDPOINT" in message


@pytest.mark.parametrize("status", [401, 403, 503])
def test_a_filled_cache_is_used_with_a_warning_if_the_hub_refuses(hub, status):
    directory = model_directory(MODEL)
    hub.refuse("GET /api/models", status)
    with pytest.warns(UserWarning, match="is read from the cache") as warned:
        assert model_directory(MODEL) == directory
    (message,) = [str(x.message) for x in warned]
    assert message.startswith(f"hf://{MODEL} is read from the cache, at commit {directory.name}; ")
    assert f"there may be a newer one: {hub.url}/{MODEL} cannot be" in message
    assert str(status) in message


def test_a_filled_cache_is_used_with_a_warning_without_a_network(hub, monkeypatch):
    directory = model_directory(MODEL)
    with running_hub() as gone:
        url = gone.url
    monkeypatch.setattr(constants, "ENDPOINT", url)
    with pytest.warns(UserWarning, match=r"be a newer one: http\S* cannot be downloaded \(Conn"):
        assert model_directory(MODEL) == directory
    assert model_directory(MODEL, revision=directory.name) == directory  # cannot be newer


def test_a_newer_commit_is_downloaded(hub):
    old = model_directory(MODEL)
    hub.repositories[MODEL] = {"main": files(**{"config.json": CONFIG + b"\n"})}
    new = model_directory(MODEL)
    assert new != old
    assert (new / "config.json").read_bytes() == CONFIG + b"\n"
    assert hub.downloads().count("config.json") == 2
    hub.repositories[MODEL] = {"other": files()}
    assert refusal(ConfigError).endswith("has no revision main: give a branch, a tag or a commit")


def test_a_connection_that_breaks_every_time(hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # of the client, between its attempts
    hub.break_connection(f"GET /{MODEL}/resolve", times=6)
    message = refusal(CheckpointError)
    assert "cannot be downloaded (RemoteProtocolError: " in message
    assert message.endswith("and try again (complete files are kept)")
    assert hub.downloads().count("config.json") == 6
    directory = model_directory(MODEL)
    assert (directory / "config.json").read_bytes() == CONFIG
    assert hub.downloads().count("model.safetensors") == 1


def test_a_cache_that_cannot_be_written(hub, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file/hub"))
    message = refusal(CheckpointError)
    assert f"cannot be written to the cache {tmp_path}/file/hub (" in message
    assert "make room there, or set HF_HOME to another directory" in message


def test_without_the_client(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    how = "is downloaded with huggingface_hub: pip install 'retnet-jax[hub]'"
    # Perhaps a run that was not trained yet was meant.
    assert refusal(ConfigError, "runs/quickstart") == (
        f"runs/quickstart is no directory in {os.getcwd()}, and hf://runs/quickstart {how}"
    )
    assert refusal(ConfigError, f"hf://{MODEL}@v1") == f"hf://{MODEL}@v1 {how}"


def test_a_repository_without_weights_that_can_be_read(hub):
    without = {"config.json": CONFIG, "model.gguf": b"x", "pytorch_model-1-of-2.bin": b"x"}
    hub.repositories[MODEL]["main"] = without
    message = refusal(CheckpointError)
    assert (
        "has no weights in its top directory: expected *.safetensors, pytorch_model.bin, or pyto"
        in (message)
    )
    hub.repositories[MODEL]["main"] = without | {"pytorch_model.bin": b"x"}
    directory = model_directory(MODEL)
    assert sorted(x.name for x in directory.iterdir()) == ["config.json", "pytorch_model.bin"]
    assert hub.downloads().count("pytorch_model-1-of-2.bin") == 0


def test_a_repository_without_a_config_or_a_tokenizer(hub):
    hub.repositories[MODEL] = {"main": {"model.safetensors": WEIGHTS}, "v1": files()}
    begin = f"hf://{MODEL} has no config.json in its top directory, which must hold the model's si"
    assert refusal(CheckpointError).startswith(begin)
    with pytest.raises(ConfigError) as error:
        read_pretrained(MODEL, "v1")
    assert str(error.value) == (
        f"hf://{MODEL}@{commit_of(files())} has no tokenizer.json or tokenizer.model: download the "
        f"model (hf download {MODEL} --local-dir DIRECTORY), copy its tokenizer there, and give "
        "DIRECTORY"
    )


def test_a_model_of_another_architecture(hub):
    other = json.dumps(json.loads(CONFIG) | {"model_type": "gla"}).encode()
    hub.repositories[MODEL] = {"main": files(**{"config.json": other})}
    with pytest.raises(ConfigError, match=r"\n  model_type=.gla.: another architecture$"):
        load_pretrained(MODEL)


def test_pytorch_files_with_an_index_are_downloaded(hub):
    index = {"weight_map": {"a": "pytorch_model-1-of-2.bin", "b": "pytorch_model-2-of-2.bin"}}
    parts = dict.fromkeys(index["weight_map"].values(), b"x")
    index = {"pytorch_model.bin.index.json": json.dumps(index).encode()}
    hub.repositories[MODEL]["main"] = {"config.json": CONFIG, "training_args.bin": b"x"} | index
    assert "has no weights in its top directory" in refusal(CheckpointError)
    hub.repositories[MODEL]["main"] |= parts
    directory = model_directory(MODEL)
    assert {x.name for x in directory.iterdir()} == {"config.json", *index, *parts}


@pytest.mark.parametrize(
    "command",
    [
        "eval.py some-owner/retnet --data=*.txt",
        "generate.py some-owner/retnet text",
        "tools/convert_checkpoint.py --source=some-owner/retnet --target=new --layout=own",
        "train.py --config=quickstart --config.init_from=some-owner/retnet --workdir=run",
        "train.py --config=quickstart --config.data.tokenizer=some-owner/retnet --workdir=run",
    ],
    ids=["eval", "generate", "convert", "init_from", "tokenizer"],
)
def test_programs_take_names(hub, command):
    done = programs.run(*command.split())
    expected = (
        f"some-owner/retnet is no directory in {os.getcwd()}, and {hub.url}/some-owner/retnet does "
        f"not exist, or is private: correct the name (did you mean {MODEL}?); for a private model "
    )
    assert expected in done.stderr, done.stderr
    assert done.returncode == 2
    assert list(Path().iterdir()) == []
