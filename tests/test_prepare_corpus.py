"""Public corpora: downloaded from a small hub on this machine by the real client, and built."""

import gzip
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import programs
import pytest
from small_hub import commit_of, hub_in_use, running_hub

from retnet_jax.config import DataConfig
from retnet_jax.data import open_store
from retnet_jax.data.build import build_store
from retnet_jax.data.hub_text import FILES, stream_text
from retnet_jax.data.public_corpora import CORPORA, PublicCorpus, named_parts
from retnet_jax.errors import CheckpointError, ConfigError
from retnet_jax.files import lock
from retnet_jax.programs.prepare_corpus import _number, _other_shares

datasets = pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")
pytest.importorskip("huggingface_hub")

PILE, STACK, STORIES = (f"datasets/{CORPORA[x].hub}" for x in ("pile", "stack", "tinystories"))
C4 = "datasets/allenai/c4"
C4_README = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
---
"""
BYTES = ("--config.data.tokenizer=byte", "--config.data.held_out=0.1")


def story(shard, number):
    return f"Story {number} of shard {shard}: the cat sat on the mat. " * 3


def parquet_file(**columns):
    from pyarrow import table

    file = io.BytesIO()
    parquet.write_table(table(columns), file)
    return file.getvalue()


def stories(shard, count=50):
    return parquet_file(text=[story(shard, number) for number in range(count)])


def pile_file(shard, count=50):
    texts = [f"Pile {shard}.{i} é and some words after it" for i in range(count)]
    lines = [{"text": text, "meta": {"pile_set_name": "x"}} for text in texts]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return zstandard.ZstdCompressor().compress(text.encode())


def c4_file(shard, count=50):
    lines = [{"text": f"web page {shard} {i}", "url": f"u{shard}.{i}"} for i in range(count)]
    return gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())


def stack_file(shard, count=50):
    return parquet_file(
        content=[f"def f_{shard}_{i}(): return {i}" for i in range(count)],
        hexsha=[f"{shard}-{i}" for i in range(count)],
        max_stars_repo_licenses=[["mit"]] * count,
    )


FILES_OF = {
    STORIES: {f"data/train-{n:05}-of-00004.parquet": stories(n) for n in range(4)}
    | {"data/validation-00000-of-00001.parquet": stories(9)},
    PILE: {f"train/{n:02}.jsonl.zst": pile_file(n) for n in range(3)}
    | {"val.jsonl.zst": pile_file(9)},
    STACK: {f"data/c/train-{n:05}-of-00002.parquet": stack_file(n) for n in range(2)},
    C4: {f"en/c4-train.0000{n}-of-00002.json.gz": c4_file(n) for n in range(2)}
    | {"README.md": C4_README},
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_in_use(tmp_path, monkeypatch) as hub:
        # What HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME set when the library is imported.
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 1)
        monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
        hub.repositories |= {name: {"main": dict(files)} for name, files in FILES_OF.items()}
        yield hub


def run(*arguments):
    return programs.run("tools/prepare_corpus.py", *arguments)


def refused(*arguments):
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    return done.stderr.splitlines()[-1].partition("prepare_corpus.py: ")[2]


def lines_in(directory):
    contents = [zstandard.decompress(x.read_bytes(), 10**7) for x in sorted(directory.glob(FILES))]
    return [json.loads(line) for text in contents for line in text.splitlines()]


@pytest.mark.slow
def test_a_corpus_from_nothing(hub):
    done = run("tinystories", "--tokens=10k", "--processes=1", *BYTES)
    assert done.returncode == 0, done.stderr
    *_, command = done.stdout.splitlines()
    assert "roneneldan/TinyStories:train: licence cdla-sharing-1.0. Short stories" in done.stderr
    assert command == (
        f"train on it with: python train.py --config=quickstart {' '.join(BYTES)} "
        "--config.data.source=jsonl "
        "'--config.data.path=data/text/tinystories/**/*.jsonl.zst'"
    )
    (store,) = Path("data").glob("tinystories*byte*")
    found = open_store(store).manifest
    wanted = 10_000 / 0.9
    texts = [line["text"] for line in lines_in(Path("data/text/tinystories/tinystories"))]
    size = sum(len(text.encode()) for text in texts)
    assert wanted * 0.95 < size < wanted * 1.1
    assert sum(split["documents"] for split in found["splits"].values()) == len(texts)
    # Some of the beginning of every shard, not all of one.
    for shard in range(4):
        of_shard = [text for text in texts if f"of shard {shard}" in text]
        assert of_shard == [story(shard, number) for number in range(len(of_shard))]
        assert 0 < len(of_shard) < 50

    del hub.asked[:]
    again = run("tinystories", "--tokens=10k", "--processes=1", *BYTES)
    assert again.stdout == done.stdout, again.stderr
    assert not any(line.endswith(".parquet") for line in hub.asked)
    assert "was built from less or other text than there is now: delete it" in refused(
        "tinystories", "--tokens=12k", *BYTES
    )
    fewer = run("tinystories", "--tokens=2k", "--config.data.store=other", *BYTES)  # the same text
    assert "2,000 tokens were wanted, and the store has " in fewer.stdout
    train = programs.run(*shlex.split(command.partition("python ")[2]), "--config.train.steps=-1")
    assert "train.steps=-1" in train.stderr.splitlines()[-1]  # the command is understood


@pytest.mark.slow
def test_the_papers_mixture(hub):
    """In the shares of the mixture, and where the paper's configs look for it."""
    options = ("--tokens=4k", "--config=retnet_200m", "--processes=1", *BYTES)
    done = run("paper", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        f"train on it with: python train.py --config=retnet_200m {' '.join(BYTES)}"
    )
    shares = {"pile": 0.6, "c4": 0.2, "stack": 0.2}
    found = {name: lines_in(Path("data/corpus") / name) for name in shares}
    for name, share in shares.items():
        size = sum(len(line["text"].encode()) for line in found[name])
        assert 0.9 < size / (share * 4000 / 0.9) < 1.15, name
    assert found["c4"][0]["text"].startswith("web page ")
    assert found["stack"][0]["text"].startswith("def f_")
    assert found["stack"][0]["id"].endswith("-0")
    again = programs.run("tools/prepare_data.py", "--config=retnet_200m", *BYTES)
    assert again.returncode == 0, again.stderr
    assert again.stdout in done.stdout


def test_all_of_a_corpus_is_taken_if_it_is_small(hub):
    done = run("tinystories", "--tokens=10M", "--processes=1", *BYTES)
    assert done.returncode == 0, done.stderr
    assert len(lines_in(Path("data/text/tinystories/tinystories"))) == 200
    assert "roneneldan/TinyStories:train has only 0.0 MB of text: all of it" in done.stderr
    assert "10,000,000 tokens were wanted, and the store has " in done.stdout


def test_the_text_is_written_by_one_process_and_killed_ones_leave_nothing(hub, tmp_path):
    corpus, directory = CORPORA["tinystories"], tmp_path / "text"
    directory.mkdir()
    with lock.held(directory):
        for _ in range(2):  # the refused process leaves the lock alone
            with pytest.raises(ConfigError, match=f"{directory} is being written by process "):
                stream_text(corpus, directory, 2000)
    assert hub.asked == []
    (directory / ".00002.jsonl.zst.123.unfinished").write_bytes(b"half")  # as kill -9 leaves it
    assert stream_text(corpus, directory, 10) >= 10
    assert [x.name for x in directory.iterdir() if x.name.startswith(".") or x.name == "lock"] == []


@pytest.mark.slow
def test_a_download_is_resumed_at_the_same_commit(hub, tmp_path):
    corpus, directory = CORPORA["tinystories"], tmp_path / "text"
    commit = commit_of(hub.repositories[STORIES]["main"])
    stream_text(corpus, directory, 2000)
    before = {path.name: path.read_bytes() for path in directory.glob(FILES)}
    hub.repositories[STORIES]["old"] = hub.repositories[STORIES]["main"]
    hub.repositories[STORIES]["main"] = {"data/train-00000-of-00001.parquet": stories(7)}
    assert stream_text(corpus, directory, 2000) >= 2000
    assert {path.name: path.read_bytes() for path in directory.glob(FILES)} == before
    assert stream_text(corpus, directory, 20_000) >= 20_000  # more text
    assert json.loads((directory / "corpus.json").read_text())["commit"] == commit
    assert not any("shard 7" in line["text"] for line in lines_in(directory))
    with pytest.raises(ConfigError) as error:
        stream_text(CORPORA["pile"], directory, 2000)
    assert str(error.value) == (
        f"{directory} holds text of roneneldan/TinyStories:train, not of "
        "monology/pile-uncopyrighted:train: give another directory with --text, or delete it"
    )


def test_text_of_other_corpora_or_in_other_shares(hub):
    """An earlier command may have left it in the same directory."""
    for directory in ("t/pile", "t/text/c4", "t/c4"):
        Path(directory).mkdir(parents=True)
        Path(directory, "corpus.json").touch()
    assert refused("c4", "--text=t", "--tokens=1k", "--config=quickstart", *BYTES) == (
        "t also holds text of pile, text/c4, which would be in the store: give another directory "
        "with --text, or delete it there"
    )
    assert hub.asked == []
    parts = named_parts("c4:0.1,pile:0.9")
    assert _other_shares(parts, {"c4": 110, "pile": 900}, Path("t")) == []
    assert _other_shares(parts, {"c4": 900, "pile": 900}, Path("t")) == [
        "allenai/c4:en:train is 50% of the text, not 10%; if an earlier command has downloaded "
        "more of it, delete t/c4"
    ]


@pytest.mark.slow
def test_a_connection_that_breaks_for_ever(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # of the client, between its attempts
    directory = tmp_path / "text"
    hub.break_connection("GET /datasets/roneneldan/TinyStories/resolve", times=200)
    with pytest.raises(CheckpointError) as error:
        stream_text(CORPORA["tinystories"], directory, 2000)
    assert f"{hub.url}/datasets/roneneldan/TinyStories cannot be downloaded (" in str(error.value)
    assert list(directory.glob("*")) == []
    hub.refusals.clear()
    assert stream_text(CORPORA["tinystories"], directory, 2000) >= 2000


def test_a_source_on_the_hub_is_explained_as_well(hub, monkeypatch):
    """By `data.source=hf`, without prepare_corpus; nothing of the store is left."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def refusal(path):
        config = DataConfig(store="data/hf", tokenizer="byte", source="hf", path=path)
        with pytest.raises((ConfigError, CheckpointError)) as error:
            build_store(config, 259, processes=1)
        assert not Path("data").exists()
        return str(error.value)

    message = refusal("roneneldan/TinyStores:train")
    assert "/TinyStores does not exist, or is private: correct the name (did you mean " in message
    hub.break_connection("GET /datasets/roneneldan/TinyStories/resolve", times=200)
    message = refusal("roneneldan/TinyStories:train")
    assert "/datasets/roneneldan/TinyStories cannot be downloaded (" in message
    assert message.endswith("check the connection and HF_ENDPOINT, and give the same command again")
    hub.refusals.clear()
    message = refusal("roneneldan/TinyStories@v9:train")
    assert message.endswith("TinyStories has no revision v9: give a branch, a tag or a commit")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pile", [("pile", 1.0)]),
        ("paper", [("pile", 0.6), ("c4", 0.2), ("stack", 0.2)]),
        ("c4:3, pile:1", [("c4", 0.75), ("pile", 0.25)]),
        ("a/b", [("a_b", 1.0)]),
        ("a/b:sub-10BT", [("a_b_sub-10BT", 1.0)]),
        ("a/b:sub:2,c4:2", [("a_b_sub", 0.5), ("c4", 0.5)]),
    ],
)
def test_names_and_shares(text, expected):
    found = [(part.name, part.share) for part in named_parts(text)]
    assert found == [(name, pytest.approx(share)) for name, share in expected]


def test_the_names_and_fields_of_a_corpus():
    assert CORPORA["c4"].config("abc").path == "allenai/c4@abc:en:train"
    stack = CORPORA["stack"].config()
    assert (stack.path, stack.text_field) == ("bigcode/the-stack-dedup:train", "content")
    filtered = PublicCorpus("a/b", filters={"languages": ("en",)}).config()
    assert filtered.languages == ("en",)
    for corpus in CORPORA.values():
        corpus.config().check()
        assert corpus.license != "not known"


def test_names_that_are_wrong():
    for text, expected in {
        "tinystory": "'tinystory' is not a known corpus: give one of pile, c4, stack, tinystories",
        "c4:x": "'c4:x': the share 'x' is not a positive number; expected NAME:SHARE, such as c4:0",
        "c4:0,pile:1": "'c4:0': the share '0' is not a positive number",
        "c4:-1": "the share '-1' is not a positive number",
        "c4,c4": "'c4,c4' names a corpus twice",
        "": "'' is not a known corpus",
        "a/b/c": "'a/b/c' is not a known corpus",
        "hf://a/b": "'hf://a/b' is not a known corpus: give a data set on the Hugging Face hub as",
        "c4:fr": "such as c4:0.3; a subset is named as allenai/c4:SUBSET",
    }.items():
        with pytest.raises(ConfigError) as error:
            named_parts(text)
        assert expected in str(error.value), text


def test_numbers_of_tokens():
    numbers = {"10B": 10**10, "2.5M": 2_500_000, "20k": 20_000, "1e9": 10**9, "100_000": 10**5}
    assert {text: _number(text) for text in numbers} == numbers
    for text in ("", "B", "-1", "0", "10 billion", "1e99", "nan"):
        with pytest.raises(ConfigError, match=f"--tokens={text} is no number of tokens: give one"):
            _number(text)


def test_what_is_refused(hub, monkeypatch):
    assert refused("nonsense").startswith("'nonsense' is not a known corpus: give one of pile, c4")
    assert refused("pile", "--tokens=many").startswith("--tokens=many is no number of tokens")
    assert refused("pile", "--text=gs://b/t").startswith("--text=gs://b/t is not on a local disk")
    message = refused("pile", "--config.data.store=gs://b/s")
    assert message.startswith("--config.data.store=gs://b/s is not on a local disk: build the")
    assert refused("pile", "--config.data.path=x").startswith("--config.data.path is set by this")
    assert hub.asked == []
    small = ("--tokens=1k", "--config=quickstart", *BYTES)
    assert refused("some/nothing", *small) == (
        f"{hub.url}/datasets/some/nothing does not exist, or is private: correct the name; for a "
        "private data set log in with `hf auth login`, or set HF_TOKEN"
    )
    assert "datasets/roneneldan/TinyStories cannot be read (" in refused(
        "roneneldan/TinyStories:german", *small
    )
    message = refused("tinystories", "--text_field=story", *small)
    assert "TinyStories:train has no text: 200 no field 'story'; the first: " in message
    assert message.endswith("'text'; the field with the text is given by --text_field")
    texts = {f"data/train-{n:05}-of-00002.parquet": stories(n, 1500) for n in range(2)}
    hub.repositories["datasets/some/long"] = {"main": texts}
    message = refused("some/long", "--text_field=story", *small)  # only the beginning is read
    assert "some/long:train has no text: 1000 no field 'story'; " in message
    hub.token = "secret"
    assert refused("stack", *small) == (
        f"{hub.url}/datasets/bigcode/the-stack-dedup is only for users who accepted its "
        "conditions: accept them there, and log in with `hf auth login`, or set HF_TOKEN"
    )
    assert not Path("data").exists()


def test_the_list_of_corpora():
    done = run()
    assert done.returncode == 0, done.stderr
    assert "pile         monology/pile-uncopyrighted:train (licence: other)\n" in done.stdout
    assert "(licence: other; its conditions must be accepted there)\n" in done.stdout
    assert done.stdout.endswith("paper        pile:0.6, c4:0.2, stack:0.2\n")


@pytest.mark.slow
def test_a_killed_download_is_resumed(tmp_path):
    """As a person runs it: processes of their own, killed while they download; the same store."""
    environment = {name: x for name, x in os.environ.items() if not name.startswith("HF_")}
    root = programs.ROOT
    environment |= {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, root / "tools/prepare_corpus.py", "tinystories", "--tokens=200k"]
    command += ["--processes=1", *BYTES]
    stores = []
    for name, kills in (("whole", ()), ("killed", (3, 20))):
        directory = tmp_path / name
        directory.mkdir()
        with running_hub() as hub:
            files = {f"data/train-{n:05}-of-00040.parquet": stories(n) for n in range(40)}
            hub.repositories[STORIES] = {"main": files}
            environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
            for count in (*kills, None):
                process = subprocess.Popen(
                    command, cwd=directory, env=environment, stderr=subprocess.PIPE, text=True
                )
                if count is not None:
                    while process.poll() is None and len([*directory.rglob(FILES)]) < count:
                        time.sleep(0.01)
                    process.send_signal(signal.SIGKILL)
                _, errors = process.communicate()
                assert process.returncode == (0 if count is None else -signal.SIGKILL), errors
        (store,) = directory.glob("data/tinystories*byte*")
        stores.append(open_store(store).fingerprint)
        unfinished = [*directory.rglob("*.unfinished")]
        assert unfinished == []
    assert stores[0] == stores[1]
