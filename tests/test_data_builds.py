"""Builds of stores: several at once, after an error, with bad splits or a lossy tokenizer."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
from manifests import make_format_3, rewrite_manifest

from retnet_jax.config import DataConfig
from retnet_jax.data import BatchStream, open_stores, store_options
from retnet_jax.data import build as store_builder
from retnet_jax.data.build import build_store
from retnet_jax.data.split import is_held_out
from retnet_jax.data.stores import open_or_build
from retnet_jax.data.token_store import open_store
from retnet_jax.data.tokenizers import ByteTokenizer
from retnet_jax.errors import ConfigError
from retnet_jax.files import lock

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}  # the package, from any directory


@pytest.fixture
def config(tmp_path):
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"Document  {number}\nsays é")
    return DataConfig(
        source="text",
        path=str(tmp_path / "corpus" / "*.txt"),
        tokenizer="byte",
        store=str(tmp_path / "store"),
        held_out=0.2,
    )


def names_by_split(names, share=0.2):
    held_out = [name for name in names if is_held_out(name, share)]
    return [name for name in names if name not in held_out], held_out


def test_a_second_builder_waits_and_opens_what_the_first_has_built(config, monkeypatch):
    encode, begun, said, found = store_builder._encode, threading.Event(), [], {}
    waits = threading.Event()

    def slow(*arguments):
        begun.set()
        assert waits.wait(60)
        return encode(*arguments)

    def record(line):
        said.append(line)
        if "is being built by" in line:
            waits.set()

    monkeypatch.setattr(store_builder, "_encode", slow)
    monkeypatch.setattr(store_builder, "say", record)
    threads = []
    for name in ("retnet", "twin"):
        thread = threading.Thread(
            target=lambda x: found.update({x: open_or_build(config, 257)}), args=(name,)
        )
        thread.start()
        threads.append(thread)
        assert begun.wait(60)
        if name == "retnet":
            with pytest.raises(
                ConfigError, match=rf"0 of 1 shards are built; process {os.getpid()} "
            ):
                open_store(config.store)
    for thread in threads:
        thread.join(60)
    assert found["retnet"].manifest == found["twin"].manifest
    assert said == [f"{config.store} is being built by {_this_process()}: waiting"]
    assert not (Path(config.store) / lock.FILE_NAME).exists()


def _this_process():
    return f"process {os.getpid()} on {socket.gethostname()}"


def test_a_build_that_ended_while_another_waited_is_finished(config, monkeypatch):
    """The second one holds a lock file that no longer exists, or resumes the plan."""
    with monkeypatch.context() as patch:
        patch.setattr(store_builder, "_encode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_store(config, 0)
    assert (Path(config.store) / lock.FILE_NAME).exists()
    assert lock.holder(Path(config.store)) is None
    with pytest.raises(ConfigError, match="0 of 1 shards are built; finish it with"):
        open_or_build(config, 257)
    assert len(build_store(config, 0).train)


def test_a_store_is_built_in_an_empty_directory_and_not_in_place_of_a_file(config):
    Path(config.store).mkdir()
    assert len(open_or_build(config, 257).train)
    config.store += "_file"
    Path(config.store).touch()
    with pytest.raises(ConfigError, match="missing or damaged"):
        open_or_build(config, 257)
    with pytest.raises(
        ConfigError, match=r"data\.store='.*' cannot be used as a directory: .*File exists"
    ):
        build_store(config, 0)


@pytest.mark.parametrize("deduplicate", [True, False])
def test_a_corpus_of_equal_texts_is_refused(config, deduplicate):
    for path in Path(config.path).parent.iterdir():
        path.write_text("the same")
    config.deduplicate = deduplicate
    with pytest.raises(ConfigError, match="all 40 documents have the same text"):
        build_store(config, 0)
    assert not Path(config.store).exists()


def test_the_splits_are_checked_without_duplicates(config):
    corpus = Path(config.path).parent
    train, held_out = names_by_split([path.name for path in sorted(corpus.iterdir())])
    for number, name in enumerate(held_out):  # each after a training document with the same text
        early = (f"!{number}.{i}.txt" for i in range(99))
        shutil.copy(corpus / name, corpus / next(x for x in early if not is_held_out(x, 0.2)))
    with pytest.raises(ConfigError, match=rf"holds out {len(held_out)} of .* document; raise it"):
        open_or_build(config, 257)
    assert not Path(config.store).exists()
    for name in train:
        (corpus / name).unlink()
    config.deduplicate = False
    with pytest.raises(ConfigError, match=r"to train on, and each has the same text as a held-out"):
        open_or_build(config, 257)


def test_documents_that_all_have_one_name_are_refused(config, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": "x", "text": f"t{n}"}) + "\n" for n in range(30)))
    config.source, config.path = "jsonl", str(path)
    with pytest.raises(
        ConfigError, match=r"all 30 documents have one name, 'a\.jsonl:x'.*id_field"
    ):
        build_store(config, 0)
    config.id_field = "none"
    assert len(build_store(config, 0).held_out)


def test_after_a_refusal_the_same_command_with_another_option_builds(config):
    config.held_out = 1e-9
    with pytest.raises(ConfigError, match="holds out none of 40"):
        open_or_build(config, 257)
    assert not Path(config.store).exists()
    config.held_out = 0.2
    assert len(open_or_build(config, 257).held_out)


def test_a_plan_without_a_written_shard_is_replaced(config, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store_builder, "_mark_duplicates", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            open_or_build(config, 257)
    surveys = list((Path(config.store) / "work").glob("*.json"))
    assert len(surveys) == 1
    with pytest.raises(ConfigError, match="is unfinished"):  # the same options: to be finished
        open_or_build(config, 257)
    config.path += ",nothing"
    with pytest.raises(ConfigError, match="matches no file"):
        build_store(config, 0)
    assert surveys[0].exists()  # a typing error does not delete the surveys
    config.path = config.path.removesuffix(",nothing")
    config.held_out = 0.4
    store = open_or_build(config, 257)
    assert store.manifest["options"]["data.held_out"] == 0.4
    assert all(is_held_out(name, 0.4) for name in store.held_out.names)


def test_an_option_that_a_store_does_not_record_has_its_default(config, monkeypatch):
    def forget(manifest):
        for name in ("data.min_bytes", "data.languages", "data.license_field"):
            del manifest["options"][name]
        manifest["options"]["data.drop_copies"] = manifest["options"].pop("data.deduplicate")

    rewrite_manifest(build_store(config, 0).directory, forget)
    old = {"data.drop_copies": "data.deduplicate"}
    monkeypatch.setattr(store_options, "OLD_NAMES", old)
    assert len(open_or_build(config, 257).train)
    config.min_bytes, config.deduplicate = 3, False
    with pytest.raises(ConfigError) as error:
        open_or_build(config, 257)
    assert "data.min_bytes: 0 in the store, 3 asked for" in str(error.value)
    assert "data.deduplicate: True in the store, False asked for" in str(error.value)
    assert "drop_copies" not in str(error.value)


def test_a_store_without_documents_in_a_split_is_not_opened(config):
    def forget(manifest):
        manifest["shards"][0]["splits"]["held_out"] = {"documents": 0, "tokens": 0, "bytes": 0}

    rewrite_manifest(build_store(config, 0).directory, forget)
    with pytest.raises(ConfigError, match="no documents in its split 'held_out'; delete it and"):
        open_store(config.store)


def test_ids_outside_the_vocabulary_are_refused_with_their_documents(config):
    make_format_3(build_store(config, 0).directory)  # later ones have digests
    store = open_store(config.store)
    path = Path(store.directory) / "shards/00000/train.tokens.npy"
    tokens = np.load(path)
    place = store.train.lengths[:3].sum() + 5  # in the fourth document
    tokens[place] ^= 1 << 14
    np.save(path, tokens)
    train = open_store(config.store).train
    name = train.name(3)
    message = (
        rf"is damaged: 1 token ids, the first 16\d\d\d, .* less than 257; they are in '{name}'"
    )
    train.document(2)
    train.read(0, int(place))
    with pytest.raises(ConfigError, match=message):
        train.document(3)
    stream = BatchStream([train], [1.0], sequence_length=16, batch_size=8, bos_id=256, seed=0)
    with stream.iterate() as batches, pytest.raises(ConfigError, match=message):
        list(itertools.islice(batches, 200))


def word_tokenizer(directory, words):
    """A tokenizer of whole words, with one token for all other words."""
    vocabulary = {"[UNK]": 0, "<s>": 1} | {word: i for i, word in enumerate(words, start=2)}
    tokenizer = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')


def test_what_a_tokenizer_loses_is_said_and_recorded(config, tmp_path, capsys):
    exact = build_store(config, 0).manifest["round_trip"]
    texts = [path.read_text() for path in Path(config.path).parent.iterdir()]
    characters = sum(map(len, texts))
    assert exact == {
        "documents": 40,
        "changed": 0,
        "empty": 0,
        "characters": characters,
        "lost": 0.0,
        "most_lost": {},
        "tokens": characters + 40,
        "unknown": 0.0,
    }
    assert "sample" not in capsys.readouterr().err

    word_tokenizer(tmp_path / "words", ["Document", "says", *map(str, range(30))])
    config.tokenizer, config.store = str(tmp_path / "words"), config.store + "_words"
    found = build_store(config, 0).manifest["round_trip"]
    # Each loses one of three spaces, the line end, and é; ten an unknown number and a space.
    assert (found["changed"], found["tokens"], found["unknown"]) == (40, 160, 50 / 160)
    assert found["lost"] == pytest.approx((40 * 3 + 10 * 3) / characters)
    assert list(found["most_lost"].items())[:3] == [(" ", 50), ("\n", 40), ("é", 40)]
    said = capsys.readouterr().err
    assert "in a sample 40 of 40 documents change when they are encoded" in said
    assert "20.00% of 750 characters are lost (' ' 50 times, '\\n' 40 times, 'é' 40 times, " in said
    assert "31.25% of the tokens are unknown" in said


def test_a_tokenizer_for_other_texts_is_refused(config, tmp_path):
    word_tokenizer(tmp_path / "words", ["other"])
    config.tokenizer = str(tmp_path / "words")
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer='.*words' is not suitable for these texts: 40 of"
    ):
        open_or_build(config, 257)
    assert not Path(config.store).exists()


def test_an_old_store_without_a_round_trip_opens(config):
    rewrite_manifest(build_store(config, 0).directory, lambda manifest: manifest.pop("round_trip"))
    assert len(open_or_build(config, 257).train)


def test_home_is_expanded(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "corpus")
    ByteTokenizer().save(tmp_path)
    config.path, config.store, config.tokenizer = "~/corpus/*.txt", "~/deep/store", "~"
    store = open_or_build(config, 257)
    assert store.directory == str(tmp_path / "deep/store")
    assert open_or_build(config, 257).manifest == store.manifest
    config.mixture = {"~/deep/store": 1.0}
    assert list(open_stores(config, 257).stores) == ["store"]
    assert not list(Path().glob("~*"))


def test_stores_and_tokenizers_on_remote_storage(config, tmp_path):
    system = pytest.importorskip("fsspec").filesystem("memory")
    word_tokenizer(tmp_path / "words", ["Document", "says", *map(str, range(40))])
    system.put(str(tmp_path / "words"), "/builds/words", recursive=True)
    system.put(str(tmp_path / "corpus"), "/builds/corpus", recursive=True)
    config.tokenizer = "memory://builds/words"
    local = build_store(config, 0)
    config.path, config.store = "memory://builds/corpus/*.txt", config.store + "_again"
    remote_text = build_store(config, 0)
    assert remote_text.train.names == local.train.names
    system.put(remote_text.directory, "/builds/store", recursive=True)
    config.store = "memory://builds/store"
    remote = open_or_build(config, 50)
    np.testing.assert_array_equal(remote.train.read(0, 10**6), local.train.read(0, 10**6))
    system.put(remote_text.directory, "/builds/other", recursive=True)
    config.mixture = {"memory://builds/store": 0.5, "memory://builds/other/": 0.5}
    stores = open_stores(config, 50)
    assert list(stores.stores) == ["store", "other"]
    assert stores.tokenizer.fingerprint == local.tokenizer.fingerprint


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_processes_of_a_build_end_with_it(number, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
        "from retnet_jax.data.workers import for_each_shard\n"
        "def task(item):\n"
        "    open(f'{sys.argv[1]}/{os.getpid()}.pid', 'w').close()\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    for_each_shard(task, [(0, None), (1, None)], [1, 1], 2, 'reading')\n"
    )
    command = [sys.executable, str(program), str(tmp_path)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(list(tmp_path.glob("*.pid"))) == 2 or process.poll() is not None)
    workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(workers) == 2
    process.send_signal(number)
    assert process.wait(60) == -number
    wait_for(lambda: not any(is_running(worker) for worker in workers))


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_preparation_prints_a_line_at_sigterm_from_any_directory(config, tmp_path):
    """While it waits for the store that this process holds."""
    Path(config.store).mkdir()
    arguments = [f"--config={ROOT}/configs/retnet_200m.py", "--config.data.source=text"]
    for name in ("path", "store", "tokenizer"):
        arguments.append(f"--config.data.{name}={getattr(config, name)}")
    with lock.held(Path(config.store)):
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "tools/prepare_data.py"), *arguments],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = process.stderr.readline()
        assert line == f"{config.store} is being built by {_this_process()}: waiting\n"
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert rest == "stopped; the same command resumes the build\n"
